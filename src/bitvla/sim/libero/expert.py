"""A scripted expert for LIBERO's pick-and-place tasks: it knows where everything is, and reads the goal.

For every part of the goal that does not hold yet: over the thing, down, close, up, over its place, down, open, up.
Whenever something is not as it should be, a grasp that slipped, a thing that was pushed away, it starts again from what
it sees, so it recovers from any state that a hand can reach. Lengths are in metres.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from bitvla.sim.base import GivenUpError
from bitvla.sim.libero import grasp
from bitvla.sim.libero.grasp import Floats, Grasp, Heights

Action = NDArray[np.float32]
Point = tuple[float, float, float]

OPEN, CLOSED = -1.0, 1.0
_LENGTH, _TURN = 0.05, 0.5  # metres and radians that an action of 1 asks for
_GAIN = 1.5  # of what is missing, asked for at each step: the controller gets 15 % of the way in one
_DAMPING = 2.0  # of the last step's way, taken from it: an outstretched arm is slow to brake
_NEAR, _LEVEL, _TURNED = 0.006, 0.004, 0.05  # arrived: sideways, in height and in turning, in radians
_SLOPE = 0.04  # from this far away the hand comes down
_MARGIN = 0.03  # above everything on the way
_STILL, _STUCK = 0.0008, 8  # metres a step, and for how many steps
_PATIENCE = 150  # steps for one movement
_TRIES = 5  # to find a grasp, each from higher up: what is still falling, or leans on the hand, can be held later
_FOOTPRINT = 0.01  # between the points of a thing that is about to be put down


class Goal(msgspec.Struct, frozen=True):
    """A predicate of the goal, and whether it holds: ``thing``, now at ``at``, belongs in or on ``place``.

    ``bottom`` is the height of the thing's lowest point, ``held`` says that both fingers touch it; ``there`` is the
    middle of the place and ``room`` half its extent in x and y, (0, 0) where it is a thing itself. A predicate of one
    name has no place.
    """

    predicate: str
    holds: bool
    thing: str
    place: str = ""
    at: Point = (0.0, 0.0, 0.0)
    bottom: float = 0.0
    held: bool = False
    there: Point = (0.0, 0.0, 0.0)
    room: tuple[float, float] = (0.0, 0.0)


class Scene(msgspec.Struct, frozen=True):
    """Shoulder, point between the fingertips, unit vectors along which the fingers close and point, and the goal."""

    shoulder: Point
    hand: Point
    closing: Point
    forward: Point
    goals: list[Goal]


class World(Protocol):
    """What the expert asks of a simulator."""

    def scene(self) -> Scene: ...
    def heights(self, places: Floats, thing: str, absent: bool = False) -> tuple[Floats, NDArray[np.bool_]]: ...
    def gripper_opening(self) -> float: ...


class _LostError(Exception):
    """Things are not as they should be: start again."""


class PickAndPlace:
    """Answers, step by step, with actions float32 (7,) that reach the goal from whatever state the world is in.

    Raises GivenUpError where a thing cannot be held as it lies.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._scene = world.scene()
        self._speed = np.zeros(3)  # metres in the last step
        self._in_vain = 0  # tries in a row to find a grasp
        self._script = self._run()

    def __call__(self) -> Action:
        """The action for the state that the world is in now."""
        before, self._scene = self._scene, self._world.scene()
        self._speed = np.subtract(self._scene.hand, before.hand)
        return next(self._script)

    # -- the script: every function yields actions until its part is done ----------------------------

    def _run(self) -> Iterator[Action]:
        while True:
            waiting = [index for index, goal in enumerate(self._scene.goals) if goal.place and not goal.holds]
            try:
                if waiting:
                    yield from self._deliver(waiting[0])
                else:
                    yield self._action(np.zeros(3), self._yaw, OPEN)
            except _LostError:
                yield from self._rise(OPEN)

    def _deliver(self, index: int) -> Iterator[Action]:
        if not self._scene.goals[index].held:
            yield from self._pick(index)
        yield from self._put(index)
        yield from self._rise(OPEN)

    def _pick(self, index: int) -> Iterator[Action]:
        yield from self._settle(index)
        goal = self._scene.goals[index]
        carry = np.append(self._target(index), goal.there[2]) - (*goal.at[:2], goal.bottom)
        chosen = self._grasp(goal, carry)
        if chosen is None:
            self._in_vain += 1
            if self._in_vain == _TRIES:
                raise GivenUpError(f"{goal.thing} cannot be held as it lies")
            raise _LostError
        self._in_vain = 0

        def moved() -> Floats:
            return np.subtract(self._scene.goals[index].at, goal.at)

        above = self._height_on_the_way(chosen.position[:2], goal.thing, False, grasp.TIP)
        # A thing that settles is followed, one that is pushed away is looked at again.
        yield from self._move(
            lambda: chosen.position + moved(), above, chosen.yaw, OPEN, lambda: bool(np.linalg.norm(moved()) < 0.02)
        )
        yield from self._close()
        yield from self._rise(CLOSED)  # what slips does so now, before its extent below the hand matters
        if not self._scene.goals[index].held:
            raise _LostError

    def _put(self, index: int) -> Iterator[Action]:
        goal, hand = self._scene.goals[index], np.array(self._scene.hand)
        target = self._target(index)
        end = target + hand[:2] - goal.at[:2]
        above = self._height_on_the_way(end, goal.thing, True, max(grasp.TIP, hand[2] - goal.bottom))
        low = self._height_to_release(goal, target, end)

        def aim() -> Floats:
            return np.append(target + np.subtract(self._scene.hand, self._scene.goals[index].at)[:2], low)

        yield from self._move(aim, max(above, low), self._yaw, CLOSED, lambda: self._scene.goals[index].held)
        yield from self._open()

    def _settle(self, index: int) -> Iterator[Action]:
        """Until the thing has come to rest: what tips over is held in another way afterwards."""
        for _ in range(_STUCK * 2):
            before = self._scene.goals[index].at
            yield self._action(np.zeros(3), self._yaw, OPEN)
            if np.linalg.norm(np.subtract(self._scene.goals[index].at, before)) < _STILL:
                return

    def _rise(self, grip: float) -> Iterator[Action]:
        """Straight up, out of what is around the fingers."""
        aim = np.add(self._scene.hand, [0.0, 0.0, 0.08])
        for _ in range(_STUCK * 2):
            if self._scene.hand[2] > aim[2] - 0.01:
                return
            yield self._action(aim - self._scene.hand, self._yaw, grip)

    def _move(
        self, aim: Callable[[], Floats], above: float, yaw: float, grip: float, well: Callable[[], bool]
    ) -> Iterator[Action]:
        """To `aim`: sideways only at the height `above`, down only when nearly there, as far as it can."""
        still, unwell = 0, 0
        for _ in range(_PATIENCE):
            hand = np.array(self._scene.hand)
            error = aim() - hand
            far, turn = float(np.hypot(*error[:2])), abs(grasp.angle(yaw - self._yaw))
            if far < _NEAR and abs(error[2]) < _LEVEL and turn < _TURNED:
                return
            unwell = 0 if well() else unwell + 1
            still = still + 1 if turn < _TURNED and np.linalg.norm(self._speed) < _STILL else 0
            if still > _STUCK and far < 3 * _NEAR and hand[2] < above - 0.01:
                return
            if still > _STUCK or unwell > 3:
                raise _LostError
            # A funnel stands over the aim, as wide as the hand has yet to move or to turn; the hand stays on it.
            wide = np.clip(max((far - _NEAR) / _SLOPE, (turn - _TURNED) / 0.2), 0, 1)
            climb = error[2] + wide * (above - hand[2] - error[2])
            sideways = np.clip(1.5 - climb / 0.03, 0, 1)
            yield self._action(np.array([*(error[:2] * sideways), climb]), yaw, grip)
        raise _LostError

    def _close(self) -> Iterator[Action]:
        """Until the fingers have stopped; one that pushes the thing to the other may pause."""
        still = 0
        for step in range(30):
            before = self._world.gripper_opening()
            yield self._action(np.zeros(3), self._yaw, CLOSED)
            still = still + 1 if step > 2 and abs(self._world.gripper_opening() - before) < 0.005 else 0
            if still == 3:
                return

    def _open(self) -> Iterator[Action]:
        """Until the fingers are well off."""
        start = self._world.gripper_opening()
        for _ in range(12):
            if self._world.gripper_opening() > min(start + 0.4, 0.95):
                return
            yield self._action(np.zeros(3), self._yaw, OPEN)

    # -- where to ------------------------------------------------------------------------------------

    def _grasp(self, goal: Goal, carry: Floats) -> Grasp | None:
        centre = np.array(goal.at[:2])
        height, own = self._world.heights(Heights.places(centre), goal.thing)
        side = int(np.sqrt(len(height)))
        seen = Heights(centre, height.reshape(side, side), own.reshape(side, side))
        return grasp.plan(seen, self._yaw, np.array(self._scene.shoulder), carry)

    def _target(self, index: int) -> Floats:
        """Where the thing shall be, x and y: the middle of its place, or its share of it where things share one."""
        goal = self._scene.goals[index]
        sharing = [number for number, other in enumerate(self._scene.goals) if other.place == goal.place]
        place, axis = np.array(goal.there[:2]), int(np.argmax(goal.room))
        place[axis] += goal.room[axis] * ((2 * sharing.index(index) + 1) / len(sharing) - 1)
        return place

    def _height_on_the_way(self, end: Floats, thing: str, absent: bool, below: float) -> float:
        """The height for what reaches `below` the hand to clear everything up to `end`, as far as the arm is able."""
        start = np.array(self._scene.hand[:2])
        way = np.linspace(start, end, 2 + int(np.linalg.norm(end - start) / 0.02))
        lanes = [[x, y] for x in (-0.06, 0.0, 0.06) for y in (-0.06, 0.0, 0.06)]
        points = (way[:, None] + np.array(lanes)).reshape(-1, 2)
        clear = float(self._world.heights(points, thing, absent)[0].max()) + below + _MARGIN
        able = grasp.ceiling(way, np.array(self._scene.shoulder))
        # Noise can have led the hand to where the arm would not bring it by itself: it stays as high as it is.
        return min(clear, float(np.where(np.isfinite(able), able, self._scene.hand[2]).min()))

    def _height_to_release(self, goal: Goal, target: Floats, end: Floats) -> float:
        """How high the hand is when the thing just does not touch, and neither palm nor fingers touch anything."""
        line = np.arange(-0.12, 0.121, _FOOTPRINT)
        places = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
        own = self._world.heights(places + goal.at[:2], goal.thing)[1]

        def highest(points: Floats) -> float:
            return float(self._world.heights(points, goal.thing, absent=True)[0].max())

        footprint = target + (places[own] if own.any() else np.zeros((1, 2)))
        rest = highest(footprint) + self._scene.hand[2] - goal.bottom
        under_hand = max(
            highest(end + grasp.palm(self._yaw)) - grasp.PALM, highest(end + grasp.fingers(self._yaw)) + grasp.TIP
        )
        return max(rest, under_hand) + _LEVEL

    # -- one action ----------------------------------------------------------------------------------

    @property
    def _yaw(self) -> float:
        x, y, _ = self._scene.closing
        return float(np.arctan2(y, x))

    def _action(self, move: Floats, yaw: float, grip: float) -> Action:
        """Move by `move`, point down and turn to `yaw`."""
        turn = np.cross(self._scene.forward, [0.0, 0.0, -1.0])
        turn[2] = grasp.angle(yaw - self._yaw)
        action = np.concatenate([(move * _GAIN - self._speed * _DAMPING) / _LENGTH, turn * _GAIN / _TURN, [grip]])
        return np.clip(action, -1.0, 1.0).astype(np.float32)

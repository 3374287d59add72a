"""The last look at what goes to the robot: limits on every action, and cameras that have frozen.

Each value of an action is an axis with limits of its own, from a TOML file or from the training statistics:

    frozen_after = 10
    [[axes]]
    name = "hand_dx"
    kind = "displacement"                # position | displacement | gripper
    low = -1.0                           # bounds of the command, in its own units
    high = 1.0
    max_speed = 60.0                     # units a second
    max_jerk = 50000.0                   # units a second^3
    workspace = { state = "hand_x", scale = 0.01, low = -0.3, high = 0.3 }   # of the state; 1 unit = scale
    [[axes]]
    name = "gripper"
    kind = "gripper"
    low = -1.0
    high = 1.0
    debounce = 3                         # a switch counts when asked for 3 steps in a row

An action within the limits passes unchanged; what is changed is counted by axis and rule. Where two rules conflict the
workspace comes first: at its border an axis stops at once, whatever the jerk.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitvla.config import Record, load_toml
from bitvla.errors import BitvlaError
from bitvla.serve.schedule import Kind


class Workspace(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of the state that an axis moves. `scale`: units of state in one unit of action."""

    state: str
    scale: float = 1.0
    low: float
    high: float


class Axis(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of one value of an action; see the module for units."""

    name: str
    kind: Kind
    low: float
    high: float
    max_speed: float = math.inf
    max_jerk: float = math.inf
    workspace: Workspace | None = None
    debounce: int = 1


class Limits(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All axes in the order of the action. `frozen_after`: so many observations with the same image, while the robot
    is told to move, end the run; None: cameras are not watched."""

    axes: tuple[Axis, ...]
    frozen_after: int | None = 10


def load_limits(path: Path) -> Limits:
    """Limits from a TOML file; BitvlaError names what is wrong with it."""
    return load_toml(Limits, path)


def limits_from(info: Mapping[str, Any], actions: Sequence[Kind], margin: float = 0.1) -> Limits:
    """The range of the training actions that `policy.info()` tells, widened by `margin` of its span on both sides.

    Knows neither workspace nor jerk: statistics do not tell which state an action moves.
    """
    names, trained = info["action"]["names"], info.get("action_range")
    if trained is None:
        raise BitvlaError("the server does not tell the range of the training actions; give the limits in a file")
    if len(actions) != len(names):
        raise BitvlaError(f"{len(actions)} kinds of action are given, the policy has {len(names)} values")
    axes = []
    for name, kind, low, high in zip(names, actions, trained["low"], trained["high"], strict=True):
        room = margin * (high - low) if math.isfinite(high - low) else 0.0
        axes.append(Axis(name=name, kind=kind, low=low - room, high=high + room))
    return Limits(axes=tuple(axes))


class Guard:
    """Makes actions safe, one control step after the other.

    Args:
        control_hz: the rate at which actions come; speed and jerk are limited for it.
        state_names: names of the observation's state, for workspaces.

    Raises:
        BitvlaError: limits that cannot be, or a state that is not there.
    """

    def __init__(self, limits: Limits, control_hz: float, state_names: Sequence[str] = ()) -> None:
        names = tuple(state_names)
        for axis in limits.axes:
            _check(axis, names)
        if limits.frozen_after is not None and limits.frozen_after < 1:
            raise BitvlaError(f"guard: frozen_after {limits.frozen_after} is not at least 1")
        self.counts: Counter[str] = Counter()
        self._axes = [
            _Gripper(axis) if axis.kind == "gripper" else _Motion(axis, control_hz, names) for axis in limits.axes
        ]
        self._cameras = _Cameras(limits.frozen_after)

    def observe(self, observation: dict[str, Any]) -> None:
        """Learn where the robot is. BitvlaError if a camera has frozen while the robot was told to move, or if the
        state does not tell the place of an axis with a workspace."""
        self._cameras.see(observation["images"])
        for axis in self._axes:
            axis.observe(observation["state"])

    def __call__(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """The action float32 (dim,) that may be sent. BitvlaError, and nothing to send, if one is not finite."""
        if action.shape != (len(self._axes),) or not np.isfinite(action).all():
            raise BitvlaError(f"the guard refuses the action {action!r}: {len(self._axes)} finite numbers are needed")
        if lost := [axis.name for axis in self._axes if not axis.located]:
            raise BitvlaError(f"the guard does not know where '{lost[0]}' is: call observe(observation) first")
        safe = action.copy()
        for index, axis in enumerate(self._axes):
            value, rule = axis.limit(float(action[index]))
            if rule:
                safe[index] = value
                self.counts[f"{axis.name}: {rule}"] += 1
        self._cameras.moving |= any(axis.moving for axis in self._axes)
        return safe

    def rest(self) -> None:
        """The robot was told to hold: whatever comes next starts from standing still."""
        for axis in self._axes:
            axis.rest()

    def report(self) -> dict[str, int]:
        """Steps in which a rule changed an axis, by "axis: rule", most frequent first."""
        return dict(self.counts.most_common())


def _check(axis: Axis, state_names: tuple[str, ...]) -> None:
    place = axis.workspace
    rules = [
        (axis.low < axis.high, f"low {axis.low} is not below high {axis.high}"),
        (axis.max_speed > 0 and axis.max_jerk > 0, f"max_speed {axis.max_speed} and max_jerk {axis.max_jerk} must be "
         "positive"),
        (axis.kind != "displacement" or axis.low <= 0 <= axis.high, f"low {axis.low} and high {axis.high} do not let "
         "it stand still"),
        (axis.kind != "gripper" or (place is None and min(axis.max_speed, axis.max_jerk) == math.inf), "a gripper has "
         "low, high and debounce only"),
        (axis.debounce >= 1 and (axis.kind == "gripper" or axis.debounce == 1), f"debounce {axis.debounce} is for "
         "grippers, from 1"),
        (axis.kind != "position" or min(axis.max_speed, axis.max_jerk) == math.inf or place is not None, "max_speed "
         "and max_jerk of a position need a workspace, which says where the robot is"),
        (place is None or (place.low < place.high and math.isfinite(place.scale) and place.scale != 0), "its workspace "
         "needs low below high and a scale that is not 0"),
        (place is None or place.state in state_names, f"its workspace names the state '{place and place.state}'; "
         f"there is {', '.join(state_names) or 'none'}"),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise BitvlaError(f"guard, axis '{axis.name}': {message}")


class _Motion:
    """An axis that moves. In units of action: place p, motion v a step, its change a; |change of a| <= jerk.

    A change of motion is only allowed if it can be ended, at the allowed jerk, before the speed limit; so there always
    is an allowed next motion.
    """

    def __init__(self, axis: Axis, control_hz: float, state_names: tuple[str, ...]) -> None:
        self.name, self.moving = axis.name, False
        self._absolute = axis.kind == "position"
        self._jerk = axis.max_jerk / control_hz**3
        speed = axis.max_speed / control_hz
        bounds = (-math.inf, math.inf) if self._absolute else (axis.low, axis.high)
        self._slowest, self._fastest = max(bounds[0], -speed), min(bounds[1], speed)
        self._low, self._high = (axis.low, axis.high) if self._absolute else (-math.inf, math.inf)
        self._state, self._scale, self._states = None, 1.0, len(state_names)
        if (place := axis.workspace) is not None:
            self._state, self._scale = state_names.index(place.state), place.scale
            ends = sorted((place.low / place.scale, place.high / place.scale))
            self._low, self._high = max(self._low, ends[0]), min(self._high, ends[1])
            if not self._low < self._high:
                raise BitvlaError(f"guard, axis '{axis.name}': its workspace has nothing between its low and high")
        self._place: float | None = None
        self._v = self._a = 0.0

    @property
    def located(self) -> bool:
        return self._state is None or self._place is not None

    def observe(self, state: NDArray[np.float32]) -> None:
        # The place of a position axis is its last command, which the robot follows; only at first is it observed.
        if self._state is not None and (self._place is None or not self._absolute):
            if len(state) != self._states or not math.isfinite(state[self._state]):
                raise BitvlaError(f"the guard does not know where '{self.name}' is: the state is {state}")
            self._place = float(state[self._state]) / self._scale

    def limit(self, value: float) -> tuple[float, str]:
        """The nearest allowed command and the rule that changed it ("" for none)."""
        if self._absolute and self._place is None:  # nothing is known yet but the bounds
            self._place = min(max(value, self._low), self._high)
            return self._place, "" if self._place == value else "workspace"
        place = self._place or 0.0
        origin = place if self._absolute else 0.0  # the command that stands still
        v, rule = self._within_speed_and_jerk(value - origin)
        command = origin + v if rule else value
        # Outside already (pushed, or started there): only the way back is open.
        if self._absolute:
            low, high = min(self._low, place), max(self._high, place)
        else:
            low, high = min(self._low - place, 0.0), max(self._high - place, 0.0)
        stopped = not low <= command <= high
        command, rule = (min(max(command, low), high), "workspace") if stopped else (command, rule)
        command = _toward(command, origin) if rule else command
        v = command - origin
        self._a = 0.0 if stopped else v - self._v
        self._v, self.moving = v, abs(v) > 0
        if self._place is not None:
            self._place = command if self._absolute else place + v
        return command, rule

    def _within_speed_and_jerk(self, wanted: float) -> tuple[float, str]:
        most = self._v + min(self._a + self._jerk, _largest_change(self._fastest - self._v, self._jerk))
        least = self._v + max(self._a - self._jerk, -_largest_change(self._v - self._slowest, self._jerk))
        v = min(max(wanted, least), most)
        if v == wanted:
            return v, ""
        return v, "speed" if wanted > self._fastest or wanted < self._slowest else "jerk"

    def rest(self) -> None:
        self._v = self._a = 0.0


def _largest_change(room: float, jerk: float) -> float:
    """The largest a with a + (a - jerk) + (a - 2 jerk) + ... <= room, over the positive terms."""
    room = max(room, 0.0)
    if math.isinf(jerk) or math.isinf(room):
        return room
    terms = math.floor((math.sqrt(1 + 8 * room / jerk) - 1) / 2)
    return (room + jerk * terms * (terms + 1) / 2) / (terms + 1)


def _toward(value: float, rest: float) -> float:
    """`value` as a float32, rounded toward `rest`, so that rounding does not leave the limits."""
    rounded = np.float32(value)
    if abs(float(rounded) - rest) > abs(value - rest):
        rounded = np.nextafter(rounded, np.float32(rest))
    return float(rounded)


class _Gripper:
    """An axis that opens and closes: a change of side is passed on when it was asked for `debounce` times in a row."""

    moving, located = False, True

    def __init__(self, axis: Axis) -> None:
        self.name = axis.name
        self._low, self._high, self._debounce = axis.low, axis.high, axis.debounce
        self._middle = (axis.low + axis.high) / 2 if math.isfinite(axis.high - axis.low) else 0.0
        self._value: float | None = None
        self._asked = 0

    def observe(self, state: NDArray[np.float32]) -> None:
        """A gripper's limits do not depend on the state."""

    def limit(self, value: float) -> tuple[float, str]:
        inside = min(max(value, self._low), self._high)
        switches = self._value is not None and (inside > self._middle) != (self._value > self._middle)
        self._asked += switches
        if switches and self._asked < self._debounce:
            assert self._value is not None
            return self._value, "debounce"
        self._asked, self._value = 0, inside
        return inside, "" if inside == value else "range"

    def rest(self) -> None:
        """A gripper holds what it was told."""


class _Cameras:
    """Finds a camera that shows the same image again and again while the robot is told to move."""

    def __init__(self, frozen_after: int | None) -> None:
        self._after = frozen_after
        self._images: dict[str, NDArray[np.uint8]] = {}
        self._same: Counter[str] = Counter()
        self.moving = False

    def see(self, images: dict[str, NDArray[np.uint8]]) -> None:
        if self._after is None:
            return
        for name, image in images.items():
            same = name in self._images and np.array_equal(image, self._images[name])
            # A robot that stands still may well see the same again: that says nothing.
            self._same[name] = self._same[name] + self.moving if same else 0
            self._images[name] = np.array(image)
            if self._same[name] >= self._after:
                raise BitvlaError(
                    f"camera '{name}' has shown the same image {self._same[name] + 1} times while the robot was told "
                    "to move: it is frozen; check the camera and its cable"
                )
        self.moving = False

"""The expert for LIBERO against a world of boxes and bowls in memory: where it grasps, its phases, its recoveries."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from bitvla.sim.base import GivenUpError
from bitvla.sim.libero import grasp
from bitvla.sim.libero.expert import Goal, PickAndPlace, Scene
from bitvla.sim.libero.grasp import Heights

TABLE = 0.9
LIMIT = 220
SHOULDER = (-0.6, 0.0, TABLE + 0.34)


@dataclass
class Thing:
    """A solid of the given `height`, or a bowl where it has a `wall`; `at` is the middle of its bottom."""

    at: list[float]
    half: tuple[float, float]
    height: float
    wall: float = 0.0
    yaw: float = 0.0

    def top(self, places):
        """Heights of its upper surface at `places` (P, 2); -inf beside it."""
        x, y = (places - self.at[:2]).T
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        along, across = cos * x + sin * y, cos * y - sin * x
        if not self.wall:
            inside = (np.abs(along) <= self.half[0]) & (np.abs(across) <= self.half[1])
            return np.where(inside, self.at[2] + self.height, -np.inf)
        radius = np.hypot(along, across)
        bottom = np.where(radius <= self.half[0], self.at[2] + 0.01, -np.inf)
        return np.where(
            (radius <= self.half[0]) & (radius > self.half[0] - self.wall), self.at[2] + self.height, bottom
        )


@dataclass
class World:
    """A table with things, and a hand that obeys as the robot's controller does; what it lets go of falls."""

    things: dict[str, Thing]
    goals: list[tuple[str, str]]
    hand: list[float] = field(default_factory=lambda: [-0.1, 0.0, TABLE + 0.28])
    yaw: float = -np.pi / 2
    opening: float = 0.04
    held: str = ""
    inertia: float = 0.0  # the share of its speed that the hand keeps
    speed: tuple[float, float, float] = (0.0, 0.0, 0.0)  # metres a step

    def scene(self):
        closing = (np.cos(self.yaw), np.sin(self.yaw), 0.0)
        goals = [self.goal(thing, place) for thing, place in self.goals]
        return Scene(SHOULDER, tuple(self.hand), closing, (0.0, 0.0, -1.0), goals)

    def goal(self, thing, place):
        moved, there = self.things[thing], self.things[place]
        apart = np.abs(np.subtract(moved.at, there.at))
        return Goal(
            "on", bool((apart[:2] < np.maximum(there.half, 0.03)).all() and apart[2] < 0.05), thing, place,
            at=tuple(moved.at), bottom=moved.at[2], held=self.held == thing, there=tuple(there.at), room=there.half,
        )  # fmt: skip

    def heights(self, places, thing, absent=False):
        own = self.things[thing].top(places)
        others = [other.top(places) for name, other in self.things.items() if name != thing]
        rest = np.max([np.full(len(places), TABLE), *others], axis=0)
        return (rest, np.zeros(len(places), bool)) if absent else (np.maximum(rest, own), own > rest)

    def gripper_opening(self):
        return self.opening / 0.08

    def between(self):
        """The widest of each thing's parts that the fingers can touch: {name: width}."""
        line = np.linspace(-0.04, 0.04, 81)
        places = np.array(self.hand[:2]) + line[:, None] * [np.cos(self.yaw), np.sin(self.yaw)]
        parts = {name: line[thing.top(places) > self.hand[2]] for name, thing in self.things.items()}
        return {name: 2 * np.abs(part).max() for name, part in parts.items() if part.size}

    def step(self, action):
        move = np.clip(action, -1, 1)
        shift = self.speed = (1 - self.inertia) * 0.3 * 0.05 * move[:3] + self.inertia * np.array(self.speed)
        self.hand = list(np.add(self.hand, shift))
        self.hand[2] = max(self.hand[2], TABLE + 0.012)
        self.yaw += 0.3 * 0.5 * float(move[5])
        if self.held:
            self.things[self.held].at = list(np.add(self.things[self.held].at, shift))
        if move[6] < 0:
            self.opening = min(0.08, self.opening + 0.01)
            self.drop()
        else:
            touched = self.between()
            width = max(touched.values(), default=0.0)
            self.opening = max(width, self.opening - 0.01)
            self.held = max(touched, key=touched.get) if touched and self.opening == width else ""

    def drop(self):
        if self.held:
            thing, self.held = self.things[self.held], ""
            places = np.array(thing.at[:2]) + np.random.default_rng(0).uniform(-0.01, 0.01, (50, 2))
            others = [other.top(places).max() for other in self.things.values() if other is not thing]
            below = [TABLE, *(z for z in others if z < thing.at[2])]
            thing.at[2] = float(max(below))

    def solved(self):
        return all(self.goal(*names).holds and self.held != names[0] for names in self.goals)


def box(x, y, half=(0.02, 0.04), height=0.06, **more):
    return Thing([x, y, TABLE], half, height, **more)


def plate(x, y):
    return Thing([x, y, TABLE], (0.03, 0.03), 0.01)


def run(world, limit=LIMIT, meanwhile=lambda world, step: None):
    """Steps that the expert took; `limit` where it did not get there."""
    expert = PickAndPlace(world)
    for step in range(limit):
        if world.solved():
            return step
        meanwhile(world, step)
        action = expert()
        assert action.shape == (7,)
        assert action.dtype == np.float32
        assert np.isfinite(action).all()
        assert (np.abs(action) <= 1).all()
        world.step(action)
    return limit


def plan(things, name, yaw=-np.pi / 2, carry=(0, 0, 0)):
    world, centre = World(things, []), np.array(things[name].at[:2])
    height, own = world.heights(Heights.places(centre), name)
    side = int(np.sqrt(height.size))
    return grasp.plan(
        Heights(centre, height.reshape(side, side), own.reshape(side, side)), yaw, np.array(SHOULDER), np.array(carry)
    )


@pytest.mark.parametrize("yaw", [0.0, 0.5, 1.3])
def test_a_box_is_held_across_its_narrow_side_in_its_middle(yaw):
    found = plan({"box": box(0.1, 0.2, yaw=yaw)}, "box")
    assert np.linalg.norm(found.position[:2] - (0.1, 0.2)) < 0.012
    assert abs(np.sin(found.yaw - yaw)) < np.sin(0.3)  # the fingers turn it by the rest
    assert TABLE + grasp.TIP <= found.position[2] < TABLE + 0.06 - 0.006


def test_what_is_too_wide_is_held_at_its_rim():
    found = plan({"bowl": box(0, 0, (0.06, 0.06), 0.06, wall=0.006)}, "bowl")
    outwards = found.position[:2] / np.linalg.norm(found.position[:2])
    assert abs(np.linalg.norm(found.position[:2]) - 0.057) < 0.006
    assert abs(outwards @ [np.cos(found.yaw), np.sin(found.yaw)]) > 0.95


def test_what_is_too_wide_and_has_no_rim_cannot_be_held():
    assert plan({"box": box(0, 0, (0.06, 0.06))}, "box") is None


@pytest.mark.parametrize("yaw", [0.2, 1.5, -1.5, -3.0])
def test_the_wrist_stays_within_a_quarter_turn_of_its_rest(yaw):
    """Wherever it is turned to now, and however the thing lies."""
    for way in (0.0, 0.7, 1.4, 2.1, 2.8):
        found = plan({"box": box(0.1, 0.2, yaw=way)}, "box", yaw)
        assert -np.pi - 1e-9 <= found.yaw <= 1e-9


def test_a_bowl_at_the_end_of_the_reach_is_held_at_its_near_side():
    bowl = box(0.1, -0.15, (0.06, 0.06), 0.06, wall=0.006)
    found = plan({"bowl": bowl}, "bowl")
    assert np.hypot(*(found.position[:2] - SHOULDER[:2])) < np.hypot(*np.subtract(bowl.at[:2], SHOULDER[:2]))
    assert plan({"box": box(0.3, 0.0)}, "box") is None
    assert plan({"box": box(0.0, 0.0)}, "box") is not None
    assert plan({"box": box(0.0, 0.0)}, "box", carry=(0.3, 0, 0)) is None


def test_what_is_low_and_far_is_out_of_reach():
    """The wrist must come down too: at the height of the shoulder it would get there."""
    far = box(0.205, 0.0, (0.02, 0.02))
    assert plan({"box": far}, "box") is None
    far.at[2] += 0.1
    assert plan({"box": far}, "box") is not None
    assert plan({"box": far}, "box", carry=(0, 0, -0.1)) is None


def test_fingers_go_where_there_is_room():
    """A square box between two walls: only the direction along the walls is free."""
    walls = {"left": box(0, -0.05, (0.1, 0.02), 0.1), "right": box(0, 0.05, (0.1, 0.02), 0.1)}
    found = plan({"box": box(0, 0, (0.02, 0.02), 0.09), **walls}, "box")
    assert abs(np.cos(found.yaw)) > 0.9


def test_the_palm_stays_above_what_is_beside_the_thing():
    near = {"wall": box(0.09, 0, (0.02, 0.1), 0.08)}
    alone, beside = plan({"box": box(0, 0)}, "box"), plan({"box": box(0, 0), **near}, "box")
    along = abs(np.cos(beside.yaw)) * 0.105 > 0.07
    assert beside.position[2] >= (TABLE + 0.08 - grasp.PALM if along else alone.position[2])


@pytest.mark.parametrize("x", [0.025, 0.035, 0.045, 0.055])
def test_the_palm_stays_above_what_is_thin(x):
    """As a bottle's neck, 12 mm wide, wherever under the palm it stands."""
    for y in (-0.02, -0.01, 0.0, 0.01, 0.02):
        found = plan({"box": box(0, 0, (0.015, 0.06)), "neck": box(x, y, (0.006, 0.006), 0.15)}, "box")
        away, (cos, sin) = np.subtract((x, y), found.position[:2]), (np.cos(found.yaw), np.sin(found.yaw))
        under_palm = abs(away @ (cos, sin)) < 0.1 and abs(away @ (-sin, cos)) < 0.03
        assert not under_palm or found.position[2] + grasp.PALM >= TABLE + 0.15


def test_a_thing_is_carried_to_its_place():
    world = World({"box": box(0.1, 0.15, yaw=0.4), "plate": plate(0, -0.2)}, [("box", "plate")])
    assert run(world) < LIMIT / 2
    assert np.linalg.norm(np.subtract(world.things["box"].at[:2], world.things["plate"].at[:2])) < 0.01


def test_a_bowl_is_carried_by_its_rim_and_its_middle_counts():
    bowl = box(0.1, 0.1, (0.06, 0.06), 0.06, wall=0.006)
    world = World({"bowl": bowl, "plate": plate(0, -0.2)}, [("bowl", "plate")])
    assert run(world) < LIMIT / 2
    assert np.linalg.norm(np.subtract(bowl.at[:2], world.things["plate"].at[:2])) < 0.01


def test_a_dropped_thing_is_picked_up_again():
    world = World({"box": box(0.1, 0.15), "plate": plate(0, -0.2)}, [("box", "plate")])
    drops = []

    def slip(world, step):
        if world.held and world.hand[1] < 0.05 and not drops:
            drops.append(step)
            world.drop()

    assert run(world, meanwhile=slip) < LIMIT
    assert drops


def test_a_thing_that_is_pushed_away_is_followed():
    world = World({"box": box(0.1, 0.15), "plate": plate(0, -0.2)}, [("box", "plate")])

    def push(world, step):
        if step == 15:
            world.things["box"].at[:2] = [0.0, 0.05]

    assert run(world, meanwhile=push) < LIMIT


def test_a_thing_that_settles_is_followed():
    world = World({"box": box(0.1, 0.15), "plate": plate(0, -0.2)}, [("box", "plate")])
    world.things["box"].at[2] += 0.018

    def settle(world, step):
        if step == 5:
            world.things["box"].at[2] -= 0.018

    assert run(world, meanwhile=settle) < LIMIT / 2


def test_a_thing_that_tips_over_is_held_as_it_lies_then():
    world = World({"box": box(0.1, 0.15), "plate": plate(0, -0.2)}, [("box", "plate")])
    thing, closed = world.things["box"], []

    def tip(world, step):
        if step < 6:
            thing.yaw += np.pi / 12
            thing.at[1] += 0.003
        if world.held:
            closed.append(world.yaw)

    assert run(world, meanwhile=tip) < LIMIT / 2
    assert abs(np.sin(closed[0] - thing.yaw)) < np.sin(0.3)


def test_a_hand_that_is_slow_to_brake_does_not_shoot_past_the_thing():
    world = World({"box": box(0.1, 0.15), "plate": plate(0, -0.2)}, [("box", "plate")], inertia=0.75)
    past = []

    def look(world, _):
        if not world.held and world.opening == 0.08:
            past.append(world.hand[0] - 0.1)

    assert run(world, meanwhile=look) < LIMIT / 2
    assert max(past) < 0.006


def test_what_cannot_be_held_is_given_up_but_not_at_once():
    def world():
        return World({"box": box(0.3, 0.0), "plate": plate(0, -0.2)}, [("box", "plate")])

    def fall(world, step):
        if step == 15:
            world.things["box"].at[:2] = [0.1, 0.0]

    with pytest.raises(GivenUpError, match="box cannot be held as it lies"):
        run(world())
    assert run(world(), meanwhile=fall) < LIMIT


def test_it_starts_with_what_is_already_in_the_hand():
    box_in_hand = box(-0.1, 0.0, (0.04, 0.02))
    box_in_hand.at[2] = TABLE + 0.25
    world = World({"box": box_in_hand, "plate": plate(0, -0.2)}, [("box", "plate")], held="box")
    world.opening = 0.04
    held = []
    assert run(world, meanwhile=lambda world, _: held.append(world.held)) < LIMIT / 2
    assert set(held[:10]) == {"box"}  # carried on, not dropped


def test_things_that_share_a_place_get_their_own_part_of_it():
    basket = Thing([0, -0.2, TABLE], (0.06, 0.05), 0.002)
    things = {"first": box(0.1, 0.15), "second": box(-0.05, 0.2), "basket": basket}
    world = World(things, [("first", "basket"), ("second", "basket")])
    assert run(world, limit=2 * LIMIT) < 2 * LIMIT
    assert things["first"].at[0] == pytest.approx(-0.03, abs=0.01)
    assert things["second"].at[0] == pytest.approx(0.03, abs=0.01)


def test_a_held_thing_clears_what_is_on_the_way():
    wall = box(0, 0, (0.3, 0.02), 0.15)
    world = World({"box": box(0.1, 0.15), "plate": plate(0, -0.2), "wall": wall}, [("box", "plate")])
    above = []

    def look(world, _):
        if world.held and abs(world.hand[1]) < 0.04:
            above.append(world.things["box"].at[2] - TABLE - wall.height)

    assert run(world, meanwhile=look) < LIMIT
    assert min(above) > 0


def test_noise_does_not_matter():
    rng = np.random.default_rng(0)
    world = World({"box": box(0.1, 0.15), "plate": plate(0, -0.2)}, [("box", "plate")])
    obey = world.step
    world.step = lambda action: obey(action + 0.25 * rng.standard_normal(7) * [1, 1, 1, 0.1, 0.1, 0.1, 0])
    assert run(world) < LIMIT


def test_a_hand_beyond_its_reach_comes_back():
    world = World({"box": box(0.1, 0.15), "plate": plate(0, -0.2)}, [("box", "plate")])
    world.hand = [0.3, 0.15, TABLE + 0.12]
    assert grasp.ceiling(np.array(world.hand[:2]), np.array(SHOULDER)) == -np.inf
    assert run(world) < LIMIT

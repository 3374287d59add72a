"""The action guard: what passes is within the limits, what is within the limits passes.

pytest tests/test_guard.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitvla.errors import BitvlaError
from bitvla.processing.vectors import action_range
from bitvla.serve import guard as guard_module
from bitvla.serve.guard import Axis, Guard, Limits, Workspace, limits_from, load_limits
from checkpoints import tiny_config

HZ = 10.0
EPS = float(np.finfo(np.float32).eps)
# A few roundings of float32 at the largest values that occur here, in each difference.
ROOM = 64 * EPS * 10


def seen(*state: float, image: int = 0) -> dict[str, Any]:
    return {"images": {"wrist": np.full((4, 4, 3), image, np.uint8)}, "state": np.array(state, np.float32)}


def make(*axes: Axis, frozen_after: int | None = None, states: tuple[str, ...] = ("x", "y")) -> Guard:
    return Guard(Limits(axes=axes, frozen_after=frozen_after), HZ, states)


def play(guard: Guard, values: list[float]) -> np.ndarray:
    return np.array([guard(np.array([value], np.float32))[0] for value in values], np.float64)


values = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40)


@given(values, st.floats(0.1, 30), st.floats(0.5, 3000), st.floats(-3, 0, width=32), st.floats(0.125, 3, width=32))
def test_speed_and_jerk_of_a_displacement_stay_within_limits(
    wanted: list[float], speed: float, jerk: float, low: float, high: float
) -> None:
    axis = Axis(name="dx", kind="displacement", low=low, high=high, max_speed=speed, max_jerk=jerk)
    sent = play(make(axis), wanted)
    assert sent.max() <= min(high, speed / HZ) + ROOM
    assert sent.min() >= max(low, -speed / HZ) - ROOM
    # It stood still before.
    assert np.abs(np.diff(np.r_[0, 0, sent], n=2)).max() <= jerk / HZ**3 + ROOM


@given(values, st.floats(0.1, 30), st.floats(0.5, 3000), st.floats(-2, 2, width=32))
def test_speed_and_jerk_of_a_position_stay_within_limits(
    wanted: list[float], speed: float, jerk: float, start: float
) -> None:
    place = Workspace(state="x", low=-100.0, high=100.0)
    axis = Axis(name="x", kind="position", low=-50, high=50, max_speed=speed, max_jerk=jerk, workspace=place)
    guard = make(axis)
    guard.observe(seen(start, 0))
    motion = np.diff(np.r_[start, play(guard, wanted)])
    assert np.abs(motion).max() <= speed / HZ + ROOM
    assert np.abs(np.diff(np.r_[0, 0, motion], n=2)).max() <= jerk / HZ**3 + ROOM


@given(values, st.floats(-3, 3, width=32), st.floats(0.5, 1000), st.sampled_from([0.01, 1.0, -0.5]))
def test_a_displacement_never_leaves_the_workspace(
    wanted: list[float], start: float, jerk: float, scale: float
) -> None:
    place = Workspace(state="y", scale=scale, low=-1.0, high=2.0)
    guard = make(Axis(name="dy", kind="displacement", low=-5, high=5, max_jerk=jerk, workspace=place))
    guard.observe(seen(0, start))
    where = start + scale * np.cumsum(play(guard, wanted))
    # From outside it comes no farther out.
    assert where.max() <= max(2, start) + ROOM
    assert where.min() >= min(-1, start) - ROOM


@given(values, st.floats(-1, 0, width=32), st.floats(0.125, 1, width=32))
def test_a_position_never_leaves_its_bounds(wanted: list[float], low: float, high: float) -> None:
    sent = play(make(Axis(name="x", kind="position", low=low, high=high)), wanted)
    assert sent.min() >= low - ROOM
    assert sent.max() <= high + ROOM
    assert (sent == np.clip(wanted, low, high)).all()


@given(values, st.integers(1, 5))
def test_a_gripper_switches_only_when_asked_often_enough(wanted: list[float], debounce: int) -> None:
    sent = play(make(Axis(name="grip", kind="gripper", low=-1, high=1, debounce=debounce)), wanted)
    inside = np.clip(wanted, -1, 1)
    for n in range(1, len(sent)):
        if (sent[n] > 0) != (sent[n - 1] > 0):
            asked = inside[max(0, n - debounce + 1) : n + 1]
            assert len(asked) == debounce
            assert ((asked > 0) == (sent[n] > 0)).all()
        assert sent[n] in (inside[n], sent[n - 1])


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40))
def test_what_is_within_the_limits_passes_unchanged(turns: list[int]) -> None:
    """Motions built from allowed changes that can be ended before the speed limit."""
    jerk, speed, wanted, v, a = 4 / 64, 1.0, [], 0.0, 0.0
    for turn in turns:
        a_next = a + turn / 64
        if ends_within(v + a_next, a_next, jerk, speed):
            v, a = v + a_next, a_next
        else:  # straighten out
            a = math.copysign(max(0.0, abs(a) - jerk), a)
            v += a
        wanted.append(v)
    axes = {"name": "dx", "low": -1.0, "high": 1.0, "max_speed": speed * HZ, "max_jerk": jerk * HZ**3}
    guard = make(Axis(kind="displacement", workspace=Workspace(state="x", low=-99, high=99), **axes))
    guard.observe(seen(0, 0))
    assert play(guard, wanted).tolist() == wanted
    assert guard.report() == {}


def ends_within(v: float, a: float, jerk: float, speed: float) -> bool:
    while a and abs(v) <= speed:
        a = math.copysign(max(0.0, abs(a) - jerk), a)
        v += a
    return abs(v) <= speed


@given(st.floats(0, 100), st.floats(0.01, 10))
def test_the_largest_change_just_fits(room: float, jerk: float) -> None:
    def reached(a: float) -> float:
        return sum(max(0.0, a - k * jerk) for k in range(1 + math.ceil(a / jerk)))

    largest = guard_module._largest_change(room, jerk)
    assert reached(largest) == pytest.approx(room, rel=1e-9, abs=1e-9)


def test_at_the_border_an_axis_stops_and_stays() -> None:
    place = Workspace(state="x", low=-1.0, high=1.0)
    guard = make(Axis(name="dx", kind="displacement", low=-9, high=9, max_jerk=0.125 * HZ**3, workspace=place))
    guard.observe(seen(0, 0))
    assert play(guard, [9] * 3 + [0] * 3).tolist() == [0.125, 0.375, 0.5, 0, 0, 0]


def test_from_outside_only_the_way_back_is_open_and_nothing_is_forced() -> None:
    guard = make(Axis(name="dx", kind="displacement", low=-1, high=1, workspace=Workspace(state="x", low=0, high=2)))
    guard.observe(seen(5, 0))
    assert play(guard, [0.0, 0.5, -0.5, 0.0, 0.25]).tolist() == [0, 0, -0.5, 0, 0]
    guard.observe(seen(-5, 0))
    assert play(guard, [0.0, -0.5, 0.5, 0.0]).tolist() == [0, 0, 0.5, 0]


def test_what_was_changed_is_counted_and_reported() -> None:
    guard = make(
        Axis(name="dx", kind="displacement", low=-1, high=1, workspace=Workspace(state="x", low=0, high=2.5)),
        Axis(name="grip", kind="gripper", low=-1, high=1, debounce=3),
    )
    guard.observe(seen(0, 0))
    for dx, grip in [(2.0, -1.0), (1.0, 1.0), (1.0, -1.0), (1.0, 9.0), (0.0, 1.0), (0.0, 1.0)]:
        last = guard(np.array([dx, grip], np.float32))
    assert guard.report() == {"grip: debounce": 3, "dx: workspace": 2, "dx: speed": 1}
    assert last.tolist() == [0, 1]


def test_after_resting_it_starts_from_standing_still() -> None:
    guard = make(Axis(name="dx", kind="displacement", low=-1, high=1, max_jerk=0.25 * HZ**3))
    assert play(guard, [1, 1, 1, 1]).tolist() == [0.25, 0.75, 1.0, 1.0]
    guard.rest()
    assert play(guard, [1])[0] == 0.25


def test_an_observation_corrects_where_a_displacement_axis_is() -> None:
    guard = make(Axis(name="dx", kind="displacement", low=-1, high=1, workspace=Workspace(state="x", low=0, high=2)))
    guard.observe(seen(0, 0))
    assert play(guard, [1, 1, 1]).tolist() == [1, 1, 0]
    guard.observe(seen(1.5, 0))
    assert play(guard, [1]).tolist() == [0.5]


@pytest.mark.parametrize("action", [[math.nan], [math.inf], [0, 0], [[0.0]]])
def test_an_action_that_is_none_is_refused(action: Any) -> None:
    with pytest.raises(BitvlaError, match="1 finite numbers are needed"):
        make(Axis(name="dx", kind="displacement", low=-1, high=1))(np.array(action, np.float32))


def test_it_does_not_guess_where_the_robot_is() -> None:
    guard = make(Axis(name="dx", kind="displacement", low=-1, high=1, workspace=Workspace(state="x", low=0, high=2)))
    with pytest.raises(BitvlaError, match="does not know where 'dx' is"):
        guard(np.zeros(1, np.float32))


@pytest.mark.parametrize("state", [(math.nan, 0), (0,), (0, 0, 0)])
@pytest.mark.parametrize("kind", ["displacement", "position"])
def test_a_state_that_tells_no_place_is_refused(kind: Any, state: tuple[float, ...]) -> None:
    guard = make(Axis(name="x", kind=kind, low=-1, high=1, workspace=Workspace(state="x", low=-1, high=1)))
    with pytest.raises(BitvlaError, match="does not know where 'x' is: the state is"):
        guard.observe(seen(*state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 1.0}, "low 1.0 is not below high 1.0"),
        ({"low": math.nan}, "low nan"),
        ({"low": 0.5}, "do not let it stand still"),
        ({"max_speed": 0.0}, "max_speed 0.0"),
        ({"debounce": 2}, "debounce 2 is for grippers"),
        ({"kind": "gripper", "max_jerk": 1.0}, "a gripper has"),
        ({"kind": "position", "max_speed": 1.0}, "says where the robot is"),
        ({"workspace": Workspace(state="z", low=0, high=1)}, "names the state 'z'; there is x, y"),
        ({"workspace": Workspace(state="x", low=1, high=1)}, "needs low below high"),
        ({"workspace": Workspace(state="x", low=0, high=1, scale=0)}, "a scale that is not 0"),
        ({"kind": "position", "workspace": Workspace(state="x", low=1, high=2)}, "has nothing between"),
        (
            {"kind": "position", "workspace": Workspace(state="x", low=-0.2, high=-0.1, scale=-0.1)},
            "has nothing between",
        ),
    ],
)
def test_limits_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BitvlaError, match=f"axis 'dx'.*{message}"):
        make(Axis(**{"name": "dx", "kind": "displacement", "low": -1.0, "high": 1.0} | changes))


def test_limits_from_training_statistics() -> None:
    action = tiny_config().processing.action
    info = {"action": {"names": list(action.names)}, "action_range": action_range(tiny_config().processing)}
    limits = limits_from(info, ["displacement"] * 3 + ["gripper"], margin=0.25)
    assert tuple(axis.name for axis in limits.axes) == action.names
    assert False in action.mask
    for axis, low, high, used in zip(limits.axes, action.low, action.high, action.mask, strict=True):
        room = (high - low) / 4 if used else math.inf
        assert (axis.low, axis.high) == pytest.approx((low - room, high + room))
    with pytest.raises(BitvlaError, match="3 kinds of action are given, the policy has 4"):
        limits_from(info, ["displacement"] * 3)
    with pytest.raises(BitvlaError, match="give the limits in a file"):
        limits_from(info | {"action_range": None}, ["displacement"] * 4)


def test_the_example_of_the_module_loads(tmp_path: Path) -> None:
    text = (guard_module.__doc__ or "").split("\n\n")[2]
    (tmp_path / "limits.toml").write_text("\n".join(line.strip() for line in text.splitlines()))
    limits = load_limits(tmp_path / "limits.toml")
    assert [axis.name for axis in limits.axes] == ["hand_dx", "gripper"]
    assert limits.axes[0].workspace == Workspace(state="hand_x", scale=0.01, low=-0.3, high=0.3)
    (tmp_path / "limits.toml").write_text("[[axes]]\nname = 'x'\nkind = 'position'\nlow = 0\nhigh = 1\nspeed = 3\n")
    with pytest.raises(BitvlaError, match=r"limits.toml: .*speed"):
        load_limits(tmp_path / "limits.toml")


# -- cameras -----------------------------------------------------------------------------


def test_a_camera_that_freezes_while_the_robot_moves_ends_it() -> None:
    guard = make(Axis(name="dx", kind="displacement", low=-1, high=1), frozen_after=3)
    for _ in range(3):
        guard.observe(seen(0, 0, image=5))
        play(guard, [0.5])
    with pytest.raises(BitvlaError, match="camera 'wrist' has shown the same image 4 times"):
        guard.observe(seen(0, 0, image=5))


def test_a_robot_that_stands_still_may_see_the_same() -> None:
    guard = make(Axis(name="dx", kind="displacement", low=-1, high=1), frozen_after=3)
    for _ in range(20):
        guard.observe(seen(0, 0, image=5))
        play(guard, [0.0])
        guard.rest()


def test_a_camera_that_delivers_is_left_alone() -> None:
    guard = make(Axis(name="x", kind="position", low=-1, high=1), frozen_after=1)
    for n in range(20):
        guard.observe(seen(0, 0, image=n % 2))
        play(guard, [n / 20])


def test_a_buffer_that_the_camera_reuses_is_not_mistaken_for_a_frozen_one() -> None:
    guard = make(Axis(name="dx", kind="displacement", low=-1, high=1), frozen_after=1)
    observation = seen(0, 0)
    for n in range(5):
        observation["images"]["wrist"][:] = n
        guard.observe(observation)
        play(guard, [0.5])

"""What a robot looks like to `bitvla run`, and whether a policy fits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitvla.errors import BitvlaError
from bitvla.serve import executor
from bitvla.serve.schedule import Kind


class Robot(executor.Robot, Protocol):
    """A robot, or what stands in for one: with `observe` and `step` of the executor's.

    An observation is {"images": {camera: uint8 (H, W, 3) RGB}, "state": float32 (S,), "instruction": str}.
    """

    @property
    def cameras(self) -> Mapping[str, tuple[int, int]]:
        """Height and width in pixels by name."""
        ...

    @property
    def state_names(self) -> Sequence[str]: ...

    @property
    def action_names(self) -> Sequence[str]: ...

    @property
    def actions(self) -> tuple[Kind, ...] | None:
        """What each value of an action commands; None where that is not known."""
        ...

    def start(self, episode: int) -> None:
        """Get ready for an episode: connect if need be, put the scene in place. `observe` may be called from now on."""
        ...

    def close(self) -> None:
        """Let go of the robot; may be repeated."""
        ...


def check_fits(robot: Robot, info: Mapping[str, Any]) -> None:
    """Raise BitvlaError unless cameras, state and actions of `robot` are those that `policy.info()` tells."""
    if not info["state"]["names"]:
        raise BitvlaError(
            "the policy takes no state, and a robot here always gives one: call it from a loop of your own"
        )
    wanted = _cameras(info)
    if robot.cameras.keys() != wanted.keys():
        odd = min(robot.cameras.keys() ^ wanted.keys())
        raise BitvlaError(
            f"camera '{odd}' is {'missing' if odd in wanted else 'unknown to the policy'}: the policy needs "
            f"{', '.join(wanted)}, the robot has {', '.join(robot.cameras) or 'none'}; give the robot's cameras the "
            "names that the policy was trained with"
        )
    for name, size in wanted.items():
        if robot.cameras[name] != size:
            raise BitvlaError(
                f"camera '{name}' of the robot delivers {_size(robot.cameras[name])}, the policy was trained on "
                f"{_size(size)} (height x width); set the camera to that size"
            )
    for what, names in (("state", robot.state_names), ("action", robot.action_names)):
        if list(names) != list(info[what]["names"]):
            raise BitvlaError(
                f"the {what} of the robot is {', '.join(names)}; the policy was trained with "
                f"{', '.join(info[what]['names'])}: it is for another robot"
            )


def _cameras(info: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {camera["name"]: (camera["height"], camera["width"]) for camera in info["cameras"]}


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def actions_of(names: Sequence[str], otherwise: Kind | None = None) -> tuple[Kind, ...] | None:
    """What actions of these names command, as LeRobot's robots name them, or `otherwise`; None if it is not told."""
    kinds = [_action_of(name) or otherwise for name in names]
    return tuple(kind for kind in kinds if kind) if all(kinds) else None


def contradicts(name: str, kind: Kind) -> bool:
    """Whether an action of this name cannot be of this kind: held as one, it would move."""
    told = "position" if name.endswith(".pos") else _action_of(name)
    return told not in (None, "gripper", kind) and "displacement" in (told, kind)


def _action_of(name: str) -> Kind | None:
    if "gripper" in name:
        return "gripper"
    if name.endswith(".pos"):
        return "position"
    return "displacement" if name.endswith(".vel") or "delta" in name else None


class FakeRobot:
    """No hardware: cameras that see noise, joints at rest, actions that are counted. It fits every policy."""

    def __init__(self, info: Mapping[str, Any], instruction: str) -> None:
        self.cameras = _cameras(info)
        self.state_names, self.action_names = info["state"]["names"], info["action"]["names"]
        self.actions = actions_of(self.action_names, "displacement")
        self.taken = 0
        self._instruction = instruction
        self._noise = np.random.default_rng(0)

    def start(self, episode: int) -> None:
        """It is always ready."""

    def observe(self) -> dict[str, Any]:
        images = {name: self._noise.integers(0, 256, (*size, 3), np.uint8) for name, size in self.cameras.items()}
        state = np.zeros(len(self.state_names), np.float32)
        return {"images": images, "state": state, "instruction": self._instruction}

    def step(self, action: NDArray[np.float32]) -> None:
        self.taken += 1

    def close(self) -> None:
        """Nothing is held."""

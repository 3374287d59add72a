"""A policy, near or far, on a robot, real or simulated; and what was recorded of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitvla.errors import BitvlaError

if TYPE_CHECKING:
    from bitvla.robot.base import Robot

ROBOTS = ("fake", "metaworld", "libero", "lerobot")
_TASKS = {"metaworld": "drawer-open-v3", "libero": "libero_spatial/0"}


def make_robot(
    name: str,
    info: Mapping[str, Any],
    *,
    instruction: str | None = None,
    task: str | None = None,
    seed: int = 0,
    config: Path | None = None,
) -> Robot:
    """The robot `name`, one of `ROBOTS`, for the policy whose `info()` is given. It is not connected yet.

    Args:
        instruction: what to do, where the robot does not say it itself.
        task, seed: of a simulator; its episode i has the initial state of `seed` + i.
        config: TOML file of a LeRobot robot.

    Raises:
        BitvlaError: what this robot needs is missing.
    """
    if name in ("metaworld", "libero"):
        from bitvla.robot.simulated import SimulatedRobot

        if task is None:
            raise BitvlaError(f"--robot {name} needs --task, for example --task {_TASKS[name]}")
        return SimulatedRobot(name, task, info, seed=seed, instruction=instruction)
    if instruction is None:
        raise BitvlaError(f'--robot {name} needs --instruction, for example --instruction "open the drawer"')
    if name == "fake":
        from bitvla.robot.base import FakeRobot

        return FakeRobot(info, instruction)
    if name != "lerobot":
        raise BitvlaError(f"unknown robot '{name}': there is {', '.join(ROBOTS)}")
    from bitvla.robot.lerobot import LeRobotRobot, open_lerobot

    if config is None:
        raise BitvlaError("--robot lerobot needs --robot-config, a TOML file; docs/robot.md shows one")
    return LeRobotRobot(open_lerobot(config), info, instruction)

"""A LeRobot robot (`lerobot.robots.Robot`, of lerobot 0.4 to 0.6), or anything that has its methods, as our robot."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitvla.config import read_toml
from bitvla.errors import BitvlaError
from bitvla.robot.base import actions_of

T = TypeVar("T")


class LeRobotRobot:
    """Speaks to `robot` by its names: vectors come and go in the order of the policy, whatever the robot's own.

    `robot` has observation_features and action_features (names; a camera's value is its shape), connect,
    get_observation, send_action and disconnect. Whatever it raises becomes a BitvlaError.
    """

    def __init__(self, robot: Any, info: Mapping[str, Any], instruction: str) -> None:
        features = robot.observation_features
        self.cameras: dict[str, tuple[int, int]] = {
            name: (shape[0], shape[1]) for name, shape in features.items() if isinstance(shape, tuple)
        }
        self.state_names = _ordered([name for name in features if name not in self.cameras], info["state"]["names"])
        self.action_names = _ordered(list(robot.action_features), info["action"]["names"])
        self.actions = actions_of(self.action_names)
        self._robot, self._instruction = robot, instruction

    def start(self, episode: int) -> None:
        if not self._robot.is_connected:
            self._ask(self._robot.connect)

    def observe(self) -> dict[str, Any]:
        return self._ask(self._observe)

    def _observe(self) -> dict[str, Any]:
        seen = self._robot.get_observation()
        return {
            "images": {name: seen[name] for name in self.cameras},
            "state": np.array([seen[name] for name in self.state_names], np.float32),
            "instruction": self._instruction,
        }

    def step(self, action: NDArray[np.float32]) -> None:
        values = dict(zip(self.action_names, action.tolist(), strict=True))
        self._ask(lambda: self._robot.send_action(values))

    def close(self) -> None:
        if self._robot.is_connected:
            self._ask(self._robot.disconnect)

    def _ask(self, method: Callable[[], T]) -> T:
        try:
            return method()
        except Exception as error:
            raise BitvlaError(f"the robot failed: {type(error).__name__}: {error}") from error


def open_lerobot(path: Path) -> Any:
    """The robot that a TOML file describes with the fields of its LeRobot configuration, not connected yet:

        type = "so101_follower"
        port = "/dev/ttyACM0"
        id = "black"
        [cameras.front]
        type = "opencv"
        index_or_path = 0
        width = 640
        height = 480
        fps = 30

    Raises:
        BitvlaError: the file is wrong, or lerobot is not in this environment.
    """
    described = read_toml(path)
    try:
        import draccus
        import lerobot.cameras
        import lerobot.robots
        from lerobot.utils.import_utils import register_third_party_plugins
    except Exception as error:  # a broken installation raises whatever it likes
        raise BitvlaError(
            f"--robot lerobot needs lerobot in this environment ({error}): pip install lerobot, or install bitvla "
            "into the environment that has it"
        ) from error
    # A type is known once its module is imported; those whose own packages are missing are left out.
    for package in (lerobot.robots, lerobot.cameras):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            with contextlib.suppress(Exception):
                importlib.import_module(module.name)
    register_third_party_plugins()
    try:
        return lerobot.robots.make_robot_from_config(draccus.decode(lerobot.robots.RobotConfig, described))
    except Exception as error:
        raise BitvlaError(f"{path}: {error}") from error


def _ordered(names: list[str], wanted: list[str]) -> list[str]:
    return list(wanted) if sorted(names) == sorted(wanted) else names

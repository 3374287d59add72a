"""A robot of the real `lerobot` (0.4.4) without hardware, for the checks beside this file; an import registers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Where torchvision's compiled operators do not load, it fails only because it describes them to the compiler.
describe = torch.library.register_fake
torch.library.register_fake = lambda *_, **__: lambda function: function
from lerobot.robots import Robot, RobotConfig  # noqa: E402

torch.library.register_fake = describe

STATE = ("hand_x", "hand_y", "hand_z", "gripper_opening")
ACTIONS = ("hand_dx", "hand_dy", "hand_dz", "gripper_effort")


@RobotConfig.register_subclass("noise")
@dataclass
class NoiseConfig(RobotConfig):
    pass


class Noise(Robot):
    """A robot without hardware that counts what it is told."""

    config_class = NoiseConfig
    name = "noise"

    def __init__(self, config: NoiseConfig) -> None:
        super().__init__(config)
        self.random = np.random.default_rng(0)
        self.sent: list[dict[str, float]] = []

    observation_features = dict.fromkeys(STATE, float) | dict.fromkeys(("corner", "wrist"), (128, 128, 3))
    action_features = dict.fromkeys(ACTIONS, float)
    is_connected = is_calibrated = True

    def connect(self, calibrate: bool = True) -> None: ...
    def calibrate(self) -> None: ...
    def configure(self) -> None: ...
    def disconnect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        images = {name: self.random.integers(0, 256, (128, 128, 3), np.uint8) for name in ("corner", "wrist")}
        return {name: float(value) for name, value in zip(STATE, self.random.uniform(0, 0.2, 4), strict=True)} | images

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.sent.append(action)
        return action

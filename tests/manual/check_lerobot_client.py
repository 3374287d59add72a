"""Drive a fake robot with the real robot client of `lerobot` (0.4.4) against a running server.

Not part of the test suite: lerobot pins an older PyTorch than training uses. In an environment of its own:

    pip install 'lerobot[async]==0.4.4'
    bitvla serve src/bitvla/policies/metaworld-mt10-nano.safetensors --protocol lerobot
    python tests/manual/check_lerobot_client.py localhost:8080

It plays chunks at 20 Hz for two seconds: camera images and joint values that are noise, but real messages, threads
and queues of the stock client.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Where torchvision's compiled operators do not load, it fails only because it describes them to the compiler.
describe = torch.library.register_fake
torch.library.register_fake = lambda *_, **__: lambda function: function
from lerobot.async_inference.configs import RobotClientConfig  # noqa: E402
from lerobot.async_inference.robot_client import RobotClient  # noqa: E402
from lerobot.robots import Robot, RobotConfig  # noqa: E402

torch.library.register_fake = describe

import lerobot.async_inference.robot_client as client_module  # noqa: E402

STATE = ("hand_x", "hand_y", "hand_z", "gripper_opening")
ACTIONS = ("hand_dx", "hand_dy", "hand_dz", "gripper_effort")
SECONDS, HZ = 2.0, 20


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


def main(address: str) -> None:
    client_module.make_robot_from_config = Noise
    config = RobotClientConfig(
        policy_type="bitvla",
        pretrained_name_or_path="metaworld-mt10-nano",
        robot=NoiseConfig(),
        actions_per_chunk=16,
        task="open the drawer",
        server_address=address,
        fps=HZ,
    )
    client = RobotClient(config)
    assert client.start(), "the server did not take the instructions; its log has the reason"
    receiver = threading.Thread(target=client.receive_actions, daemon=True)
    receiver.start()
    threading.Timer(SECONDS, client.shutdown_event.set).start()
    start = time.perf_counter()
    client.control_loop(task=config.task)
    client.stop()
    seconds = time.perf_counter() - start
    robot = client.robot
    assert len(robot.sent) > 0.7 * HZ * SECONDS, f"only {len(robot.sent)} actions in {seconds:.1f} s"
    assert all(np.isfinite(list(action.values())).all() and set(action) == set(ACTIONS) for action in robot.sent)
    print(f"the stock client of lerobot played {len(robot.sent)} actions in {seconds:.1f} s at {HZ} Hz")


if __name__ == "__main__":
    main(sys.argv[1])

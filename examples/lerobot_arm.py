"""The loop around a LeRobot-style robot, to begin with on your own: here with hardware that is not there.

    python examples/lerobot_arm.py src/bitvla/policies/metaworld-mt10-nano.safetensors
    python examples/lerobot_arm.py ws://127.0.0.1:8000

Put your `lerobot.robots.Robot` in the place of `Arm`. `bitvla run --robot lerobot` is the same loop as a command.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import bitvla
from bitvla.robot.base import check_fits
from bitvla.robot.lerobot import LeRobotRobot
from bitvla.robot.recorder import Recorder
from bitvla.serve.executor import Executor
from bitvla.serve.guard import Guard, limits_from
from bitvla.serve.schedule import settings_for

ACTIONS = ("displacement", "displacement", "displacement", "gripper")  # what each value of an action commands


class Arm:
    """A hand that moves by what it is told, in centimetres, and two cameras that see noise."""

    def __init__(self) -> None:
        self.place, self.noise = {"hand_x": 0.0, "hand_y": 0.6, "hand_z": 0.2}, np.random.default_rng(0)
        self.observation_features = dict.fromkeys((*self.place, "gripper_opening"), float)
        self.observation_features |= dict.fromkeys(("corner", "wrist"), (128, 128, 3))
        self.action_features = dict.fromkeys(("hand_dx", "hand_dy", "hand_dz", "gripper_effort"), float)
        self.is_connected = False

    def connect(self) -> None:
        self.is_connected = True

    def get_observation(self) -> dict[str, Any]:
        images = {name: self.noise.integers(0, 256, (128, 128, 3), np.uint8) for name in ("corner", "wrist")}
        return {**self.place, "gripper_opening": 1.0, **images}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        for axis in "xyz":
            self.place[f"hand_{axis}"] += 0.01 * action[f"hand_d{axis}"]
        return action

    def disconnect(self) -> None:
        self.is_connected = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="policy file, or address of a server")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--hz", type=float, default=20.0, help="actions a second")
    parser.add_argument("--record", type=Path, help="folder of a dataset")
    arguments = parser.parse_args()

    policy = bitvla.connect(arguments.policy) if "://" in arguments.policy else bitvla.load(arguments.policy)
    info = policy.info()
    robot = LeRobotRobot(Arm(), info, instruction="open the drawer")
    check_fits(robot, info)  # cameras, state and actions by name, before anything moves
    recorder = Recorder(arguments.record, info, arguments.hz, "arm") if arguments.record else None
    executor = Executor(
        policy,
        robot,
        settings_for(info, ACTIONS, control_hz=arguments.hz),
        guard=Guard(limits_from(info, ACTIONS), arguments.hz, info["state"]["names"]),
        recorder=recorder,
    )
    robot.start(0)
    try:
        summary = executor.run(round(arguments.seconds * arguments.hz))
        print(f"{summary.played} actions in {summary.seconds:.1f} s, {summary.gaps} gaps; clipped: {summary.clipped}")
    finally:
        robot.close()
        if recorder:
            recorder.save()


if __name__ == "__main__":
    main()

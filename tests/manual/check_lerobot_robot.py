"""Drive a robot of the real `lerobot` (0.4.4), without hardware, with `bitvla run`. Not part of the test suite:

pip install 'lerobot==0.4.4' && pip install '.[data]'
python tests/manual/check_lerobot_robot.py src/bitvla/policies/metaworld-mt10-nano.safetensors
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import noise_robot  # registers the robot type `noise`, as a plug-in would

from bitvla.cli import main
from bitvla.data.lerobot import LeRobotDataset

AXIS = '[[axes]]\nname = "{}"\nkind = "{}"\nlow = -1.0\nhigh = 1.0\n'


def check(policy: str, *options: str) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "arm.toml").write_text('type = "noise"\n')
    kinds = ("displacement", "displacement", "displacement", "gripper")
    axes = (AXIS.format(name, kind) for name, kind in zip(noise_robot.ACTIONS, kinds, strict=True))
    (folder / "limits.toml").write_text("".join(axes))
    arguments = ["run", policy, "--robot", "lerobot", "--robot-config", str(folder / "arm.toml"), "--seconds", "2"]
    arguments += ["--instruction", "open the drawer", "--hz", "20", "--limits", str(folder / "limits.toml")]
    assert main([*arguments, "--record", str(folder / "data"), *options]) == 0
    print(f"recorded {LeRobotDataset(folder / 'data').num_frames} frames of a robot of lerobot in {folder}")


if __name__ == "__main__":
    check(*sys.argv[1:])

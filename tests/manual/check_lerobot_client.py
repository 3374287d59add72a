"""Drive a fake robot with the real robot client of `lerobot` (0.4.4, or 0.6.1 on Python 3.12) against a running server.

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

import numpy as np
from noise_robot import ACTIONS, Noise, NoiseConfig  # first: it lets lerobot be imported everywhere

# isort: split
import lerobot.async_inference.robot_client as client_module
from lerobot.async_inference.configs import RobotClientConfig

SECONDS, HZ = 2.0, 20


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
    client = client_module.RobotClient(config)
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

"""A small LeRobotDataset of random episodes, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bitvla.data.lerobot import Episode, LeRobotWriter

STATE_NAMES, ACTION_NAMES, HIDDEN_NAMES = ("x", "y", "z"), ("dx", "dy", "dz"), ("ox", "oy")
KEYPOINT_NAMES = ("front.cup.u", "front.cup.v", "front.plate.u", "front.plate.v")
SENTENCES = ("open the drawer", "push the puck")


def random_episode(index: int, length: int = 12, size: int = 16) -> Episode:
    """Actions are a fixed linear function of the state, so that a network can learn them."""
    rng = np.random.default_rng(index)
    state = np.cumsum(rng.normal(size=(length, 3)), axis=0).astype(np.float32)
    return Episode(
        images={"front": rng.integers(0, 255, (length, size, size, 3), dtype=np.uint8)},
        vectors={
            "observation.state": state,
            "action": np.clip(0.3 * state[:, ::-1], -1, 1),
            "observation.environment_state": state[:, :2] * 2,
            "observation.keypoints": rng.uniform(-0.2, 1.2, (length, 4)).astype(np.float32),
        },
        task=SENTENCES[index % 2],
        extra={"recovery": index % 5 == 0},
    )


def make_writer(root: Path, size: int = 16) -> LeRobotWriter:
    return LeRobotWriter(
        root,
        robot_type="test",
        fps=10,
        cameras={"front": (size, size)},
        vectors={
            "observation.state": STATE_NAMES,
            "action": ACTION_NAMES,
            "observation.environment_state": HIDDEN_NAMES,
            "observation.keypoints": KEYPOINT_NAMES,
        },
    )


def write_dataset(root: Path, episodes: int = 30, batch: int = 20) -> Path:
    """A dataset of `episodes` episodes in batches of `batch`."""
    writer = make_writer(root)
    for begin in range(0, episodes, batch):
        writer.append([random_episode(i) for i in range(begin, min(begin + batch, episodes))])
    return root

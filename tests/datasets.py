"""A small LeRobotDataset of random episodes, and conversations about plain pictures, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from bitvla.data.lerobot import Episode, LeRobotWriter
from bitvla.processing.prompt import ASK_FOR_A_LETTER

STATE_NAMES, ACTION_NAMES, HIDDEN_NAMES = ("x", "y", "z"), ("dx", "dy", "dz"), ("ox", "oy")
KEYPOINT_NAMES = ("front.cup.u", "front.cup.v", "front.plate.u", "front.plate.v")
SENTENCES = ("open the drawer", "push the puck")
COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 40, 220), "grey": (120, 120, 120)}
QUESTION = "Which colour?\nOptions: A: red, B: green, C: blue, D: grey"


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


def write_conversations(folder: Path, count: int = 40) -> Path:
    """Plain pictures, and two questions about the colour of each."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for number in range(count):
        letter, (name, colour) = "ABCD"[number % 4], list(COLOURS.items())[number % 4]
        Image.new("RGB", (20, 20), colour).save(folder / "images" / f"{number}.png")
        said = [f"<image>\n{QUESTION}{ASK_FOR_A_LETTER}", letter, "What do you see?", f"A {name} picture."]
        messages = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
        entries.append({"id": f"n{number}", "image": f"images/{number}.png", "conversations": messages})
    (folder / "colours.json").write_text(json.dumps(entries))
    return folder / "colours.json"

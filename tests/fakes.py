"""A simulator and policies that live in memory, for tests of what drives them. Made in child processes, by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bitvla.config import Camera, PolicyConfig
from bitvla.errors import BitvlaError
from checkpoints import processing_config, tiny_config

SIZE = 32
GROUPS = (("left", "right"),)


class Line:
    """A point on a line: "left" and "right" are solved by moving it one metre to that side.

    The initial position is a function of the seed alone; the state is that position.
    """

    name = "line"
    cameras = ("corner", "wrist")
    state_names = ("s0",)
    action_names = ("a0",)
    environment_state_names = ("goal",)
    control_hz = 10.0
    max_steps = 40

    def __init__(self, image_size: int = SIZE) -> None:
        self.image_size = image_size
        self.position, self.task = 0.0, "left"

    def tasks(self, suite: str) -> list[str]:
        known = {"both": ["left", "right"], "swap": ["left", "right"], "left": ["left"]}
        if suite not in known:
            raise BitvlaError(f"unknown suite '{suite}'")
        return known[suite]

    def groups(self, suite: str = "swap") -> list[tuple[str, ...]]:
        return list(GROUPS)

    def reset(self, task: str, seed: int, ambiguous: bool | tuple[str, ...] = False) -> None:
        self.task = task
        self.position = float(np.random.default_rng(seed).uniform(-0.2, 0.2))

    def observe(self) -> dict[str, Any]:
        shade = np.full((self.image_size, self.image_size, 3), int(127 + 100 * np.clip(self.position, -1, 1)), np.uint8)
        return {
            "images": {camera: shade.copy() for camera in self.cameras},
            "state": np.array([self.position], np.float32),
            "instruction": f"go {self.task}",
        }

    def step(self, action: NDArray[np.float32]) -> bool:
        self.position += float(action[0])
        return self.task in self._done()

    def _done(self) -> list[str]:
        return ["left"] * (self.position <= -1) + ["right"] * (self.position >= 1)

    def environment_state(self) -> NDArray[np.float32]:
        return np.array([{"left": -1, "right": 1}[self.task]], np.float32)

    def outcome(self) -> dict[str, Any]:
        return {"done": self._done(), "position": self.position}

    def close(self) -> None:
        pass


class UpsideDown(Line):
    """Its cameras hang from the ceiling: what is above is light, and comes last."""

    upside_down = True

    def observe(self) -> dict[str, Any]:
        observation = super().observe()
        for image in observation["images"].values():
            image[: self.image_size // 2], image[self.image_size // 2 :] = 0, 255
        return observation


def line_config(size: int = SIZE, state_dim: int = 1) -> PolicyConfig:
    cameras = tuple(Camera(name=name, height=size, width=size) for name in Line.cameras)
    config = tiny_config()
    return msgspec.structs.replace(
        config,
        name="walker",
        action=msgspec.structs.replace(config.action, dim=1, state_dim=state_dim),
        processing=processing_config(cameras=cameras, state_dim=state_dim, action_dim=1, execute_horizon=3),
    )


class Walker:
    """Goes where the sentence says (or, when deaf, always right), 0.1 m a step, in chunks of five."""

    def __init__(
        self, config: PolicyConfig | None = None, deaf: bool = False, seconds: float = 0.0, prune: float = 0.0
    ) -> None:
        self.config = config or line_config()
        self._deaf, self._seconds, self._prune = deaf, seconds, prune

    def reset(self) -> None:
        pass

    def info(self) -> dict[str, Any]:
        return {"instruction_set": "python", "prune": self._prune}

    def act(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        time.sleep(self._seconds)
        right = self._deaf or "right" in observation["instruction"]
        return np.full((5, 1), 0.1 if right else -0.1, np.float32)


class Crasher(Walker):
    """Its process is killed the first `times` times that it is asked to go left; a file keeps the count."""

    def __init__(self, count: Path, times: int) -> None:
        super().__init__()
        self._count, self._times = count, times

    def act(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        if "left" in observation["instruction"]:
            crashes = len(self._count.read_bytes()) if self._count.exists() else 0
            if crashes < self._times:
                self._count.write_bytes(b"x" * (crashes + 1))
                os.kill(os.getpid(), signal.SIGKILL)
        return super().act(observation)


class Refuser(Walker):
    """Refuses to act when asked to go left."""

    def act(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        if "left" in observation["instruction"]:
            raise BitvlaError("the state 's0' is nan; refusing to act on it")
        return super().act(observation)


class Dazed(Walker):
    """Answers with a value that is not a number."""

    def act(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        return super().act(observation) * np.float32("nan")

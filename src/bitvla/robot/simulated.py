"""A simulator as a robot: in a process of its own, and moving while nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitvla.errors import BitvlaError
from bitvla.evaluate.process import ProcessError, Remote
from bitvla.robot.base import actions_of
from bitvla.sim import make_simulator
from bitvla.sim.base import Simulator

T = TypeVar("T")


class SimulatedRobot:
    """Takes one simulation step with each action. The outcome of a step is seen with the next call.

    Raises BitvlaError for a simulator, a task or a size of images that is not there, and when its process dies.
    """

    def __init__(
        self, env: str, task: str, info: Mapping[str, Any], *, seed: int = 0, instruction: str | None = None
    ) -> None:
        sizes = {size for camera in info["cameras"] for size in (camera["height"], camera["width"])}
        if len(sizes) != 1:
            raise BitvlaError(f"a simulator draws square images of one size; the policy wants {sorted(sizes)} pixels")
        (size,) = sizes
        self._seed, self._instruction = seed, instruction
        self._moving = self._solved = False
        self._remote = Remote(_Host, env, task, size)
        self._child(self._remote.receive)
        names = self._call("names")
        self.cameras: dict[str, tuple[int, int]] = dict.fromkeys(names["cameras"], (size, size))
        self.state_names, self.action_names = names["state"], names["action"]
        self.actions = actions_of(self.action_names, "displacement")

    def start(self, episode: int) -> None:
        self._settle()
        self._call("reset", self._seed + episode)
        self._solved = False

    def observe(self) -> dict[str, Any]:
        self._settle()
        seen: dict[str, Any] = self._call("observe")
        return seen if self._instruction is None else seen | {"instruction": self._instruction}

    def step(self, action: NDArray[np.float32]) -> bool:
        self._settle()
        self._child(lambda: self._remote.send("step", action))
        self._moving = True
        return self._solved

    @property
    def solved(self) -> bool:
        """Whether the task is done, the last step included."""
        self._settle()
        return self._solved

    def close(self) -> None:
        self._remote.close()

    def _settle(self) -> None:
        if self._moving:
            self._moving = False
            self._solved |= self._child(self._remote.receive)

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._child(lambda: self._remote.call(method, *arguments))

    def _child(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except ProcessError as error:
            raise BitvlaError(f"the simulator failed: {error}") from None


class _Host:
    """What runs in the simulator's process."""

    def __init__(self, env: str, task: str, image_size: int) -> None:
        self._simulator: Simulator = make_simulator(env, image_size=image_size)
        self.observe, self.step, self.close = self._simulator.observe, self._simulator.step, self._simulator.close
        tasks = self._simulator.tasks(task)
        if len(tasks) != 1:
            raise BitvlaError(f"'{task}' has {len(tasks)} tasks, a robot needs one of them, for example {tasks[0]}")
        (self._task,) = tasks

    def names(self) -> dict[str, tuple[str, ...]]:
        simulator = self._simulator
        return {"cameras": simulator.cameras, "state": simulator.state_names, "action": simulator.action_names}

    def reset(self, seed: int) -> None:
        self._simulator.reset(self._task, seed)

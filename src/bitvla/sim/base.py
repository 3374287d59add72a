"""What every simulator looks like to the recorder and to the evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from bitvla.errors import BitvlaError

OPENGL_COMMAND = "apt-get install -y libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libopengl0"

Observation = dict[str, Any]
"""``{"images": {camera: uint8 (H, W, 3)}, "state": float32 (S,), "instruction": str}``"""

Expert = Callable[[], npt.NDArray[np.float32]]
"""Called before every step of an episode, it answers with the action float32 (A,) in [-1, 1] to play now.

It raises `GivenUpError` where it sees no way to the goal."""

TRAINING_SEEDS = 1_000_000
"""Seeds from here on are for recording; evaluation uses seeds below. The two never meet."""


class Moment(msgspec.Struct, frozen=True):
    """What only a simulator knows of hand and things at one moment; positions in metres.

    ``hand`` is the point between the fingertips, ``opening`` how far they are apart as a share of the farthest. ``at``
    has every thing that can be moved, and those of the goal; ``touched`` by a finger, ``held`` between the fingers.
    ``wanted`` are the things whose part of the goal does not hold now, with whether they are to be carried; ``named``
    is all that the goal names, places too.
    """

    hand: tuple[float, float, float]
    opening: float
    at: dict[str, tuple[float, float, float]]
    touched: set[str]
    held: set[str]
    wanted: dict[str, bool]
    named: set[str]


class Simulator(Protocol):
    """A simulated robot with cameras, one task at a time.

    The initial state after ``reset`` is a pure function of ``(task, seed, ambiguous)``. One that also has
    ``moment() -> Moment`` gets its failures sorted by the evaluation; one whose benchmark lists its initial states says
    in ``initial_states`` how many; one whose images are turned by 180 degrees has a true ``upside_down``.
    """

    name: str
    robot: str  # as datasets name it
    cameras: tuple[str, ...]
    image_size: int
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    environment_state_names: tuple[str, ...]
    keypoint_names: tuple[str, ...]
    action_noise: tuple[float, ...]  # how much of the recorder's noise each dimension of an action takes
    control_hz: float
    max_steps: int

    def tasks(self, suite: str) -> list[str]:
        """Names of the tasks of ``suite`` (a suite's name or one task's name)."""
        ...

    def groups(self, suite: str = "swap") -> list[tuple[str, ...]]:
        """Groups of tasks that share an ambiguous scene."""
        ...

    def reset(self, task: str, seed: int, ambiguous: bool | tuple[str, ...] = False) -> None:
        """Put ``task`` into the initial state of ``seed``."""
        ...

    def observe(self) -> Observation:
        """The observation now; rendering happens only in this call."""
        ...

    def step(self, action: npt.NDArray[np.float32]) -> bool:
        """Play one action ``float32 (A,)``; True when the task is solved at this step."""
        ...

    def sentence(self, task: str, rng: np.random.Generator) -> str:
        """A sentence for demonstrations of ``task``."""
        ...

    def cannot_demonstrate(self, task: str) -> str:
        """Why no scripted expert can do ``task``; empty where one can."""
        ...

    def longest_demonstration(self, task: str) -> int:
        """Frames after which a demonstration of ``task`` is too long to learn from."""
        ...

    def expert(self) -> Expert:
        """The scripted expert of the running episode, which reads what only a simulator knows."""
        ...

    def gripper_opening(self) -> float:
        """How far the gripper is open, 0 to 1."""
        ...

    def environment_state(self) -> npt.NDArray[np.float32]:
        """Privileged state ``float32 (E,)``, in metres."""
        ...

    def keypoints(self) -> npt.NDArray[np.float32]:
        """Where things are in each camera's image: ``float32 (V, K, 2)``, shares of its width and height.

        (0, 0) is the upper left corner; values outside [0, 1) are out of view, (-1, -1) is a thing that is not there.
        ``keypoint_names`` names the K things.
        """
        ...

    def outcome(self) -> dict[str, Any]:
        """Small measured facts about the episode so far."""
        ...

    def close(self) -> None:
        """Free the rendering contexts; may be called more than once."""
        ...


class GivenUpError(Exception):
    """The expert of an episode sees no way to its goal: the episode is lost."""


@contextmanager
def rendering() -> Iterator[None]:
    """Turn the many ways in which OpenGL can be missing, also where it is imported, into one line with a remedy."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what a library says before it fails
            yield
    except (BitvlaError, KeyError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise BitvlaError(
            f"the simulator could not start or render ({type(error).__name__}: {' '.join(str(error).split())}). If "
            f"software OpenGL is missing: {OPENGL_COMMAND}; else unset MUJOCO_GL and PYOPENGL_PLATFORM, or set both to "
            "egl. `bitvla doctor` tells what is missing"
        ) from None

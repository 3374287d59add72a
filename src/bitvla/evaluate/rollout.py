"""Evaluation: a policy runs every episode of a protocol, in parallel processes, and nothing that ran is lost."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitvla.errors import BitvlaError
from bitvla.evaluate.files import Journal, save
from bitvla.evaluate.policy_host import PolicySource
from bitvla.evaluate.pool import Pool
from bitvla.evaluate.record import Episode, Header, Machine, PolicyFacts, Protocol, jobs
from bitvla.evaluate.result import FORMAT, Result, summarize
from bitvla.evaluate.statistics import rate_of
from bitvla.evaluate.worker import SimulatorFacts, SimulatorSource
from bitvla.files import write_whole
from bitvla.progress import Progress
from bitvla.runtime.machine import cores, processor

ERRORS_IN_A_ROW = 5  # so many errors without one good episode, of more than one task: something is broken, stop


def evaluate(
    policy: PolicySource | Path,
    *,
    env: SimulatorSource = "metaworld",
    suite: str = "mt10",
    episodes: int = 50,
    first_seed: int = 0,
    execute_horizon: int | None = None,
    max_steps: int | None = None,
    full_precision: bool = False,
    processes: int | None = None,
    threads: int = 1,
    ray: str | None = None,
    out: Path | None = None,
    resume: bool = True,
    films: Path | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    console: Console | None = None,
) -> Result:
    """Run `episodes` episodes of every task of `suite` and return the result.

    Args:
        policy: a policy file; with `full_precision` a training checkpoint, run by PyTorch. Or a picklable function
            that makes an object with reset(), act(observation), info() and config.
        env: a simulator's name, or a picklable function that makes one (called with `image_size`).
        suite: a suite or task of the simulator. "swap" measures obedience: tasks that share one scene, told apart
            by the sentence alone.
        first_seed: episode i starts from the simulator's state of seed first_seed + i.
        execute_horizon, max_steps: override what the policy and the simulator ask for.
        processes: simulators side by side, each with a policy process of its own; default: one a core.
        threads: of each policy process.
        ray: address of a Ray cluster on whose machines the simulators run (processes: default, one for each of its
            CPUs); "" is the one that this machine belongs to, or else a new one here.
        out: write the result there (JSON). Until every episode could run, they lie beside it in OUT.partial.jsonl,
            and the same call goes on from them; `resume=False` starts anew.
        films: folder for a film (MP4) of each task's first episode.
        on_episode: called with each episode when it has ended.
        console: where progress is shown (default: standard error).

    Raises:
        BitvlaError: policy and simulator cannot be had or do not fit, files cannot be written, or no episode can be
            run any more. KeyboardInterrupt passes; what was done until then is kept.
    """
    if episodes < 1 or first_seed < 0:
        raise BitvlaError(f"{episodes} episodes from seed {first_seed} cannot be run: at least 1, from at least 0")
    source = policy if callable(policy) else str(policy)
    spec = (source, env, suite, threads, full_precision)
    start = time.perf_counter()
    with _pool(spec, processes, threads, ray) as pool:
        policy_facts, simulator = pool.describe()
        protocol = _protocol(policy_facts, simulator, suite, episodes, first_seed, execute_horizon, max_steps)
        with _journal(out, protocol, policy_facts, simulator, resume) as journal:
            _run(pool, protocol, journal, films, on_episode, console)
            result = summarize(
                date=datetime.now(UTC).isoformat(timespec="seconds"),
                protocol=protocol,
                policy=policy_facts,
                versions=simulator.versions,
                machine=machine(),
                processes=pool.size,
                wall_seconds=round(time.perf_counter() - start, 3),
                episodes=list(journal.entries.values()),
            )
            if out is not None:
                save(result, out)
            journal.complete = not result.errors
    return result


def _pool(spec: tuple[Any, ...], processes: int | None, threads: int, ray: str | None) -> Pool:
    if ray is None:
        return Pool(spec, processes or cores(), threads)
    from bitvla.evaluate.cluster import RayPool

    return RayPool(spec, processes, threads, ray)


def _protocol(
    policy: PolicyFacts,
    simulator: SimulatorFacts,
    suite: str,
    episodes: int,
    first_seed: int,
    execute_horizon: int | None,
    max_steps: int | None,
) -> Protocol:
    horizon = execute_horizon or policy.execute_horizon
    if not 1 <= horizon <= policy.horizon:
        raise BitvlaError(f"cannot play {horizon} actions of a chunk: the policy answers {policy.horizon} at a time")
    if first_seed + episodes > simulator.initial_states:
        raise BitvlaError(
            f"{episodes} episodes from seed {first_seed} are more than the {simulator.initial_states} initial states "
            f"that '{simulator.name}' has a task: 0 to {simulator.initial_states - 1}"
        )
    return Protocol(
        simulator=simulator.name,
        suite=suite,
        tasks=simulator.tasks,
        groups=simulator.groups,
        episodes=episodes,
        first_seed=first_seed,
        max_steps=max_steps or simulator.max_steps,
        execute_horizon=horizon,
        image_size=simulator.image_size,
        instructions="benchmark" if simulator.benchmark_protocol else "held-out",
        stop="first_done" if simulator.groups else "success",
        benchmark_protocol=simulator.benchmark_protocol,
    )


def _journal(
    out: Path | None, protocol: Protocol, policy: PolicyFacts, simulator: SimulatorFacts, resume: bool
) -> Journal[Episode]:
    header = Header(
        format=FORMAT,
        protocol=protocol,
        policy=policy.digest,
        precision=policy.precision,
        prune=policy.prune,
        versions=simulator.versions,
    )
    return Journal(out, header, Episode, resume)


def _run(
    pool: Pool,
    protocol: Protocol,
    journal: Journal[Episode],
    films: Path | None,
    on_episode: Callable[[Episode], None] | None,
    console: Console | None,
) -> None:
    """Run what the journal lacks, and write down every episode as it ends."""
    every = jobs(protocol)
    filmed = {job for job in every if job.seed == protocol.first_seed} if films else set()
    broken: list[str] = []  # the tasks of the last episodes, as far back as none could be run
    with _progress(len(every), journal, console) as show:
        for episode, film in pool.run([job for job in every if job not in journal.entries], protocol, filmed):
            if film is not None and films is not None:
                episode = _keep_film(episode, film, films, journal.path)
            journal.add(episode)
            show()
            if on_episode is not None:
                on_episode(episode)
            broken = [*broken, episode.task] if episode.error else []
            # One task that cannot be run does not keep the others from it.
            if len(broken) >= min(ERRORS_IN_A_ROW, len(every)) and len({*broken}) >= min(2, len(protocol.tasks)):
                raise BitvlaError(f"stopped: {len(broken)} episodes in a row could not be run: {episode.error}")


def _keep_film(episode: Episode, film: bytes, folder: Path, beside: Path | None) -> Episode:
    """Save a film; its path is recorded relative to the result, so that both can be moved together."""
    scene = f"-in-{'-'.join(episode.group)}" if episode.group else ""
    path = folder / f"{episode.task}{scene}-{episode.seed}.mp4"
    write_whole(path, film)
    video = os.path.relpath(path, beside.parent) if beside else str(path)
    return msgspec.structs.replace(episode, video=video)


@contextlib.contextmanager
def _progress(total: int, journal: Journal[Episode], console: Console | None) -> Iterator[Callable[[], None]]:
    """A progress bar with the success rate so far."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)

        def show() -> None:
            rate = rate_of(episode.success for episode in journal.entries.values())
            text = f"success {rate.rate:.0%} [{rate.low:.0%}, {rate.high:.0%}]" if rate.total else "running"
            bar.update(task, completed=rate.total, description=text)

        show()
        yield show


def machine() -> Machine:
    """What this evaluation runs on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(cpu=processor(), cores=cores(), memory_bytes=memory, system=platform.platform())

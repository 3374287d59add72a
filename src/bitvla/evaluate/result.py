"""The result of an evaluation: its episodes and what they add up to. Reports and comparisons need nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from bitvla.errors import BitvlaError
from bitvla.evaluate.files import difference
from bitvla.evaluate.record import Episode, Machine, PolicyFacts, Protocol, Record, jobs
from bitvla.evaluate.statistics import Latency, Paired, Rate, independent, latency, paired, rate_of

FORMAT = 1
INITIAL_STATE_TOLERANCE = 1e-4  # metres; two machines may settle a scene in different last bits


class Obedience(Record, frozen=True, kw_only=True):
    """Did the sentence decide what was done? One a group of tasks that share a scene.

    `matrix[i][j]`: runs in which task i was asked for and task j done first; the last column is nothing. `obeyed`:
    runs that did what was asked. `obeyed_when_done`: the same among runs that did anything. `changed`: scenes in
    which not all sentences led to the same thing being done. `all_obeyed`: scenes in which every sentence was obeyed.
    """

    group: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]
    obeyed: Rate
    obeyed_when_done: Rate
    changed: Rate
    all_obeyed: Rate


class Drop(Record, frozen=True, kw_only=True):
    """What a perturbed suite costs: `difference` = its rate - the rate of the suite that it was made from.

    The 95 % interval is that of two independent rates: LIBERO-PRO lists other initial states even where it changes
    nothing but the sentence.
    """

    suite: str
    rate: Rate
    difference: float
    low: float
    high: float


class Result(Record, frozen=True, kw_only=True):
    """A whole evaluation. `wall_seconds` is the time of the call that completed it.

    `failures` counts the failed episodes by kind; `drops` are those of a suite's perturbed versions, if it has any.
    """

    format: int = FORMAT
    date: str
    protocol: Protocol
    policy: PolicyFacts
    versions: dict[str, str]
    machine: Machine
    processes: int
    wall_seconds: float
    policy_peak_bytes: int
    total: Rate
    tasks: dict[str, Rate]
    errors: int
    failures: dict[str, int] = msgspec.field(default_factory=dict)
    latency: Latency | None
    obedience: tuple[Obedience, ...]
    drops: tuple[Drop, ...] = ()
    episodes: tuple[Episode, ...]


def summarize(
    *,
    date: str,
    protocol: Protocol,
    policy: PolicyFacts,
    versions: dict[str, str],
    machine: Machine,
    processes: int,
    wall_seconds: float,
    episodes: Sequence[Episode],
) -> Result:
    """A result from its episodes, in the order of the protocol."""
    order = {job: index for index, job in enumerate(jobs(protocol))}
    episodes = sorted(episodes, key=lambda episode: order[episode.job])
    tasks = {task: rate_of(e.success for e in episodes if e.task == task) for task in protocol.tasks}
    return Result(
        date=date,
        protocol=protocol,
        policy=policy,
        versions=versions,
        machine=machine,
        processes=processes,
        wall_seconds=wall_seconds,
        policy_peak_bytes=max((episode.policy_peak_bytes for episode in episodes), default=0),
        total=rate_of(episode.success for episode in episodes),
        tasks=tasks,
        errors=sum(episode.error is not None for episode in episodes),
        failures=dict(Counter(e.failure for e in episodes if e.failure is not None).most_common()),
        latency=latency([ms for episode in episodes for ms in episode.chunk_ms]),
        obedience=tuple(_obedience(group, episodes) for group in protocol.groups),
        drops=_drops(episodes),
        episodes=tuple(episodes),
    )


def _obedience(group: tuple[str, ...], episodes: Sequence[Episode]) -> Obedience:
    runs = [episode for episode in episodes if episode.group == group and episode.error is None]
    columns = (*group, None)
    scenes: dict[int, list[Episode]] = {}
    for run in runs:
        scenes.setdefault(run.seed, []).append(run)
    whole = [scene for scene in scenes.values() if len(scene) == len(group)]
    return Obedience(
        group=group,
        matrix=tuple(
            tuple(sum(run.task == asked and run.done == done for run in runs) for done in columns) for asked in group
        ),
        obeyed=rate_of(run.success for run in runs),
        obeyed_when_done=rate_of(run.success for run in runs if run.done is not None),
        changed=rate_of(len({run.done for run in scene}) > 1 for scene in whole),
        all_obeyed=rate_of(all(run.success for run in scene) for scene in whole),
    )


def _drops(episodes: Sequence[Episode]) -> tuple[Drop, ...]:
    """Of every suite after the first, where tasks are called suite/number."""
    suites: dict[str, list[Episode]] = {}
    for episode in episodes:
        suite, slash, _ = episode.task.partition("/")
        if slash:
            suites.setdefault(suite, []).append(episode)
    base, *perturbed = suites or [""]
    return tuple(_drop(suite, suites[suite], suites[base]) for suite in perturbed)


def _drop(suite: str, perturbed: list[Episode], base: list[Episode]) -> Drop:
    rate, before = rate_of(e.success for e in perturbed), rate_of(e.success for e in base)
    low, high = independent(rate, before)
    return Drop(suite=suite, rate=rate, difference=rate.rate - before.rate, low=low, high=high)


class Comparison(Record, frozen=True, kw_only=True):
    """Two results on the same initial states: overall and task by task, and their failures by kind."""

    a: str
    b: str
    total: Paired
    tasks: dict[str, Paired]
    failures: dict[str, tuple[int, int]]


def compare(a: Result, b: Result) -> Comparison:
    """Compare two policies pair by pair: same task, same seed, same initial state, same rules.

    Raises BitvlaError when the protocols or the initial states differ, or an episode had an error: such results may
    not be compared.
    """
    check_same("protocol", msgspec.structs.asdict(a.protocol), msgspec.structs.asdict(b.protocol))
    pairs = list(zip(a.episodes, b.episodes, strict=True))
    for x, y in pairs:
        broken = x.error or y.error
        if broken:
            raise BitvlaError(f"cannot compare: {x.task} with seed {x.seed} was not run ({broken}); evaluate it again")
        if not _same_start(x, y):
            raise BitvlaError(
                f"cannot compare: {x.task} with seed {x.seed} did not start from the same state in both results; "
                "evaluate both with the same version of the simulator"
            )
    by_task = {task: [(x.success, y.success) for x, y in pairs if x.task == task] for task in a.protocol.tasks}
    return Comparison(
        a=f"{a.policy.title} {a.policy.digest[:7]}",  # the same policy, trained again, has the same name
        b=f"{b.policy.title} {b.policy.digest[:7]}",
        total=paired([x.success for x, _ in pairs], [y.success for _, y in pairs]),
        tasks={task: paired([x for x, _ in outcomes], [y for _, y in outcomes]) for task, outcomes in by_task.items()},
        failures={kind: (a.failures.get(kind, 0), b.failures.get(kind, 0)) for kind in a.failures | b.failures},
    )


def check_same(what: str, a: dict[str, Any], b: dict[str, Any]) -> None:
    """BitvlaError naming the first field in which two results may not differ, and do."""
    if name := difference(a, b):
        raise BitvlaError(f"cannot compare: the {what}s differ in {name} ({a[name]} and {b[name]})")


def _same_start(x: Episode, y: Episode) -> bool:
    if x.instruction != y.instruction or len(x.initial) != len(y.initial):
        return False
    return all(abs(p - q) <= INITIAL_STATE_TOLERANCE for p, q in zip(x.initial, y.initial, strict=True))

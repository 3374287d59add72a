"""What the tables say: sizes, values, times, tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pandas as pd

from bitvla.data.check import rules
from bitvla.data.check.rules import Finding
from bitvla.data.check.source import Floats, Source
from bitvla.data.lerobot import CONSTANT, outside


class Dimension(msgspec.Struct, frozen=True, kw_only=True):
    """One dimension of a feature: what it spans, and the share of its values outside the stored quantiles."""

    feature: str
    name: str
    low: float
    high: float
    q01: float | None
    q99: float | None
    outside: float | None


@dataclass
class Tables:
    """What the tables say, gathered episode by episode."""

    lengths: list[int] = field(default_factory=list)
    starts: dict[str, list[Floats | None]] = field(default_factory=dict)
    low: dict[str, Floats] = field(default_factory=dict)
    high: dict[str, Floats] = field(default_factory=dict)
    outside: dict[str, Floats] = field(default_factory=dict)
    count: Counter[str] = field(default_factory=Counter)
    periods: dict[int, float] = field(default_factory=dict)
    gaps: dict[int, float] = field(default_factory=dict)
    uneven: dict[int, float] = field(default_factory=dict)
    timeless: list[int] = field(default_factory=list)
    steps: int = 0
    no_ops: int = 0


def read_tables(dataset: Source, findings: list[Finding], progress: Callable[[int], None]) -> Tables:
    """Read every episode's rows; what is missing or broken joins `findings`."""
    table = Tables(starts={key: [] for key in dataset.vectors})
    for episode in range(len(dataset.episodes)):
        rows = dataset.rows(episode)
        expected = int(dataset.episodes["length"].iloc[episode])
        found = 0 if rows is None else len(rows)
        table.lengths.append(found)
        if (found != expected or not found) and dataset.table_of(episode) not in dataset.broken:
            findings.append(
                rules.MISSING_FRAMES.found(
                    subject=f"episode {episode}",
                    value=f"{found} frames",
                    threshold=f"{expected or 'some'} in the episode table",
                )
            )
        for key in dataset.vectors:
            _read_vector(dataset, table, episode, rows, key, findings)
        if rows is not None:
            _read_times(dataset, table, episode, rows)
            table.timeless += [] if "timestamp" in rows else [episode]
        progress(episode + 1)
    findings += [
        rules.BROKEN_TABLE.found(subject=f"{path.parent.name}/{path.name}", value=reason, threshold="a whole table")
        for path, reason in dataset.broken.items()
    ]
    return table


def _read_vector(
    dataset: Source, table: Tables, episode: int, rows: pd.DataFrame | None, key: str, findings: list[Finding]
) -> None:
    values = None if rows is None else dataset.vector(rows, key)
    table.starts[key].append(None if values is None or not np.isfinite(values[0]).all() else values[0])
    if rows is None:
        return
    if values is None:
        findings.append(
            rules.MISSING_VECTORS.found(
                subject=f"'{key}' of episode {episode}",
                value="missing, or another size",
                threshold=f"{len(dataset.names(key))} values in every frame",
            )
        )
        return
    bad = ~np.isfinite(values)
    findings += [
        rules.NOT_FINITE.found(
            subject=f"'{dataset.names(key)[index]}' of '{key}', episode {episode}",
            value=f"{int(bad[:, index].sum())} of {len(values)} values not finite, "
            f"first in frame {int(np.flatnonzero(bad[:, index])[0])}",
            threshold="0",
        )
        for index in np.flatnonzero(bad.any(axis=0))
    ]
    good = values[~bad.any(axis=1)]
    if len(good):
        table.low[key] = np.minimum(table.low.get(key, good[0]), good.min(axis=0))
        table.high[key] = np.maximum(table.high.get(key, good[0]), good.max(axis=0))
        table.outside[key] = table.outside.get(key, np.zeros(good.shape[1])) + _outside(dataset, key, good)
        table.count[key] += len(good)
    if key == "observation.state" and len(good) > 1:
        step = np.abs(np.diff(good, axis=0) / dataset.scale(key)).max(axis=1)
        table.steps += len(step)
        table.no_ops += int((step < rules.STILL).sum())


def _outside(dataset: Source, key: str, values: Floats) -> Floats:
    low, high = dataset.quantiles(key)
    if low is None or high is None:
        return np.zeros(values.shape[1])
    return outside(values, low, high).sum(axis=0).astype(np.float64)


def _read_times(dataset: Source, table: Tables, episode: int, rows: pd.DataFrame) -> None:
    if "timestamp" not in rows or len(rows) < 2:
        return
    steps = np.diff(rows["timestamp"].to_numpy(np.float64))
    table.periods[episode] = float(np.median(steps))
    period = 1 / dataset.fps
    if steps.max() > rules.GAP * period:
        table.gaps[episode] = float(steps.max())
    # Stored as float32: far into a long episode the last bits are coarse.
    slack = max(rules.JITTER * period, 4 * float(np.spacing(np.float32(rows["timestamp"].max()))))
    deviation = float(np.abs(steps - np.median(steps)).max())
    if deviation > slack:
        table.uneven[episode] = deviation


def dimensions_of(dataset: Source, table: Tables, findings: list[Finding]) -> list[Dimension]:
    """What each dimension spans, against the stored quantiles."""
    dimensions = []
    for key in dataset.vectors:
        if key not in table.low:
            continue
        low, high = dataset.quantiles(key)
        trained = key != "observation.environment_state"  # that one only describes the scene
        if trained and (low is None or high is None):
            findings.append(
                rules.NO_QUANTILES.found(
                    subject=f"'{key}'",
                    value="no q01 and q99 in meta/stats.json",
                    threshold=f"one each for {', '.join(dataset.names(key))}",
                )
            )
        for i, name in enumerate(dataset.names(key)):
            q01, q99 = (None if bound is None else float(bound[i]) for bound in (low, high))
            known = q01 is not None and q99 is not None
            dimension = Dimension(
                feature=key,
                name=name,
                low=float(table.low[key][i]),
                high=float(table.high[key][i]),
                q01=q01,
                q99=q99,
                outside=float(table.outside[key][i]) / table.count[key] if known else None,
            )
            dimensions.append(dimension)
            if trained and known:
                findings += _judge(dimension, table.count[key])
    return dimensions


def _judge(dimension: Dimension, count: int) -> Iterator[Finding]:
    subject = f"'{dimension.name}' of '{dimension.feature}'"
    assert dimension.q01 is not None
    assert dimension.q99 is not None
    assert dimension.outside is not None
    width = dimension.q99 - dimension.q01
    warning, error = (share + 2 / count for share in (rules.OUTSIDE_WARNING, rules.OUTSIDE_ERROR))  # of few, the ends
    if not width > CONSTANT and not dimension.outside > error:  # also NaN
        yield rules.CONSTANT_DIMENSION.found(
            subject=subject,
            value=f"constant or not finite: q01 {dimension.q01:.6g}, q99 {dimension.q99:.6g}",
            threshold=f"q99 - q01 above {CONSTANT:g}",
        )
    elif dimension.outside > warning:
        severe = dimension.outside > error
        yield (rules.FAR_OFF_QUANTILES if severe else rules.OFF_QUANTILES).found(
            subject=subject,
            value=f"{100 * dimension.outside:.1f} % of the values outside q01 to q99",
            threshold=f"{100 * (error if severe else warning):.3g} %",
        )


def check_times(dataset: Source, table: Tables, horizon: int, findings: list[Finding]) -> None:
    """The rate, gaps and lengths of the episodes."""
    if table.timeless:
        findings.append(
            rules.NO_TIMES.found(
                subject=rules.named(table.timeless), value="no column 'timestamp'", threshold="one in every frame"
            )
        )
    period = 1 / dataset.fps
    # A period that is not a number is off too.
    off = [i for i, step in table.periods.items() if not abs(step - period) <= rules.JITTER * period]
    if off:
        findings.append(
            rules.WRONG_RATE.found(
                subject=f"the timestamps of {rules.named(off)}",
                value=f"{1e3 * table.periods[off[0]]:.4g} ms between two frames",
                threshold=f"{1e3 * period:.4g} ms at {dataset.fps:g} fps, within {100 * rules.JITTER:g} %",
            )
        )
    if gaps := {i: step for i, step in table.gaps.items() if i not in off}:
        findings.append(
            rules.DROPPED_FRAMES.found(
                subject=rules.named(gaps),
                value=f"{1e3 * max(gaps.values()):.4g} ms between two frames",
                threshold=f"{1e3 * rules.GAP * period:.4g} ms",
            )
        )
    if uneven := {k: v for k, v in table.uneven.items() if k not in table.gaps}:
        findings.append(
            rules.UNEVEN_STEPS.found(
                subject=rules.named(uneven),
                value=f"{1e3 * max(uneven.values()):.3g} ms off the even step",
                threshold=f"{1e3 * rules.JITTER * period:.3g} ms",
            )
        )
    if short := [i for i, length in enumerate(table.lengths) if length < horizon]:
        findings.append(
            rules.SHORT_EPISODES.found(
                subject=rules.named(short),
                value=f"{min(table.lengths)} frames in the shortest",
                threshold=f"the horizon, {horizon}",
            )
        )
    if table.no_ops > rules.NO_OPS * max(1, table.steps):
        findings.append(
            rules.STANDING_STILL.found(
                subject="steps in which the state does not move",
                value=f"{100 * table.no_ops / table.steps:.1f} %",
                threshold=f"{100 * rules.NO_OPS:g} %",
            )
        )


def count_tasks(dataset: Source, findings: list[Finding]) -> dict[str, int]:
    """Episodes by task, most first."""
    tasks = Counter(dataset.tasks())
    if empty := [i for i, sentence in enumerate(dataset.sentences) if not sentence.strip()]:
        findings.append(
            rules.NO_INSTRUCTION.found(
                subject=rules.named(empty), value="no instruction", threshold="one sentence an episode"
            )
        )
    (most, many), (least, few) = tasks.most_common(1)[0], tasks.most_common()[-1]
    # Sentences that were varied on purpose are no tasks; only counts that mean something are compared.
    comparable = "env_task" in dataset.episodes or len(tasks) <= len(dataset.episodes) / 5
    if comparable and many > rules.IMBALANCE * few:
        findings.append(
            rules.UNBALANCED.found(
                subject=f"task '{least}'",
                value=f"{few} episodes; '{most}' has {many}",
                threshold=f"{rules.IMBALANCE:g} times as many",
            )
        )
    return dict(tasks.most_common())


def recovery_share(dataset: Source, findings: list[Finding]) -> float | None:
    """The share of episodes that begin in a failed state; None when they are not marked."""
    recoveries = dataset.recoveries()
    share = None if recoveries is None else float(recoveries.mean())
    if share is None or share < rules.RECOVERIES:
        findings.append(
            (rules.UNMARKED_RECOVERIES if share is None else rules.FEW_RECOVERIES).found(
                subject="episodes that begin in a failed state",
                value="not marked in a column 'recovery'" if share is None else f"{100 * share:.1f} %",
                threshold=f"{100 * rules.RECOVERIES:g} %",
            )
        )
    return share

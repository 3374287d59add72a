"""The report: one HTML file drawn from the records of evaluations alone, with nothing to fetch."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitvla.errors import BitvlaError
from bitvla.evaluate.files import load
from bitvla.evaluate.record import Episode
from bitvla.evaluate.result import Obedience, Result, compare
from bitvla.files import write_whole
from bitvla.pages import template

FILM_BYTES = 5_500_000  # of all films together; base64 makes them a third larger
MOVING_FILMS = 12  # more than these do not start by themselves
OPEN_ROWS = 30  # a longer table of episodes is folded
BINS = 40


class Film(NamedTuple):
    episode: Episode
    data: str


class Bar(NamedTuple):
    """A column of the histogram, in milliseconds and as a share of the highest."""

    start: float
    end: float
    calls: int
    height: float


class Histogram(NamedTuple):
    bars: list[Bar]
    end: float
    beyond: int
    marks: list[tuple[str, float]]
    budget_ms: float


def report(results: Path | Sequence[Path], out: Path) -> Path:
    """Write the report of one or several results to `out` and return it.

    The first result is the subject. A further one of the suite "swap" adds what it says on obedience; one of the
    subject's own protocol is compared with it, pair by pair.

    Raises:
        BitvlaError: a result cannot be read, two cannot be compared, or `out` is named as one or cannot be written.
    """
    if out.suffix == ".json":  # the last of several records, where the report's name was forgotten
        raise BitvlaError(f"{out} is the name of a record; the report's comes last, as in {out.with_suffix('.html')}")
    paths = [results] if isinstance(results, Path) else list(results)
    if not paths:
        raise BitvlaError("a report needs the record of at least one evaluation")
    subject, *others = [load(path, Result) for path in paths]
    films, left_out = _films(subject, paths[0].parent)
    filters: dict[str, Callable[..., str]] = {
        "percent": _percent,
        "megabytes": _megabytes,
        "ms": _ms,
        "plain": plain_task,
    }
    page = template("bitvla.evaluate", "report.html.j2", **filters).render(
        r=subject,
        films=films,
        films_left_out=left_out,
        moving=len(films) <= MOVING_FILMS,
        histogram=_histogram(subject),
        actions_per_second=actions_per_second(subject),
        obedience=[*_obedience(subject), *(part for other in others for part in _obedience(other))],
        comparisons=[compare(subject, other) for other in others if not other.protocol.groups],
        open_rows=OPEN_ROWS,
    )
    write_whole(out, page.encode())
    return out


def actions_per_second(result: Result) -> float | None:
    """The control rate that the policy sustains: actions played for every second spent in its calls."""
    seconds = sum(sum(episode.chunk_ms) for episode in result.episodes) / 1e3
    return sum(episode.steps for episode in result.episodes) / seconds if seconds else None


def _obedience(result: Result) -> list[tuple[Obedience, Result]]:
    return [(obedience, result) for obedience in result.obedience]


def _films(result: Result, folder: Path) -> tuple[list[Film], int]:
    """The films that fit, and how many were left out (too large, or no longer there)."""
    films, used, left_out = [], 0, 0
    for episode in result.episodes:
        if episode.video is None:
            continue
        path = folder / episode.video
        size = path.stat().st_size if path.is_file() else FILM_BYTES + 1
        if used + size > FILM_BYTES:
            left_out += 1
            continue
        used += size
        films.append(Film(episode, base64.b64encode(path.read_bytes()).decode()))
    return films, left_out


def _histogram(result: Result) -> Histogram | None:
    """Columns up to a little beyond the 99th percentile; what is slower is counted, not drawn."""
    latency = result.latency
    if latency is None:
        return None
    durations = [ms for episode in result.episodes for ms in episode.chunk_ms]
    end = 1.1 * latency.p99
    counts, edges = np.histogram(durations, bins=BINS, range=(0, end))
    top = max(1, int(counts.max()))
    return Histogram(
        bars=[Bar(float(a), float(b), int(n), int(n) / top) for a, b, n in zip(edges, edges[1:], counts, strict=False)],
        end=end,
        beyond=sum(ms > end for ms in durations),
        marks=[("p50", latency.p50), ("p95", latency.p95), ("p99", latency.p99)],
        budget_ms=1e3 * result.protocol.execute_horizon / result.policy.control_hz,
    )


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size < 100e6 else f"{size / 1e6:,.0f} MB"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def plain_task(task: str) -> str:
    """A task's name without the benchmark's version."""
    return task.removesuffix("-v3")

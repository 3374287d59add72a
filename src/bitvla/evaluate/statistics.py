"""Rates with their intervals, and the paired comparison of two evaluations of the same initial states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from scipy.stats import binomtest

CONFIDENCE = 0.95


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """`successes` of `total` and the 95 % Wilson score interval of the rate."""

    successes: int
    total: int
    rate: float
    low: float
    high: float


def wilson(successes: int, total: int) -> Rate:
    """The rate of a binomial count. Nothing observed (total 0) tells nothing: rate 0 within [0, 1]."""
    if total == 0:
        return Rate(successes=0, total=0, rate=0.0, low=0.0, high=1.0)
    interval = binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
    return Rate(
        successes=successes, total=total, rate=successes / total, low=float(interval.low), high=float(interval.high)
    )


def rate_of(outcomes: Iterable[bool]) -> Rate:
    """The rate of True among `outcomes`."""
    outcomes = list(outcomes)
    return wilson(sum(outcomes), len(outcomes))


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of a list of durations, in milliseconds."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


def latency(milliseconds: Sequence[float]) -> Latency | None:
    """Percentiles (linear interpolation); None of an empty list."""
    if not milliseconds:
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(milliseconds, (50, 95, 99)))
    mean, largest = float(np.mean(milliseconds)), float(np.max(milliseconds))
    return Latency(count=len(milliseconds), mean=mean, p50=p50, p95=p95, p99=p99, max=largest)


class Paired(msgspec.Struct, frozen=True, kw_only=True):
    """Two policies on the same initial states: a 2x2 table, the difference of their rates and a test.

    `difference` = rate of a - rate of b, with the 95 % interval of Newcombe's square-and-add method for pairs
    (Statistics in Medicine 17, 1998, method 10). `p_value`: exact McNemar test, two-sided.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    a: Rate
    b: Rate
    difference: float
    low: float
    high: float
    p_value: float


def paired(a: Sequence[bool], b: Sequence[bool]) -> Paired:
    """Compare outcomes of a and b, pair by pair. ValueError when they are not pairs or there are none."""
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} outcomes are not pairs")
    table = [sum((x, y) == cell for x, y in zip(a, b, strict=True)) for cell in _CELLS]
    low, high = _newcombe(*table)
    both, only_a, only_b, neither = table
    discordant = only_a + only_b
    return Paired(
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=neither,
        a=rate_of(a),
        b=rate_of(b),
        difference=(only_a - only_b) / len(a),
        low=low,
        high=high,
        p_value=float(binomtest(only_a, discordant).pvalue) if discordant else 1.0,
    )


def independent(a: Rate, b: Rate) -> tuple[float, float]:
    """The 95 % interval of a's rate minus b's, of different initial states (Newcombe 1998, method 10, unpaired)."""
    return _difference(a, b, 0.0)


_CELLS = ((True, True), (True, False), (False, True), (False, False))


def _newcombe(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    total = both + only_a + only_b + neither
    a, b = wilson(both + only_a, total), wilson(both + only_b, total)
    return _difference(a, b, _correlation(both, only_a, only_b, neither))


def _difference(a: Rate, b: Rate, phi: float) -> tuple[float, float]:
    below = _combine(a.rate - a.low, b.high - b.rate, phi)
    above = _combine(a.high - a.rate, b.rate - b.low, phi)
    difference = a.rate - b.rate
    return difference - below, difference + above


def _combine(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """The phi coefficient, with Newcombe's continuity correction of a positive numerator."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    numerator = float(both * neither - only_a * only_b)
    if numerator > 0:
        numerator = max(0.0, numerator - (both + only_a + only_b + neither) / 2)
    return numerator / math.sqrt(margins)

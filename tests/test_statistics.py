"""Intervals and tests against published values."""

import pytest

from bitvla.evaluate.statistics import independent, latency, paired, rate_of, wilson


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(10, 10, 0.722, 1.0), (47, 50, 0.838, 0.979), (1896, 2000, 0.937, 0.957), (0, 10, 0.0, 0.278), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(successes, total, low, high):
    rate = wilson(successes, total)
    assert rate.low == pytest.approx(low, abs=6e-4)
    assert rate.high == pytest.approx(high, abs=6e-4)


def pairs(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return paired(a, b)


def test_newcombe_interval_of_his_first_example():
    """Newcombe, Statistics in Medicine 17 (1998), the data 36, 12, 2, 0 with method 10."""
    result = pairs(36, 12, 2, 0)
    assert (result.both, result.only_a, result.only_b, result.neither) == (36, 12, 2, 0)
    assert result.difference == pytest.approx(0.2)
    assert result.low == pytest.approx(0.0569, abs=1e-4)
    assert result.high == pytest.approx(0.3404, abs=1e-4)
    # Exact McNemar: twice the probability of at most 2 of 14.
    assert result.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)


def test_newcombe_interval_of_independent_rates():
    """Newcombe, Statistics in Medicine 17 (1998) 873, the data 56/70 and 48/80 with method 10."""
    assert independent(wilson(56, 70), wilson(48, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_difference_changes_sign_with_the_order():
    forward, backward = pairs(20, 9, 3, 8), pairs(20, 3, 9, 8)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    assert forward.p_value == pytest.approx(backward.p_value)


def test_equal_policies_do_not_differ():
    result = pairs(50, 0, 0, 0)
    assert result.difference == 0
    assert result.low < 0 < result.high
    assert result.p_value == 1


def test_what_is_not_paired_is_refused():
    with pytest.raises(ValueError, match="not pairs"):
        paired([True], [True, False])
    with pytest.raises(ValueError, match="not pairs"):
        paired([], [])


def test_rates_and_percentiles_of_lists():
    assert rate_of(x > 2 for x in range(10)).rate == 0.7
    summary = latency([float(x) for x in range(101)])
    assert (summary.p50, summary.p95, summary.p99, summary.max, summary.count) == (50, 95, 99, 100, 101)
    assert latency([]) is None

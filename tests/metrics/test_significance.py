"""Tests of paired differences against scipy, hand-computed cases, and simulation."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from medvlm_harness.metrics.significance import (
    detectable_difference,
    direction,
    holm,
    interval_p,
    mcnemar,
    non_inferiority,
    normal_p,
)

RNG = np.random.default_rng(3)


def pairs(only_first: int, only_second: int, both: int = 10) -> tuple[list[bool], list[bool]]:
    first = [True] * only_first + [False] * only_second + [True] * both
    return first, [False] * only_first + [True] * only_second + [True] * both


@pytest.mark.parametrize(("b", "c"), [(1, 12), (3, 9), (0, 5), (25, 40)])
def test_mcnemar_is_the_exact_test_less_half_the_point(b: int, c: int) -> None:
    exact = binomtest(b, b + c, 0.5).pvalue
    assert mcnemar(*pairs(b, c)) == pytest.approx(exact - binom.pmf(min(b, c), b + c, 0.5))
    assert mcnemar(*pairs(c, b)) == pytest.approx(mcnemar(*pairs(b, c)))


def test_mcnemar_of_equally_many_or_none() -> None:
    assert mcnemar(*pairs(7, 7)) == 1 and mcnemar(*pairs(0, 0)) == 1


def test_mcnemar_counts_a_study_once() -> None:
    first, second = pairs(12, 4)
    once = [*range(len(first))]
    assert mcnemar(first, second, clusters=once) == mcnemar(first, second)
    twice = mcnemar(first * 2, second * 2, clusters=once * 2)  # every item twice is no more evidence
    assert twice == pytest.approx(2 * norm.sf(8 / np.sqrt(16)))
    assert twice > mcnemar(first * 2, second * 2)


def test_mcnemar_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        mcnemar([True], [True, False])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, float("nan")])[:3].tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(holm([0.5, float("nan")])[1]) and holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).size == 0


def test_holm_keeps_the_chance_of_any_false_one() -> None:
    p = RNG.random((2000, 10))
    assert np.mean([(holm(row) < 0.05).any() for row in p]) < 0.065
    assert np.mean((p < 0.05).any(axis=1)) > 0.35  # without


def test_a_detectable_difference_is_found_with_its_power() -> None:
    stderr = 0.013
    true = detectable_difference(stderr)
    assert true == pytest.approx(2.8016 * stderr, rel=1e-4)
    drawn = RNG.normal(true, stderr, 20_000)
    assert np.mean([normal_p(one, stderr) < 0.05 for one in drawn]) == pytest.approx(0.8, abs=0.01)


def test_p_without_a_standard_error() -> None:
    assert normal_p(0.0, 0.0) == 1 and np.isnan(normal_p(0.1, 0.0)) and np.isnan(normal_p(0.1, float("nan")))


def test_p_of_an_interval_is_below_5_percent_just_where_it_does_not_hold_zero() -> None:
    assert interval_p(0.1 - 1.959964, 0.1 + 1.959964) == pytest.approx(2 * norm.sf(0.1))
    for low, high in RNG.normal(0, 1, (500, 2)):
        low, high = sorted((low, high))
        assert (interval_p(low, high) < 0.05) == (low > 0 or high < 0)
    assert interval_p(0.0, 0.0) == 1
    assert np.isnan(interval_p(0.1, 0.1)) and np.isnan(interval_p(float("nan"), 1.0))


@pytest.mark.parametrize(
    ("difference", "p", "said"),
    [
        (0.02, 0.01, "better"),
        (-0.02, 0.01, "worse"),
        (-0.02, 0.05, "no difference shown"),
        (0.0, 1.0, "no difference shown"),
        (0.02, float("nan"), "undecided"),
        (float("nan"), 0.01, "undecided"),
    ],
)
def test_direction(difference: float, p: float, said: str) -> None:
    assert direction(difference, p) == said
    assert direction(-difference, p, lower_is_better=True) == said


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.03, "not worse"),
        (-0.015, -0.005, "not worse"),  # it is worse, by less than matters
        (-0.03, 0.01, "undecided"),
        (-0.08, -0.03, "worse"),
        (-0.08, -0.01, "undecided"),
        (-0.02, 0.01, "undecided"),  # the margin itself is lost
        (float("nan"), float("nan"), "undecided"),
    ],
)
def test_non_inferiority(low: float, high: float, said: str) -> None:
    assert non_inferiority(low, high, 0.02) == said
    assert non_inferiority(-high, -low, 0.02, lower_is_better=True) == said


def test_a_margin_is_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        non_inferiority(0, 1, 0)

"""Tests of paired differences against scipy, hand-computed cases, and simulation."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from medvlm_harness.metrics.significance import detectable_difference, holm, mcnemar, normal_p, verdict

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


@pytest.mark.parametrize(
    ("interval", "plain", "within"),
    [
        ((0.01, 0.03), "better", "not worse"),
        ((-0.015, -0.005), "worse", "not worse"),  # it is worse, by less than matters
        ((-0.03, 0.01), "no difference shown", "undecided"),
        ((-0.08, -0.03), "worse", "worse"),
        ((-0.08, -0.01), "worse", "undecided"),
        ((float("nan"), 0.1), "undecided", "undecided"),
    ],
)
def test_verdicts(interval: tuple[float, float], plain: str, within: str) -> None:
    low, high = interval
    assert verdict(low, high) == plain and verdict(low, high, margin=0.02) == within
    assert verdict(-high, -low, lower_is_better=True) == plain
    assert verdict(-high, -low, margin=0.02, lower_is_better=True) == within


def test_a_margin_is_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        verdict(0, 1, margin=0)

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from medvlm_harness.metrics.bootstrap import Weights, study_weights
from medvlm_harness.metrics.paired import paired_estimates, paired_names

RNG = np.random.default_rng(3)
STUDIES = [f"s{k // 2}" for k in range(80)]
Statistic = Callable[[Weights], NDArray[np.float64]]


def means(*columns: NDArray[np.float64]) -> Statistic:
    values = np.column_stack(columns)
    return lambda weights: weights @ values / weights.sum(axis=1, keepdims=True)


def test_names_are_in_the_order_of_the_estimates() -> None:
    one, two = RNG.random(80), RNG.random(80)
    found = paired_estimates({"true": means(one, two), "blank": means(two, one)}, STUDIES, ["a", "b"], resamples=20)
    assert tuple(found) == paired_names(["a", "b"], ["true", "blank"])
    assert list(found)[:3] == ["a_true", "a_blank", "a_true_minus_blank"]


def test_a_difference_is_that_of_the_values_with_its_own_interval() -> None:
    """By hand: the same resamples, the difference in each, its percentiles."""
    true = RNG.random(80)
    other = true - 0.1 + 0.01 * RNG.standard_normal(80)
    found = paired_estimates({"true": means(true), "other": means(other)}, STUDIES, ["m"], floors={"m": 0.2})
    drawn = study_weights(STUDIES)
    by_hand = (drawn @ (true - other)) / drawn.sum(axis=1)
    difference = found["m_true_minus_other"]
    assert difference.value == pytest.approx(np.mean(true - other))
    assert difference.ci95 == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))
    assert difference.ci95[1] - difference.ci95[0] < 0.2 * (found["m_true"].ci95[1] - found["m_true"].ci95[0])
    assert (found["m_true"].floor, difference.floor) == (0.2, None)


def test_equal_conditions_differ_by_exactly_nothing() -> None:
    values = RNG.random(80)
    found = paired_estimates({"true": means(values), "blank": means(values.copy())}, STUDIES, ["m"])
    assert (found["m_true_minus_blank"].value, found["m_true_minus_blank"].ci95) == (0, (0, 0))


def test_an_undefined_condition_leaves_its_difference_undefined() -> None:
    values = RNG.random(80)
    nothing: Statistic = lambda weights: np.full((len(weights), 1), np.nan)  # noqa: E731
    found = paired_estimates({"true": means(values), "blank": nothing}, STUDIES, ["m"])
    assert np.isnan(found["m_true_minus_blank"].value) and found["m_true"].value == pytest.approx(values.mean())

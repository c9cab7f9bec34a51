from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from medvlm_harness.metrics.agreement import cohen_kappa

RNG = np.random.default_rng(11)


@pytest.mark.parametrize("categories", [2, 3, 7])
@pytest.mark.parametrize("n", [5, 40, 590])
def test_equals_an_independent_implementation(categories: int, n: int) -> None:
    first = RNG.integers(0, categories, n)
    second = np.where(RNG.random(n) < 0.6, first, RNG.integers(0, categories, n))
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_perfect_agreement_is_one_and_systematic_disagreement_is_minus_one() -> None:
    assert cohen_kappa([0, 1, 0, 1], [0, 1, 0, 1]) == 1
    assert cohen_kappa([0, 1, 0, 1], [1, 0, 1, 0]) == -1


def test_independent_raters_agree_by_chance_alone() -> None:
    draws = [cohen_kappa(RNG.random(590) < 0.1, RNG.random(590) < 0.3) for _ in range(300)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / math.sqrt(len(draws))


@pytest.mark.parametrize("values", [[], [0, 0, 0]])
def test_it_is_undefined_without_items_or_variation(values: list[int]) -> None:
    assert math.isnan(cohen_kappa(values, values))


def test_a_constant_rater_against_a_varying_one_is_chance() -> None:
    assert cohen_kappa([0, 0, 0, 0], [0, 1, 0, 0]) == 0


def test_wrong_shapes_are_refused() -> None:
    for first, second in (([0, 1], [0]), ([[0]], [[0]])):
        with pytest.raises(ValueError, match="one shape"):
            cohen_kappa(first, second)

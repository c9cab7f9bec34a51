from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from medvlm_harness.metrics.agreement import changed_share, cohen_kappa
from medvlm_harness.metrics.bootstrap import study_weights

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


def test_the_share_of_changed_answers_by_hand() -> None:
    first: list[str | None] = ["a", "b", None, "c", "d", "e"]
    second: list[str | None] = ["a", "x", "c", None, "d", "y"]
    studies = ["s1", "s1", "s2", "s3", "s4", "s5"]
    found = changed_share(first, second, studies, resamples=50, seed=2)
    assert (found.value, found.n) == (0.5, 4)
    weights = study_weights(studies, resamples=50, seed=2)
    known = weights[:, [0, 1, 4, 5]]
    defined = known[known.sum(axis=1) > 0]
    shares = (defined[:, 1] + defined[:, 3]) / defined.sum(axis=1)
    assert found.ci95 == pytest.approx(np.quantile(shares, [0.025, 0.975]))


def test_no_change_that_was_seen_is_not_none_at_all() -> None:
    found = changed_share(["a"] * 20, ["a"] * 20, [f"{k}" for k in range(20)], resamples=10, seed=0)
    assert found.value == 0
    assert found.ci95 == pytest.approx((0, 1.96**2 / (20 + 1.96**2)), abs=1e-3)  # Wilson 1927


def test_answers_that_nobody_knows_have_no_share() -> None:
    assert math.isnan(changed_share([None], ["a"], ["s"], resamples=10, seed=0).value)
    with pytest.raises(ValueError, match="as many answers as studies"):
        changed_share(["a"], ["a"], ["s", "t"], resamples=10, seed=0)

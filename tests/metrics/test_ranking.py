import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from medvlm_harness.metrics.bootstrap import study_weights
from medvlm_harness.metrics.ranking import (
    WeightedRanking,
    auroc,
    average_precision,
    weighted_auroc,
    weighted_average_precision,
)

RNG = np.random.default_rng(7)

two_classes = st.lists(st.tuples(st.booleans(), st.integers(-6, 6)), min_size=2, max_size=40).filter(
    lambda items: len({y for y, _ in items}) == 2
)


def auroc_by_hand(y: list[int], s: list[float]) -> float:
    """Independent and slow: every pair of a positive and a negative."""
    pairs = [(a > b) + (a == b) / 2 for a, i in zip(s, y, strict=True) if i for b, j in zip(s, y, strict=True) if not j]
    return sum(pairs) / len(pairs)


def average_precision_by_hand(y: list[int], s: list[float]) -> float:
    """Independent and slow: at each positive, precision among all items that score at least as high."""
    precision = []
    for score, label in zip(s, y, strict=True):
        if label:
            returned = [b for a, b in zip(s, y, strict=True) if a >= score]
            precision.append(sum(returned) / len(returned))
    return sum(precision) / len(precision)


@pytest.mark.parametrize("n", [5, 60, 590])
@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_equals_scikit_learn_and_the_definition_with_and_without_ties(n: int, levels: int) -> None:
    y = np.r_[1, 0, (RNG.random(n - 2) < 0.2).astype(int)]
    s = RNG.integers(0, levels, n) / levels
    assert auroc(y, s) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    assert auroc(y, s) == pytest.approx(auroc_by_hand(y.tolist(), s.tolist()), abs=1e-12)
    assert average_precision(y, s) == pytest.approx(average_precision_score(y, s), abs=1e-12)
    assert average_precision(y, s) == pytest.approx(average_precision_by_hand(y.tolist(), s.tolist()), abs=1e-12)


@pytest.mark.parametrize("levels", [3, 10_000])
def test_weighted_equals_scikit_learn_with_sample_weight(levels: int) -> None:
    n = 120
    y, s = (RNG.random(n) < 0.15).astype(int), RNG.integers(0, levels, n) / levels
    weights = RNG.poisson(1, size=(60, n))
    auc = [roc_auc_score(y, s, sample_weight=w) for w in weights]
    ap = [average_precision_score(y, s, sample_weight=w) for w in weights]
    assert weighted_auroc(y, s, weights) == pytest.approx(np.array(auc), abs=1e-12)
    assert weighted_average_precision(y, s, weights) == pytest.approx(np.array(ap), abs=1e-12)


def test_a_weight_is_a_number_of_copies() -> None:
    y, s, w = np.array([0, 1, 1, 0, 1]), np.array([0.1, 0.1, 0.5, 0.7, 0.9]), np.array([2, 3, 0, 1, 1])
    assert weighted_auroc(y, s, [w])[0] == pytest.approx(auroc(np.repeat(y, w), np.repeat(s, w)), abs=1e-15)
    assert weighted_average_precision(y, s, [w])[0] == pytest.approx(
        average_precision(np.repeat(y, w), np.repeat(s, w)), abs=1e-15
    )


def test_items_that_do_not_count_are_not_looked_at() -> None:
    y, s = np.array([0, np.nan, 1, 0, 7, 1]), np.array([0.1, 0.1, 0.5, 0.5, np.nan, 0.9])
    known, w = np.array([True, False, True, True, False, True]), RNG.integers(0, 4, (50, 6))
    expected = WeightedRanking(y[known], s[known])(w[:, known])
    assert np.array_equal(WeightedRanking(y, s, known=known)(w), expected, equal_nan=True)


@pytest.mark.parametrize("prevalence", [0.02, 0.2, 0.9])
@pytest.mark.parametrize("levels", [5, 10_000])
def test_each_bootstrap_resample_is_scikit_learns_on_the_resampled_items(prevalence: float, levels: int) -> None:
    n = 400
    y, s = (RNG.random(n) < prevalence).astype(int), RNG.integers(0, levels, n) / levels
    weights = study_weights(np.arange(n) // 2, resamples=30)
    quality = WeightedRanking(y, s)(weights)
    for r, row in enumerate(weights.astype(int)):
        items = np.repeat(np.arange(n), row)
        if y[items].any() and not y[items].all():
            assert quality.auroc[r] == pytest.approx(roc_auc_score(y[items], s[items]), abs=1e-12)
            assert quality.average_precision[r] == pytest.approx(average_precision_score(y[items], s[items]), abs=1e-12)
        else:
            assert np.isnan(quality.auroc[r]) and np.isnan(quality.average_precision[r])


def test_weights_may_be_fractions_and_lie_either_way_in_memory() -> None:
    y, s = np.r_[1, 0, RNG.random(48) < 0.3].astype(int), RNG.integers(0, 9, 50) / 9
    weights = RNG.random((20, 50)) * (RNG.random((20, 50)) < 0.6)
    by_rows, by_columns = (WeightedRanking(y, s)(w) for w in (weights, np.asfortranarray(weights)))
    auc = [roc_auc_score(y, s, sample_weight=w) for w in weights]
    ap = [average_precision_score(y, s, sample_weight=w) for w in weights]
    for quality in (by_rows, by_columns):
        assert quality.auroc == pytest.approx(np.array(auc), abs=1e-12)
        assert quality.average_precision == pytest.approx(np.array(ap), abs=1e-12)


def test_hand_computed() -> None:
    assert auroc([0, 1], [0, 1]) == 1.0
    assert auroc([1, 0], [0, 1]) == 0.0
    assert auroc([0, 0, 1, 1], [1, 3, 2, 4]) == 0.75
    assert average_precision([0, 0, 1, 1], [1, 3, 2, 4]) == pytest.approx((1 + 2 / 3) / 2)


def test_a_constant_score_is_chance_and_not_half_for_average_precision() -> None:
    y = [1] * 5 + [0] * 95
    assert auroc(y, [0.3] * 100) == 0.5
    assert average_precision(y, [0.3] * 100) == pytest.approx(0.05)


@pytest.mark.parametrize("y", [[], [0, 0, 0], [1, 1]])
def test_one_class_or_nothing_is_undefined_not_zero(y: list[int]) -> None:
    scores = [0.1 * i for i in range(len(y))]
    assert np.isnan(auroc(y, scores))
    assert np.isnan(average_precision(y, scores))


def test_a_resample_that_lost_a_class_is_undefined_alone() -> None:
    weights = [[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert np.isnan(weighted_auroc([1, 0, 0], [0.9, 0.1, 0.2], weights)).tolist() == [False, True, True, True]
    assert np.isnan(weighted_average_precision([1, 0, 0], [0.9, 0.1, 0.2], weights)).tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_infinite_scores_have_a_rank() -> None:
    assert auroc([0, 0, 1, 1], [-np.inf, np.inf, np.inf, np.inf]) == 0.75


@settings(deadline=None)
@given(two_classes)
def test_invariant_to_monotone_transforms(items: list[tuple[bool, int]]) -> None:
    y, s = np.array([y for y, _ in items]), np.array([float(s) for _, s in items])
    for transformed in (np.exp(s), 3 * s - 100, np.arctan(s)):
        assert auroc(y, transformed) == auroc(y, s)
        assert average_precision(y, transformed) == average_precision(y, s)


@settings(deadline=None)
@given(two_classes)
def test_swapping_the_classes_mirrors_the_auroc(items: list[tuple[bool, int]]) -> None:
    y, s = np.array([y for y, _ in items]), np.array([float(s) for _, s in items])
    assert auroc(~y, s) == pytest.approx(1 - auroc(y, s), abs=1e-12)
    assert auroc(y, -s) == pytest.approx(1 - auroc(y, s), abs=1e-12)


@pytest.mark.parametrize(
    ("y", "s", "w", "message"),
    [
        ([0, 1], [0.5], [[1, 1]], "one shape"),
        ([0, 2], [0.5, 0.5], [[1, 1]], "only 0 and 1"),
        ([0, -1], [0.5, 0.5], [[1, 1]], "only 0 and 1"),
        ([0, 1], [0.5, np.nan], [[1, 1]], "NaN for 1 of 2"),
        ([0, 1], [0.5, 0.5], [1, 1], r"shape \(resamples, 2\)"),
        ([0, 1], [0.5, 0.5], [[1, -1]], "at least 0"),
    ],
)
def test_wrong_input_says_what_was_expected(y: list[int], s: list[float], w: list[list[int]], message: str) -> None:
    for metric in (weighted_auroc, weighted_average_precision):
        with pytest.raises(ValueError, match=message):
            metric(y, s, w)

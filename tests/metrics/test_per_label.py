import numpy as np
import pytest
from numpy.typing import NDArray

from medvlm_harness.metrics.bootstrap import Weights, bootstrap_estimate, weighted_mean
from medvlm_harness.metrics.per_label import PerLabel, checked_labels

RNG = np.random.default_rng(7)
Y = (RNG.random((80, 3)) < 0.4).astype(float)
X = RNG.normal(size=(80, 3))


def table(y: NDArray[np.float64] = Y) -> PerLabel:
    def statistic(weights: Weights) -> NDArray[np.float64]:
        return np.stack([weighted_mean(x, weights) for x in X[: len(y)].T], axis=1)[:, None]

    return PerLabel(statistic, y, np.arange(len(y)) // 2, ["a", "b", "c"], ["mean"], resamples=100, seed=3)


def test_a_single_label_equals_the_bootstrap_of_its_statistic() -> None:
    alone = bootstrap_estimate(
        lambda w: weighted_mean(X[:, 1], w), np.arange(80) // 2, positives=int(Y[:, 1].sum()), resamples=100, seed=3
    )
    found = table().single("mean", 1)
    assert (found.value, found.stderr, *found.ci95) == pytest.approx((alone.value, alone.stderr, *alone.ci95))
    assert (found.n, found.positives) == (alone.n, alone.positives)


def test_a_difference_is_paired_and_a_mean_shares_the_resamples() -> None:
    def by_hand(values: NDArray[np.float64]) -> tuple[float, float]:
        return bootstrap_estimate(lambda w: weighted_mean(values, w), np.arange(80) // 2, resamples=100, seed=3).ci95

    assert table().difference("mean", 0, 2, extra={}).ci95 == pytest.approx(by_hand(X[:, 0] - X[:, 2]))
    assert table().macro("mean", [0, 1, 2], minimum=1).ci95 == pytest.approx(by_hand(X.mean(axis=1)))


def test_without_items_all_is_undefined() -> None:
    empty = table(Y[:0])
    assert np.isnan(empty.single("mean", 0).value) and np.isnan(empty.macro("mean", [0], minimum=1).value)


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"for 3 studies and 2 keys, but got \(3, 3\)"):
        checked_labels(np.zeros((3, 3)), [1, 2, 3], ["a", "b"])
    with pytest.raises(ValueError, match="only 0, 1 and NaN"):
        checked_labels(np.full((3, 1), 0.5), [1, 2, 3], ["a"])


def test_a_mean_of_differences_is_that_of_each_resample() -> None:
    found = table().mean_difference([("mean", 0, 2), ("mean", 1, 2)], extra={"labels": ["a", "b"]})
    by_hand = bootstrap_estimate(
        lambda w: weighted_mean((X[:, 0] + X[:, 1]) / 2 - X[:, 2], w), np.arange(80) // 2, resamples=100, seed=3
    )
    assert (found.value, *found.ci95) == pytest.approx((by_hand.value, *by_hand.ci95))
    assert (found.n, found.extra["labels"]) == (80, ["a", "b"])


def test_a_mean_without_labels_says_whether_support_or_values_are_missing() -> None:
    assert table().macro("mean", [0], minimum=80).reason == "no label has 80 positives and negatives"
    nothing = PerLabel(lambda w: np.full((len(w), 1, 3), np.nan), Y, np.arange(80), "abc", ["mean"], resamples=5)
    assert nothing.macro("mean", [0], minimum=1).reason == "no label with 1 positives and negatives has a value"

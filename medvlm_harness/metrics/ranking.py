"""Ranking quality of scores for a binary label: area under the ROC curve and average precision.

Both depend on the order of the scores only, and tied scores are never put in an order. The weighted versions take
a block of resamples at once: the scores are sorted once, for all of them, and the sums are as long as the positives are
many.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from medvlm_harness.metrics._arrays import checked_weights, ratio_or_nan, running_sum

__all__ = [
    "RankingQuality",
    "WeightedRanking",
    "auroc",
    "average_precision",
    "weighted_auroc",
    "weighted_average_precision",
]


class RankingQuality(NamedTuple):
    """One value per row of weights; NaN where a class has no weight."""

    auroc: NDArray[np.float64]
    average_precision: NDArray[np.float64]


def auroc(y_true: ArrayLike, score: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counted half; in [0, 1], chance 0.5, higher is better.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        score: any real scale, higher means more likely 1, shape (n,).

    Returns:
        NaN unless both classes are there.

    Source: Hanley and McNeil 1982, Radiology 143(1); equal to scikit-learn's roc_auc_score.

    >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8])
    0.875
    """
    return float(weighted_auroc(y_true, score, np.ones((1, np.size(y_true))))[0])


def average_precision(y_true: ArrayLike, score: ArrayLike) -> float:
    """Precision averaged over the positives; in [0, 1], chance is the prevalence, higher is better.

    The step-wise sum, not the trapezoid: with all scores tied it is the prevalence, where the trapezoid says 0.5.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        score: any real scale, higher means more likely 1, shape (n,).

    Returns:
        NaN unless both classes are there (scikit-learn's average_precision_score says 0 or 1 then).

    Source: Manning et al. 2008, Introduction to Information Retrieval, section 8.4; equal to scikit-learn's.

    >>> average_precision([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1])
    0.8333333333333333
    """
    return float(weighted_average_precision(y_true, score, np.ones((1, np.size(y_true))))[0])


def weighted_auroc(y_true: ArrayLike, score: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """`auroc` once per row of weights; arguments as for `WeightedRanking`."""
    return WeightedRanking(y_true, score)(checked_weights(weights, np.size(y_true))).auroc


def weighted_average_precision(y_true: ArrayLike, score: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """`average_precision` once per row of weights; arguments as for `WeightedRanking`."""
    return WeightedRanking(y_true, score)(checked_weights(weights, np.size(y_true))).average_precision


class WeightedRanking:
    """Both metrics once per row of weights; what does not depend on the weights is done once.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        score: shape (n,).
        known: which items count, shape (n,), bool; what the others hold is not looked at. None: all.
    """

    def __init__(self, y_true: ArrayLike, score: ArrayLike, *, known: ArrayLike | None = None) -> None:
        n = np.size(y_true)
        counted = np.arange(n) if known is None else np.flatnonzero(known)
        y, s = _validated(y_true, score, counted)
        # Only scores that a positive has, the levels, are told apart: weights are added up between them, by products
        # with matrices of zeros and ones, which read the weights as they lie.
        levels, level = np.unique(s[y], return_inverse=True)
        lower, upper = np.searchsorted(levels, s[~y], side="left"), np.searchsorted(levels, s[~y], side="right")
        tied = lower < upper
        self._positives = _added(level, counted[y], (levels.size, n))
        self._negatives = _added(upper, counted[~y], (levels.size + 1, n))
        self._tied = _added(lower[tied], counted[~y][tied], (levels.size, n)) if tied.any() else None

    def __call__(self, weights: NDArray[np.float64]) -> RankingQuality:
        """Both metrics on every resample.

        Args:
            weights: at least 0, shape (resamples, n); fastest where the items of one row lie apart in memory
                (a transposed array), as `resample` hands them out.
        """
        if self._positives.shape[0] == 0:
            nothing = np.full(len(weights), np.nan)
            return RankingQuality(nothing, nothing.copy())
        positive = self._positives @ weights.T  # (levels, resamples)
        negatives_below = running_sum(self._negatives @ weights.T)[1:]  # and all, at the end
        negatives_tied = 0.0 if self._tied is None else self._tied @ weights.T
        positives_from = running_sum(positive[::-1])[:0:-1]  # at a level or above
        positives, negatives = positives_from[0], negatives_below[-1]
        won = np.einsum("lr,lr->r", positive, negatives_below[:-1] + negatives_tied / 2)

        returned = positives_from + (negatives - negatives_below[:-1])
        # What has no weight from a level on returns nothing, and adds nothing: any precision will do.
        precision = np.divide(positives_from, returned, out=np.zeros_like(returned), where=returned > 0)
        gained = np.einsum("lr,lr->r", positive, precision)
        return RankingQuality(
            ratio_or_nan(won, positives * negatives), ratio_or_nan(gained, np.where(negatives > 0, positives, 0))
        )


def _added(row: NDArray[np.intp], item: NDArray[np.intp], shape: tuple[int, int]) -> csr_array:
    """The matrix that adds the weight of each item to its row."""
    return csr_array((np.ones(item.size), (row, item)), shape=shape)


def _validated(
    y_true: ArrayLike, score: ArrayLike, counted: NDArray[np.intp]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    y, s = np.asarray(y_true, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"Expected y_true and score of one shape (n,), but got {y.shape} and {s.shape}.")
    y, s = y[counted], s[counted]
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"Expected y_true to hold only 0 and 1, but got {np.unique(y)[:5]}.")
    if np.isnan(s).any():
        raise ValueError(f"Expected scores that are numbers, but got NaN for {np.isnan(s).sum()} of {s.size} items.")
    return y == 1, s

"""Ranking quality of scores for a binary label: area under the ROC curve and average precision.

Both depend on the order of the scores only, and tied scores are never put in an order. The weighted versions take
a block of resamples at once: the scores are sorted once, for all of them, and what is added up beyond one running sum
is as long as the positives are many.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import checked_weights, ratio_or_nan, running_sum

__all__ = [
    "RankingQuality",
    "auroc",
    "average_precision",
    "weighted_auroc",
    "weighted_average_precision",
    "weighted_ranking",
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
    """`auroc` once per row of weights; arguments as for `weighted_ranking`."""
    return weighted_ranking(y_true, score, weights).auroc


def weighted_average_precision(y_true: ArrayLike, score: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """`average_precision` once per row of weights; arguments as for `weighted_ranking`."""
    return weighted_ranking(y_true, score, weights).average_precision


def weighted_ranking(y_true: ArrayLike, score: ArrayLike, weights: ArrayLike) -> RankingQuality:
    """Both metrics once per row of weights.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        score: shape (n,).
        weights: at least 0, shape (resamples, n); fastest where the items of one row lie apart in memory
            (a transposed array), as `resample` hands them out.
    """
    y, s, w = _validated(y_true, score, weights)
    order = np.argsort(s, kind="stable")
    ascending, positive = s[order], np.flatnonzero(y[order])
    if positive.size == 0:
        nothing = np.full(len(w), np.nan)
        return RankingQuality(nothing, nothing.copy())
    # Of each positive: where the items that tie with it begin and end, and which positive is the first of them.
    begin = np.searchsorted(ascending, ascending[positive], side="left")
    end = np.searchsorted(ascending, ascending[positive], side="right")
    leader = np.searchsorted(positive, begin)

    running = running_sum(w.T[order])  # (n + 1, resamples): weight of everything before an item
    weight = w.T[order[positive]]  # (positives, resamples)
    below, upto, total = running[begin], running[end], running[-1]
    before = running_sum(weight)
    positives_below, positives_upto = before[leader], before[np.searchsorted(positive, end)]
    positives, negatives = before[-1], total - before[-1]

    negatives_below = below - positives_below
    negatives_tied = (upto - below) - (positives_upto - positives_below)
    won = np.einsum("pr,pr->r", weight, negatives_below + negatives_tied / 2)

    returned = total - below
    # What has no weight above a positive of no weight returns nothing, and adds nothing: any precision will do.
    precision = np.divide(positives - positives_below, returned, out=np.zeros_like(returned), where=returned > 0)
    gained = np.einsum("pr,pr->r", weight, precision)
    return RankingQuality(
        ratio_or_nan(won, positives * negatives), ratio_or_nan(gained, np.where(negatives > 0, positives, 0))
    )


def _validated(
    y_true: ArrayLike, score: ArrayLike, weights: ArrayLike
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    y, s = np.asarray(y_true, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"Expected y_true and score of one shape (n,), but got {y.shape} and {s.shape}.")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"Expected y_true to hold only 0 and 1, but got {np.unique(y)[:5]}.")
    if np.isnan(s).any():
        raise ValueError(f"Expected scores that are numbers, but got NaN for {np.isnan(s).sum()} of {s.size} items.")
    return y == 1, s, checked_weights(weights, y.size)

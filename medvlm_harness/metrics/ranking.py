"""Ranking quality of scores for a binary label: area under the ROC curve and average precision.

Both depend on the order of the scores only, and tied scores are never put in an order. The weighted versions take
a block of resamples at once: the scores are sorted once, for all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import checked_weights, ratio_or_nan

__all__ = ["auroc", "average_precision", "weighted_auroc", "weighted_average_precision"]


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
    """`auroc` once per row of weights.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        score: shape (n,).
        weights: at least 0, shape (resamples, n).

    Returns:
        Shape (resamples,); NaN where a class has no weight.
    """
    positive, negative = _tie_groups(*_validated(y_true, score, weights))
    below = np.cumsum(negative, axis=1) - negative
    won = np.einsum("rg,rg->r", positive, below + negative / 2)
    return ratio_or_nan(won, positive.sum(axis=1) * negative.sum(axis=1))


def weighted_average_precision(y_true: ArrayLike, score: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """`average_precision` once per row of weights; arguments and result as for `weighted_auroc`."""
    positive, negative = (group[:, ::-1] for group in _tie_groups(*_validated(y_true, score, weights)))
    found = np.cumsum(positive, axis=1)
    returned = found + np.cumsum(negative, axis=1)
    # Groups without weight at the top return nothing; they add no positives either, so any precision will do.
    precision = np.divide(found, returned, out=np.zeros_like(found), where=returned > 0)
    gained = np.einsum("rg,rg->r", positive, precision)
    return ratio_or_nan(gained, np.where(negative.any(axis=1), positive.sum(axis=1), 0))


def _tie_groups(
    y: NDArray[np.bool_], score: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight of positives and of negatives at each distinct score, ascending; shape (resamples, groups) each."""
    if y.size == 0:
        return np.zeros((len(weights), 1)), np.zeros((len(weights), 1))
    order = np.argsort(score, kind="stable")
    ascending = score[order]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    ordered = weights[:, order]
    total = np.add.reduceat(ordered, starts, axis=1)
    ordered[:, ~y[order]] = 0
    positive = np.add.reduceat(ordered, starts, axis=1)
    return positive, total - positive


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

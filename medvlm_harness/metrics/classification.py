"""Multiclass decisions, one class per item: share of right ones, overall and averaged over the classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import checked_weights, ratio_or_nan

__all__ = ["accuracy", "balanced_accuracy", "weighted_accuracy", "weighted_balanced_accuracy"]


def accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Share of items whose class is right; in [0, 1], higher is better; NaN without items.

    The most frequent class alone scores its share: read it beside that floor, or use `balanced_accuracy`.

    Args:
        y_true: class per item, integers or strings, shape (n,).
        y_pred: class per item, of the same kind, shape (n,).

    >>> accuracy(["PA", "PA", "lateral"], ["PA", "lateral", "lateral"])
    0.6666666666666666
    """
    return float(weighted_accuracy(y_true, y_pred, np.ones((1, np.size(y_true))))[0])


def balanced_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Recall averaged over the classes in y_true; in [0, 1], a constant scores 1 / classes; NaN without items.

    Classes that occur only in y_pred have no recall and do not enter the mean.

    Args:
        y_true: class per item, integers or strings, shape (n,).
        y_pred: class per item, of the same kind, shape (n,).

    Source: Brodersen et al. 2010, ICPR; equal to scikit-learn's balanced_accuracy_score.

    >>> balanced_accuracy([0, 0, 0, 1], [0, 0, 0, 0])
    0.5
    """
    return float(weighted_balanced_accuracy(y_true, y_pred, np.ones((1, np.size(y_true))))[0])


def weighted_accuracy(y_true: ArrayLike, y_pred: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """`accuracy` once per row of weights (resamples, n); shape (resamples,), NaN where nothing has weight."""
    y, p, w = _validated(y_true, y_pred, weights)
    return ratio_or_nan(w @ (y == p).astype(np.float64), w.sum(axis=1))


def weighted_balanced_accuracy(y_true: ArrayLike, y_pred: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """`balanced_accuracy` once per row of weights (resamples, n); shape (resamples,).

    A class that a resample lost is left out of that resample's mean, as scikit-learn does.
    """
    y, p, w = _validated(y_true, y_pred, weights)
    member = (y[:, None] == np.unique(y)).astype(np.float64)
    recall = ratio_or_nan(w @ (member * (y == p)[:, None]), w @ member)
    known = ~np.isnan(recall)
    return ratio_or_nan(np.where(known, recall, 0).sum(axis=1), known.sum(axis=1).astype(np.float64))


def _validated(
    y_true: ArrayLike, y_pred: ArrayLike, weights: ArrayLike
) -> tuple[NDArray[np.generic], NDArray[np.generic], NDArray[np.float64]]:
    y, p = np.asarray(y_true), np.asarray(y_pred)
    if y.shape != p.shape or y.ndim != 1:
        raise ValueError(f"Expected y_true and y_pred of one shape (n,), but got {y.shape} and {p.shape}.")
    # A number never equals its name: 1 and "1" would count as an error of the model.
    if y.size and ((y.dtype.kind in "US") != (p.dtype.kind in "US") or "O" in (y.dtype.kind, p.dtype.kind)):
        raise ValueError(f"Expected classes of one kind, integers or strings, but got {y.dtype} and {p.dtype}.")
    if any(classes.dtype.kind == "f" and np.isnan(classes).any() for classes in (y, p)):
        raise ValueError("Expected a class for each item, but got NaN.")
    return y, p, checked_weights(weights, y.size)

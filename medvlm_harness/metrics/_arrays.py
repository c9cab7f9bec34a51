"""What the metrics that take a block of bootstrap weights have in common."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["checked_weights", "ratio_or_nan", "row_means", "running_sum"]


def checked_weights(weights: ArrayLike, n: int) -> NDArray[np.float64]:
    """Weights as float64, shape (resamples, n), or ValueError."""
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 2 or w.shape[1] != n:
        raise ValueError(f"Expected weights of shape (resamples, {n}), but got {w.shape}.")
    if not (w >= 0).all():
        raise ValueError("Expected weights of at least 0, but got a negative one or NaN.")
    return w


def ratio_or_nan(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part / whole, NaN (not 0, and no warning) where there is no whole."""
    ratio = np.full(part.shape, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def row_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of the defined (not NaN) values of each row; NaN where none is."""
    defined = ~np.isnan(values)
    return ratio_or_nan(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1).astype(np.float64))


def running_sum(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the rows before each row, and of all at the end, shape (n + 1, resamples).

    Row by row: NumPy's own cumsum goes down each column by itself, eight times slower.
    """
    sums = np.zeros((len(rows) + 1, rows.shape[1]))
    for k, row in enumerate(rows):
        np.add(sums[k], row, out=sums[k + 1])
    return sums

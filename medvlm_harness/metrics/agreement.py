"""Agreement of two raters on the same items, beyond what their marginals alone would give."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["cohen_kappa"]


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Cohen's kappa of two raters; at most 1, 0 is chance.

    NaN where it is undefined: no item, or both raters give one and the same value to every item.

    Args:
        first: one category per item, shape (n,).
        second: likewise, of the other rater.

    Raises:
        ValueError: if the shapes differ or are not (n,).

    Source: Cohen 1960, doi 10.1177/001316446002000104, eq. 1.

    >>> cohen_kappa([0, 0, 1, 1], [0, 1, 1, 1])
    0.5
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"Expected two raters of one shape (n,), but got {a.shape} and {b.shape}.")
    if a.size == 0:
        return float("nan")
    expected = float(sum(np.mean(a == value) * np.mean(b == value) for value in np.union1d(a, b)))
    return float((np.mean(a == b) - expected) / (1 - expected)) if expected < 1 else float("nan")

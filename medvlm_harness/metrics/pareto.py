"""Which of several candidates no other beats in everything: the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["pareto_front"]


def pareto_front(values: ArrayLike, *, maximise: Sequence[bool]) -> NDArray[np.bool_]:
    """Whether no other row is at least as good in every column and better in one, (n,).

    Equal rows do not beat each other: all of them are on the front, or none. A row with NaN is never on it and beats
    none. Values count as they are, whatever their intervals.

    Args:
        values: one candidate per row, shape (n, columns).
        maximise: whether more is better, one per column.

    Raises:
        ValueError: if the shapes do not fit.

    >>> pareto_front([[0.9, 8], [0.8, 4], [0.8, 5]], maximise=[True, False]).tolist()
    [True, True, False]
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(maximise) or not maximise:
        raise ValueError(f"Expected values of shape (n, {len(maximise)}) with columns, but got {table.shape}.")
    better = np.where(maximise, table, -table)
    known = ~np.isnan(better).any(axis=1)
    rivals = better[known]
    beaten = [bool(((rivals >= row).all(axis=1) & (rivals > row).any(axis=1)).any()) for row in better]
    return known & ~np.array(beaten, dtype=bool)

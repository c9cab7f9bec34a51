"""Micro precision, recall and F1 of sets that are matched study by study, from counts that can be resampled."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import checked_weights, ratio_or_nan

__all__ = [
    "MatchCounts",
    "count_matches",
    "weighted_micro_f1",
    "weighted_micro_precision",
    "weighted_micro_recall",
]


class MatchCounts(NamedTuple):
    """Distinct items per study; each of shape (n,)."""

    matched: NDArray[np.int64]  # on both sides
    predicted: NDArray[np.int64]
    annotated: NDArray[np.int64]


def count_matches(pairs: Iterable[tuple[AbstractSet[object], AbstractSet[object]]]) -> MatchCounts:
    """Counts of (predicted, annotated) sets, one pair per study."""
    rows = [(len(predicted & annotated), len(predicted), len(annotated)) for predicted, annotated in pairs]
    return MatchCounts(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)


def weighted_micro_f1(counts: MatchCounts, weights: ArrayLike) -> NDArray[np.float64]:
    """F1 of the counts summed over studies, once per row of weights (resamples, n); NaN where there is nothing."""
    w = checked_weights(weights, len(counts.matched))
    return ratio_or_nan(2.0 * (w @ counts.matched), w @ (counts.predicted + counts.annotated))


def weighted_micro_precision(counts: MatchCounts, weights: ArrayLike) -> NDArray[np.float64]:
    """Share of what was predicted that is annotated, as `weighted_micro_f1`; NaN where nothing was predicted."""
    w = checked_weights(weights, len(counts.matched))
    return ratio_or_nan(w @ counts.matched, w @ counts.predicted)


def weighted_micro_recall(counts: MatchCounts, weights: ArrayLike) -> NDArray[np.float64]:
    """Share of what is annotated that was predicted, as `weighted_micro_f1`; NaN where nothing is annotated."""
    w = checked_weights(weights, len(counts.matched))
    return ratio_or_nan(w @ counts.matched, w @ counts.annotated)

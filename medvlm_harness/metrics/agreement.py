"""Agreement of two raters, or two runs, on the same items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics.bootstrap import Weights, resample, sampled_estimate
from medvlm_harness.metrics.estimate import Estimate

__all__ = ["changed_share", "cohen_kappa"]


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


def changed_share(
    first: Sequence[str | None], second: Sequence[str | None], study_ids: ArrayLike, *, resamples: int, seed: int
) -> Estimate:
    """Share of the answers that differ, of those that both gave; in [0, 1]. Wilson's interval at the ends.

    Args:
        first: one answer per item, None where there is none, (n,).
        second: likewise.
        study_ids: the study of each item, (n,).
        resamples: number of resamples.
        seed: the same for all that is to be compared.

    Raises:
        ValueError: if the numbers of answers and studies differ.
    """
    ids = np.asarray(study_ids)
    if not len(first) == len(second) == len(ids):
        raise ValueError(f"Expected as many answers as studies, but got {len(first)}, {len(second)} and {len(ids)}.")
    known = np.array([None not in pair for pair in zip(first, second, strict=True)], dtype=bool)
    if not known.any():
        return Estimate.undefined("no answer is known of both", n=0)
    changed = np.array([a != b for a, b in zip(first, second, strict=True)]) & known

    def statistic(weights: Weights) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return ratio_or_nan(weights @ changed.astype(np.float64), weights @ known.astype(np.float64))

    return sampled_estimate(
        float(changed.sum() / known.sum()),
        resample(statistic, ids, resamples=resamples, seed=seed),
        n=int(known.sum()),
        seed=seed,
        trials=len(np.unique(ids[known])),
    )

"""The same items under several conditions: what each scores, and the first condition less each of the others.

A difference is computed in every resample, so that its interval knows how far the conditions rise and fall together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics.bootstrap import Weights, bootstrap_columns
from medvlm_harness.metrics.estimate import Estimate

__all__ = ["paired_estimates", "paired_names"]


def paired_names(metrics: Sequence[str], conditions: Sequence[str]) -> tuple[str, ...]:
    """The keys of `paired_estimates`, in its order.

    >>> paired_names(["auroc"], ["true", "blank"])
    ('auroc_true', 'auroc_blank', 'auroc_true_minus_blank')
    """
    first, *others = conditions
    kinds = (*conditions, *(f"{first}_minus_{other}" for other in others))
    return tuple(f"{metric}_{kind}" for metric in metrics for kind in kinds)


def paired_estimates(
    statistics: Mapping[str, Callable[[Weights], NDArray[np.float64]]],
    study_ids: ArrayLike,
    metrics: Sequence[str],
    *,
    floors: Mapping[str, float] | None = None,
    extras: Mapping[str, Mapping[str, Any]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every metric under each condition, and the differences, with intervals over studies; by `paired_names`.

    Args:
        statistics: condition -> weights (b, n) to values (b, metrics), NaN where undefined.
        study_ids: the study of each item, shape (n,).
        metrics: the names of the columns.
        floors: metric -> what a constant scores, under every condition; a difference has none.
        extras: metric -> what is added to `extra` of its estimates.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    names = paired_names(metrics, list(statistics))
    kinds = 2 * len(statistics) - 1
    metric_of = [metric for metric in metrics for _ in range(kinds)]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        levels = np.stack([one(weights) for one in statistics.values()], axis=2)  # (b, metrics, conditions)
        differences = levels[:, :, :1] - levels[:, :, 1:]
        return np.concatenate([levels, differences], axis=2).reshape(len(weights), -1)

    is_level = [place % kinds < len(statistics) for place in range(len(names))]
    estimates = bootstrap_columns(
        statistic,
        study_ids,
        positives=[None] * len(names),
        floors=[
            (floors or {}).get(metric) if level else None for metric, level in zip(metric_of, is_level, strict=True)
        ],
        extras=[(extras or {}).get(metric, {}) for metric in metric_of],
        resamples=resamples,
        seed=seed,
    )
    return dict(zip(names, estimates, strict=True))

"""Rare findings: labels grouped by how frequent they are, and what a model reaches in each group.

Groups as in the CXR-LT challenge (Holste et al. 2023, arXiv 2310.16112); the bounds, 10% and 1%, can be set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.per_label import PerLabel, checked_labels
from medvlm_harness.metrics.ranking import WeightedRanking

__all__ = [
    "GROUPS",
    "MINIMUM_SUPPORT",
    "Group",
    "frequency_group",
    "frequency_group_estimates",
    "frequency_group_names",
]

Group = Literal["head", "medium", "tail"]
GROUPS: tuple[Group, ...] = ("head", "medium", "tail")
METRICS = ("auroc", "average_precision", "sensitivity")
MINIMUM_SUPPORT = 10  # positives, and negatives, that a label needs to go into a macro
HEAD, TAIL = 0.10, 0.01


def frequency_group(frequency: float, *, head: float = HEAD, tail: float = TAIL) -> Group:
    """The group of a label.

    Args:
        frequency: share of positives among its labelled items, in [0, 1].
        head: frequency from which on a label is head.
        tail: frequency below which it is tail.

    >>> frequency_group(0.004)
    'tail'
    """
    if not 0 <= tail <= head <= 1:
        raise ValueError(f"Expected 0 <= tail <= head <= 1, but got tail {tail} and head {head}.")
    if not 0 <= frequency <= 1:
        raise ValueError(f"Expected a frequency in [0, 1], but got {frequency}.")
    return "head" if frequency >= head else "tail" if frequency < tail else "medium"


def frequency_group_names() -> tuple[str, ...]:
    """The keys of `frequency_group_estimates`, in its order."""
    return tuple(f"{metric}_{group}" for metric in METRICS for group in GROUPS)


def frequency_group_estimates(
    y_true: ArrayLike,
    score: ArrayLike,
    studies: ArrayLike,
    *,
    keys: Sequence[str],
    thresholds: Sequence[float] | None = None,
    frequency: Sequence[float] | None = None,
    head: float = HEAD,
    tail: float = TAIL,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """AUROC, average precision and sensitivity as means over the labels of each group; by `frequency_group_names`.

    A label with fewer than 10 positives or negatives is in no mean, and named in `left_out_positives`; `extra` also
    holds the positives of those that are in.

    Args:
        y_true: 1, 0, or NaN where unlabelled, shape (n, labels).
        score: any real scale, higher means more likely 1, shape (n, labels).
        studies: the study of each row, (n,).
        keys: the labels' names, (labels,).
        thresholds: from which score on a label is called positive, chosen on validation, NaN where there is none,
            (labels,). None: no sensitivities.
        frequency: of each label, for example in the train split, (labels,); None: in y_true.
        head: see `frequency_group`.
        tail: see `frequency_group`.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    y, s = checked_labels(y_true, studies, keys, score)
    known = ~np.isnan(y)
    rankings = [WeightedRanking(y[:, j], s[:, j], known=known[:, j]) for j in range(len(keys))]
    cuts = np.full(len(keys), np.nan) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    positive = ((y == 1) & ~np.isnan(cuts)).astype(np.float64)
    found = positive * (s >= cuts)

    def statistic(weights: Weights) -> NDArray[np.float64]:
        ranked = np.stack([ranking(weights) for ranking in rankings], axis=2)  # (2, b, labels)
        return np.stack([*ranked, ratio_or_nan(weights @ found, weights @ positive)], axis=1)

    fixed = "" if thresholds is None else "thresholds chosen on validation and held fixed"
    table = PerLabel(statistic, y, studies, keys, METRICS, fixed=fixed, resamples=resamples, seed=seed)
    share = table.prevalence
    group_of = [frequency_group(float(f), head=head, tail=tail) for f in (share if frequency is None else frequency)]
    if len(group_of) != len(keys):
        raise ValueError(f"Expected a frequency for each of {len(keys)} labels, but got {len(group_of)}.")
    floors = {"auroc": np.full(len(keys), 0.5), "average_precision": share}
    return {
        f"{metric}_{group}": table.macro(
            metric,
            [j for j, of_label in enumerate(group_of) if of_label == group],
            minimum=MINIMUM_SUPPORT,
            floors=floors.get(metric),
        )
        for metric in METRICS
        for group in GROUPS
    }

"""Operating points: decision thresholds chosen on validation, and what they do on test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.per_label import PerLabel, checked_labels

__all__ = [
    "MINIMUM_SUPPORT",
    "POINTS",
    "Threshold",
    "choose_thresholds",
    "operating_point_estimates",
    "operating_point_names",
    "sensitivity_threshold",
    "youden_threshold",
]

Floats = NDArray[np.float64]
# What each point asks of validation: a sensitivity, or (None) the largest Youden index.
POINTS: Mapping[str, float | None] = {"youden": None, "sensitivity_90": 0.9, "sensitivity_95": 0.95}
MINIMUM_SUPPORT = 10  # positives, and negatives: of validation for a threshold, of test for a macro
METRICS = ("sensitivity", "specificity", "f1", "ppv", "npv")


@dataclass(frozen=True)
class Threshold:
    """A score from which on an item is called positive, and where it comes from.

    Attributes:
        value: NaN where validation has too few.
        sensitivity: reached on validation.
        specificity: likewise.
        positives: of validation.
        negatives: of validation.
        reason: why there is none.
    """

    value: float
    sensitivity: float
    specificity: float
    positives: int
    negatives: int
    reason: str | None = None


def youden_threshold(y_true: ArrayLike, score: ArrayLike) -> float:
    """The score at which sensitivity + specificity - 1 is largest, called positive from there on.

    Args:
        y_true: 0 or 1 per item, both there, shape (n,).
        score: any real scale, higher means more likely 1, shape (n,).

    Returns:
        One of the scores; of several that are equally good the lowest, which misses fewest.

    Source: Youden 1950, Cancer 3(1).

    >>> youden_threshold([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8])
    0.4
    """
    y, s = _validated(y_true, score)
    levels, level = np.unique(s, return_inverse=True)
    positives, negatives = np.bincount(level, weights=y), np.bincount(level, weights=1 - y)
    # Whole numbers: rounding must not tell equal indices apart.
    missed, rejected = np.cumsum(positives) - positives, np.cumsum(negatives) - negatives
    return float(levels[np.argmax(rejected * positives.sum() - missed * negatives.sum())])


def sensitivity_threshold(y_true: ArrayLike, score: ArrayLike, *, sensitivity: float) -> float:
    """The highest score that still finds this share of the positives; one of theirs.

    Args:
        y_true: 0 or 1 per item, both there, shape (n,).
        score: any real scale, higher means more likely 1, shape (n,).
        sensitivity: at least this, in (0, 1].

    >>> sensitivity_threshold([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8], sensitivity=0.9)
    0.4
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"Expected sensitivity in (0, 1], but got {sensitivity}.")
    y, s = _validated(y_true, score)
    of_positives = np.sort(s[y == 1])[::-1]
    # 0.55 * 100 is 55.00000000000001: rounding must not ask for one more.
    return float(of_positives[int(np.ceil(sensitivity * of_positives.size - 1e-9)) - 1])


def choose_thresholds(y_true: ArrayLike, score: ArrayLike, *, keys: Sequence[str], point: str) -> dict[str, Threshold]:
    """One threshold per label, from validation items.

    A label needs 10 positives and negatives there; a sensitivity of s also needs 1 / (1 - s) positives, for with
    fewer it cannot be told from finding all.

    Args:
        y_true: 1, 0, or NaN where unlabelled, of validation items, shape (n, labels).
        score: any real scale, higher means more likely 1, shape (n, labels).
        keys: the labels' names, (labels,).
        point: a key of `POINTS`.
    """
    if point not in POINTS:
        raise ValueError(f"Expected a point among {', '.join(POINTS)}, but got {point!r}.")
    target = POINTS[point]
    least = MINIMUM_SUPPORT if target is None else max(MINIMUM_SUPPORT, round(1 / (1 - target)))
    y, s = checked_labels(y_true, np.arange(len(np.asarray(y_true))), keys, score)
    chosen = {}
    for j, key in enumerate(keys):
        known = ~np.isnan(y[:, j])
        truth, ranked = y[known, j], s[known, j]
        positives, negatives = int(truth.sum()), int((truth == 0).sum())
        if positives < least or negatives < MINIMUM_SUPPORT:
            reason = (
                f"validation has {positives} positives and {negatives} negatives; "
                f"{point} needs {least} and {MINIMUM_SUPPORT}"
            )
            chosen[key] = Threshold(np.nan, np.nan, np.nan, positives, negatives, reason)
            continue
        if target is None:
            value = youden_threshold(truth, ranked)
        else:
            value = sensitivity_threshold(truth, ranked, sensitivity=target)
        called = ranked >= value
        reached = float(called[truth == 1].mean()), float((~called)[truth == 0].mean())
        chosen[key] = Threshold(value, *reached, positives, negatives)
    return chosen


def operating_point_names(keys: Sequence[str], point: str) -> tuple[str, ...]:
    """The keys of `operating_point_estimates`, in its order: means over labels first.

    >>> operating_point_names(["edema"], "youden")[4:6]
    ('npv_at_youden', 'sensitivity_at_youden_edema')
    """
    names = [f"{metric}_at_{point}" for metric in METRICS]
    return (*names, *(f"{name}_{key}" for key in keys for name in names))


def operating_point_estimates(
    y_true: ArrayLike,
    score: ArrayLike,
    studies: ArrayLike,
    *,
    thresholds: Mapping[str, Threshold],
    point: str,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Sensitivity, specificity, F1, PPV and NPV on test, per label and as means over labels.

    The intervals know test's uncertainty; the thresholds are held fixed, so how far another validation set would have
    moved them is not in there. The floor of F1 and PPV is that of calling everything positive, the floor of NPV that of
    calling everything negative. At 0 and 1, where resamples say nothing, a share has Wilson's interval over studies.

    Args:
        y_true: 1, 0, or NaN where unlabelled, of test items, shape (n, labels).
        score: on the scale that the thresholds were chosen on, shape (n, labels).
        studies: the study of each row, (n,).
        thresholds: by label, in the order of the columns, from `choose_thresholds` on validation.
        point: its name, for the names of the metrics; see `operating_point_names`.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    keys = list(thresholds)
    y, s = checked_labels(y_true, studies, keys, score)
    if np.isnan(s[~np.isnan(y)]).any():
        raise ValueError("Expected scores that are numbers, but got NaN for a labelled item.")
    cuts = np.array([one.value for one in thresholds.values()])
    usable = ~np.isnan(y) & ~np.isnan(cuts)
    called = s >= cuts
    positive, negative = usable & (y == 1), usable & (y == 0)
    cells = [positive & called, positive & ~called, negative & called, negative & ~called]
    as_numbers = [cell.astype(np.float64) for cell in cells]

    def statistic(weights: Weights) -> Floats:
        tp, fn, fp, tn = (weights @ cell for cell in as_numbers)
        shares = [
            ratio_or_nan(tp, tp + fn),
            ratio_or_nan(tn, tn + fp),
            ratio_or_nan(2 * tp, 2 * tp + fp + fn),
            ratio_or_nan(tp, tp + fp),
            ratio_or_nan(tn, tn + fn),
        ]
        return np.stack(shares, axis=1)

    fixed = "thresholds chosen on validation and held fixed"
    table = PerLabel(statistic, y, studies, keys, METRICS, fixed=fixed, resamples=resamples, seed=seed)
    share = table.prevalence
    floors = {"f1": 2 * share / (1 + share), "ppv": share, "npv": 1 - share}
    estimates = {
        f"{metric}_at_{point}": table.macro(
            metric, range(len(keys)), minimum=MINIMUM_SUPPORT, floors=floors.get(metric)
        )
        for metric in METRICS
    }
    ids = np.asarray(studies)
    tp, fn, fp, tn = cells
    for j, (key, threshold) in enumerate(thresholds.items()):
        whole = {"sensitivity": positive, "specificity": negative, "ppv": tp | fp, "npv": tn | fn}
        for metric in METRICS:
            estimates[f"{metric}_at_{point}_{key}"] = table.single(
                metric,
                j,
                why=threshold.reason,
                floor=float(floors[metric][j]) if metric in floors else None,
                minimum=MINIMUM_SUPPORT,
                trials=len(np.unique(ids[whole[metric][:, j]])) if metric in whole else None,
                extra={"threshold": threshold.value},
            )
    return estimates


def _validated(y_true: ArrayLike, score: ArrayLike) -> tuple[Floats, Floats]:
    y, s = np.asarray(y_true, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"Expected y_true and score of one shape (n,), but got {y.shape} and {s.shape}.")
    if set(np.unique(y).tolist()) != {0.0, 1.0}:
        raise ValueError(f"Expected y_true to hold 0 and 1, both, but got {np.unique(y)[:5]}.")
    if np.isnan(s).any():
        raise ValueError(f"Expected scores that are numbers, but got NaN for {np.isnan(s).sum()} of {s.size} items.")
    return y, s

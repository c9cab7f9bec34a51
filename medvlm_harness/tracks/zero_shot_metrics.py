"""The estimates of a zero-shot task from truth, scores and study ids: values, intervals, floors, supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics._arrays import row_means
from medvlm_harness.metrics.auroc_interval import auroc_estimate
from medvlm_harness.metrics.bootstrap import Weights, bootstrap_estimate
from medvlm_harness.metrics.classification import weighted_accuracy, weighted_balanced_accuracy
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.per_label import PerLabel
from medvlm_harness.metrics.ranking import WeightedRanking

__all__ = [
    "MINIMUM_SUPPORT",
    "MULTICLASS",
    "enough_support",
    "macro_auroc",
    "multiclass",
    "multilabel",
    "no_finding",
    "no_finding_column",
    "ranking_table",
]

Array = NDArray[np.float64]
MINIMUM_SUPPORT = 10  # labels with fewer positives or negatives are shown, and left out of macros
MULTICLASS = ("accuracy", "balanced_accuracy", "auroc")


def multilabel(
    y_true: Array,
    margin: Array,
    studies: Sequence[str],
    *,
    keys: Sequence[str],
    subsets: Mapping[str, Sequence[int]],
    findings: Sequence[int] | None,
    others: Mapping[str, Array],
) -> dict[str, Estimate]:
    """Every metric of a multilabel task.

    Args:
        y_true: 1, 0, or NaN where unlabelled or left out, shape (n, labels).
        margin: scores that rank, shape (n, labels).
        studies: the study of each row, (n,).
        keys: the labels' names in metric names, (labels,).
        subsets: name -> columns, each a macro AUROC of its own.
        findings: columns whose absence makes No Finding; None: not asked for.
        others: truth of other label sources, each (n, labels).
    """
    ids = np.asarray(studies)
    everything = range(len(keys))
    table = ranking_table(y_true, margin, studies, keys)
    estimates = {"auroc": _macro_auroc(table, everything)}
    estimates |= {f"auroc_{name}": _complete(_macro_auroc(table, columns)) for name, columns in subsets.items()}
    estimates["average_precision"] = table.macro(
        "average_precision", everything, minimum=MINIMUM_SUPPORT, floors=table.prevalence, ceiling=1.0
    )
    for j, key in enumerate(keys):
        estimates[f"auroc_{key}"] = _single(y_true[:, j], margin[:, j], ids)
    if findings is not None:
        estimates["auroc_no_finding"] = no_finding(y_true[:, findings], margin[:, findings], studies)
    for source, truth in others.items():
        estimates[f"auroc@{source}"] = _macro_auroc(ranking_table(truth, margin, studies, keys), everything)
    return estimates


def multiclass(y_true: Array, probability: Array, margin: Array, studies: Sequence[str]) -> dict[str, Estimate]:
    """Accuracy, balanced accuracy and one-against-rest AUROC of a multiclass task.

    Args:
        y_true: one-hot, shape (n, options).
        probability: rows that sum to 1, shape (n, options); the largest is the answer.
        margin: log-odds of each option, shape (n, options).
        studies: the study of each row, (n,).
    """
    ids = np.asarray(studies)
    truth, answer = y_true.argmax(axis=1), probability.argmax(axis=1)
    share = np.bincount(truth, minlength=y_true.shape[1]) / len(truth)
    present = int((share > 0).sum())
    return {
        "accuracy": bootstrap_estimate(
            lambda weights: weighted_accuracy(truth, answer, weights), ids, floor=float(share.max()), ceiling=1.0
        ),
        "balanced_accuracy": bootstrap_estimate(
            lambda weights: weighted_balanced_accuracy(truth, answer, weights), ids, floor=1 / present, ceiling=1.0
        ),
        "auroc": _macro_auroc(
            ranking_table(y_true, margin, studies, [str(k) for k in range(y_true.shape[1])]), range(y_true.shape[1])
        ),
    }


def enough_support(y_true: Array) -> NDArray[np.bool_]:
    """Which labels of truth (n, labels) go into macros: those with enough positives and negatives; (labels,)."""
    positives, negatives = (y_true == 1).sum(axis=0), (y_true == 0).sum(axis=0)
    return np.asarray(np.minimum(positives, negatives) >= MINIMUM_SUPPORT)


def macro_auroc(y_true: Array, margin: Array, groups: Sequence[Sequence[int]]) -> Callable[[Weights], Array]:
    """Mean AUROC over each group of columns, as a statistic: weights (b, n) to (b, groups); NaN for an empty group.

    Args:
        y_true: as in `multilabel`, shape (n, labels).
        margin: likewise.
        groups: columns that go into each mean.
    """
    rankings = {
        j: WeightedRanking(y_true[:, j], margin[:, j], known=~np.isnan(y_true[:, j]))
        for j in sorted({j for group in groups for j in group})
    }

    def statistic(weights: Weights) -> Array:
        areas = {j: ranking(weights).auroc for j, ranking in rankings.items()}
        nothing = np.full(len(weights), np.nan)
        return np.column_stack([row_means(np.stack([areas[j] for j in g], axis=1)) if g else nothing for g in groups])

    return statistic


def ranking_table(y_true: Array, score: Array, studies: Sequence[str], keys: Sequence[str]) -> PerLabel:
    """AUROC and average precision (`auroc`, `average_precision`) of each label, and in every resample."""
    known = ~np.isnan(y_true)
    rankings = [WeightedRanking(y, s, known=k) for y, s, k in zip(y_true.T, score.T, known.T, strict=True)]

    def statistic(weights: Weights) -> Array:
        return np.stack([ranking(weights) for ranking in rankings]).transpose(2, 1, 0)

    return PerLabel(statistic, y_true, studies, keys, ("auroc", "average_precision"))


def _macro_auroc(table: PerLabel, columns: Sequence[int]) -> Estimate:
    return table.macro("auroc", columns, minimum=MINIMUM_SUPPORT, floors=np.full(len(table.keys), 0.5), ceiling=1.0)


def _complete(estimate: Estimate) -> Estimate:
    """A mean of labels that are known by name: says which of them is missing."""
    left_out = ", ".join(f"{key} ({count})" for key, count in estimate.extra["left_out_positives"].items())
    if not left_out or np.isnan(estimate.value):
        return estimate
    return replace(estimate, reason=f"incomplete: fewer than {MINIMUM_SUPPORT} positives in {left_out}")


def _single(y_true: Array, score: Array, studies: NDArray[np.str_]) -> Estimate:
    """AUROC of one label with an interval that keeps its coverage at few positives."""
    known = ~np.isnan(y_true)
    y, s = y_true[known], score[known]
    positives = int(y.sum())
    if positives in (0, len(y)):
        return Estimate.undefined("only one class among what is labelled", n=len(y), positives=positives)
    few = positives < MINIMUM_SUPPORT or len(y) - positives < MINIMUM_SUPPORT
    return auroc_estimate(
        y,
        s,
        studies[known],
        note=f"fewer than {MINIMUM_SUPPORT} positives or negatives: left out of macros" if few else None,
    )


def no_finding(y_true: Array, margin: Array, studies: Sequence[str]) -> Estimate:
    """AUROC of No Finding; arguments as for `no_finding_column`, and the study of each row, (n,)."""
    truth, score = no_finding_column(y_true, margin)
    return _single(truth, score, np.asarray(studies))


def no_finding_column(y_true: Array, margin: Array) -> tuple[Array, Array]:
    """Truth and score of No Finding, both (n,): minus the highest margin.

    The truth is unknown where no finding is positive and one is unknown.

    Args:
        y_true: as in `multilabel`, of the findings alone, shape (n, findings).
        margin: of these, shape (n, findings); minus infinity for a finding that has no scores.
    """
    any_positive = (y_true == 1).any(axis=1)
    unknown = np.isnan(y_true).any(axis=1) & ~any_positive
    return np.where(unknown, np.nan, 1.0 - any_positive), -margin.max(axis=1)

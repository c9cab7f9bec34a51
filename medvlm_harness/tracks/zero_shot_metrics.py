"""The estimates of a zero-shot task from truth, scores and study ids: values, intervals, floors, supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics._arrays import row_means
from medvlm_harness.metrics.auroc_interval import auroc_estimate
from medvlm_harness.metrics.bootstrap import Weights, bootstrap_estimate, percentile_interval, resample, standard_error
from medvlm_harness.metrics.classification import weighted_accuracy, weighted_balanced_accuracy
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.ranking import WeightedRanking

__all__ = ["MINIMUM_SUPPORT", "MULTICLASS", "enough_support", "macro_auroc", "multiclass", "multilabel", "no_finding"]

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
    macro = _Macro(y_true, margin, ids, keys)
    estimates = {"auroc": macro.auroc(everything)}
    estimates |= {f"auroc_{name}": macro.auroc(columns, complete=True) for name, columns in subsets.items()}
    estimates["average_precision"] = macro.average_precision(everything)
    for j, key in enumerate(keys):
        estimates[f"auroc_{key}"] = _single(y_true[:, j], margin[:, j], ids)
    if findings is not None:
        estimates["auroc_no_finding"] = no_finding(y_true[:, findings], margin[:, findings], studies)
    for source, truth in others.items():
        estimates[f"auroc@{source}"] = _Macro(truth, margin, ids, keys).auroc(everything)
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
        "auroc": _Macro(y_true, margin, ids, [str(k) for k in range(y_true.shape[1])]).auroc(range(y_true.shape[1])),
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


class _Macro:
    """Means over labels, from one set of resamples: each label's AUROC and average precision in every resample."""

    def __init__(self, y_true: Array, score: Array, studies: NDArray[np.str_], keys: Sequence[str]) -> None:
        self.keys, self.n = keys, len(studies)
        self.known = ~np.isnan(y_true)
        self.positives = np.where(self.known, y_true, 0).sum(axis=0).astype(int)
        self.enough = enough_support(y_true)
        self.prevalence = self.positives / np.maximum(self.known.sum(axis=0), 1)
        columns = zip(y_true.T, score.T, self.known.T, strict=True)
        rankings = [WeightedRanking(y, s, known=known) for y, s, known in columns]

        def statistic(weights: Weights) -> Array:
            """AUROC and average precision, (resamples, 2, labels)."""
            return np.stack([ranking(weights) for ranking in rankings]).T

        values = statistic(np.ones((1, self.n)))[0]
        self.values = {"auroc": values[0], "ap": values[1]}
        samples = resample(statistic, studies)
        self.samples = {"auroc": samples[:, 0], "ap": samples[:, 1]}

    def auroc(self, columns: Sequence[int], *, complete: bool = False) -> Estimate:
        """Macro AUROC over the columns with enough support; `complete` says when one is missing."""
        return self._mean("auroc", columns, floor=lambda used: 0.5, complete=complete)

    def average_precision(self, columns: Sequence[int]) -> Estimate:
        """Macro average precision; its floor is the mean prevalence."""
        return self._mean("ap", columns, floor=lambda used: float(self.prevalence[used].mean()), complete=False)

    def _mean(
        self, what: str, columns: Sequence[int], *, floor: Callable[[list[int]], float], complete: bool
    ) -> Estimate:
        used = [j for j in columns if self.enough[j]]
        left_out = {self.keys[j]: int(self.positives[j]) for j in columns if not self.enough[j]}
        listed = ", ".join(f"{key} ({count})" for key, count in left_out.items())
        if not used:
            nothing = Estimate.undefined(f"no label has {MINIMUM_SUPPORT} positives and negatives", n=self.n)
            return replace(nothing, extra={"labels": [], "left_out_positives": left_out})
        samples = self.samples[what][:, used]
        means = row_means(samples)
        low, high, undefined = percentile_interval(means)
        return Estimate(
            value=float(self.values[what][used].mean()),
            stderr=standard_error(means),
            ci95=(low, high),
            n=self.n,
            floor=floor(used),
            ceiling=1.0,
            method=f"mean over labels; bootstrap over studies, {len(samples)} resamples, percentile",
            reason=f"incomplete: fewer than {MINIMUM_SUPPORT} positives in {listed}" if complete and left_out else None,
            extra={
                "labels": [self.keys[j] for j in used],
                "left_out_positives": left_out,
                "undefined_resamples": undefined,
            },
        )


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
    """AUROC of No Finding by minus the highest margin; unknown where no finding is positive and one is unknown.

    Args:
        y_true: as in `multilabel`, of the findings alone, shape (n, findings).
        margin: of these, shape (n, findings).
        studies: the study of each row, (n,).
    """
    any_positive = (y_true == 1).any(axis=1)
    unknown = np.isnan(y_true).any(axis=1) & ~any_positive
    return _single(np.where(unknown, np.nan, 1.0 - any_positive), -margin.max(axis=1), np.asarray(studies))

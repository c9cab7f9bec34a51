"""What the answers of one task are measured by when runs of it are compared, by kind of answer.

Each run becomes a statistic of bootstrap weights, on the items and labels that all runs have answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.errors import UserError
from medvlm_harness.metrics._arrays import ratio_or_nan, row_means
from medvlm_harness.metrics.bootstrap import Weights, weighted_median
from medvlm_harness.metrics.calibration import METRICS as CALIBRATION
from medvlm_harness.metrics.calibration import MINIMUM_SUPPORT as CALIBRATED
from medvlm_harness.metrics.calibration import macro_calibration
from medvlm_harness.metrics.classification import weighted_accuracy, weighted_balanced_accuracy
from medvlm_harness.metrics.ranking import WeightedRanking
from medvlm_harness.metrics.retrieval import RankedQueries, recall_at, reciprocal_rank
from medvlm_harness.results.primary import PRIMARY
from medvlm_harness.results.score_table import ScoreTable
from medvlm_harness.tracks.search import KS
from medvlm_harness.tracks.zero_shot_metrics import enough_support

__all__ = [
    "RECENTRED",
    "K",
    "Measured",
    "Statistic",
    "measure_labels",
    "measure_options",
    "measure_search",
    "measure_values",
    "scored_labels",
    "weighted_means",
]

Floats = NDArray[np.float64]
Statistic = Callable[[Weights], Floats]
Tables = Mapping[str, ScoreTable]
RECENTRED = frozenset({"ece", "ece_equal_mass"})
"""Distances, whose intervals are recentred at the value: see `metrics.calibration`."""
K = 10
"""Of searches: a query finds its counterpart among the first so many, or not."""


@dataclass(frozen=True)
class Measured:
    """What a task's answers are measured by.

    Attributes:
        kind: labels, options, search, values, robustness or image_use.
        metrics: names, in the order of the statistics' columns.
        primary: those that a table shows.
        statistics: run -> weights (b, n) to values (b, metrics); NaN where undefined.
        reasons: metric and run -> why that run has no value.
        ratios: metrics of which the ratio to the reference's is also given.
        extra: of every estimate.
    """

    kind: str
    metrics: tuple[str, ...]
    primary: tuple[str, ...]
    statistics: Mapping[str, Statistic]
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)
    ratios: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)


def measure_labels(tables: Tables) -> Measured:
    """Independent labels: macro AUROC and average precision, and macro calibration of those with enough support."""
    first, scored = next(iter(tables.values())), scored_labels(tables)
    truth = first.target[:, scored]
    ranked = np.flatnonzero(enough_support(truth)).tolist()
    support = np.minimum((truth == 1).sum(axis=0), (truth == 0).sum(axis=0))
    unstated = np.logical_or.reduce([np.isnan(table.probability[:, scored]).any(axis=0) for table in tables.values()])
    stated = np.flatnonzero((support >= CALIBRATED) & ~unstated).tolist()
    names = [first.labels[j] for j in scored]
    ranking = ("auroc", "average_precision")
    reasons = {
        (metric, run): why
        for metrics, used, why in (
            (ranking, ranked, "no label has enough positives and negatives"),
            (CALIBRATION, stated, f"no label has {CALIBRATED} positives and negatives, and probabilities"),
        )
        for metric in metrics
        for run in tables
        if not used
    }
    extra = {"labels": [names[j] for j in ranked], "labels_calibrated": [names[j] for j in stated]}

    def statistic(table: ScoreTable) -> Statistic:
        margin, probability = table.margin[:, scored], table.probability[:, scored]
        rankings = [WeightedRanking(truth[:, j], margin[:, j], known=~np.isnan(truth[:, j])) for j in ranked]
        calibration = macro_calibration(truth[:, stated], probability[:, stated]) if stated else None

        def values(weights: Weights) -> Floats:
            nothing = np.full((len(weights), 1), np.nan)
            quality = np.stack([np.stack(one(weights)) for one in rankings]) if rankings else None  # (labels, 2, b)
            both = [nothing, nothing] if quality is None else [row_means(quality[:, k].T)[:, None] for k in (0, 1)]
            rest = [nothing] * len(CALIBRATION) if calibration is None else [calibration(weights)]
            return np.hstack([*both, *rest])

        return values

    statistics = {name: statistic(table) for name, table in tables.items()}
    return Measured("labels", (*ranking, *CALIBRATION), ("auroc",), statistics, reasons, extra=extra)


def scored_labels(tables: Tables) -> list[int]:
    """The columns of labels that all runs have scores of; a probe has none of a label that it could not learn.

    Raises:
        UserError: if a run scored a label on some documents only, or no label is left.
    """
    missing = np.stack([np.isnan(table.margin) for table in tables.values()])  # (runs, documents, labels)
    if (partly := missing.any(axis=1) & ~missing.all(axis=1)).any():
        run, label = np.argwhere(partly)[0]
        raise UserError(f"lacks scores of {list(tables.values())[run].labels[label]} on some documents")
    scored: list[int] = np.flatnonzero(~missing.any(axis=(0, 1))).tolist()
    if not scored:
        raise UserError("there is no label that all have scores of")
    return scored


def measure_options(tables: Tables) -> Measured:
    """Exclusive options: share of right answers, over items and over classes, and calibration of the answer."""
    first = next(iter(tables.values()))
    for table in tables.values():
        if np.isnan(table.probability).any() or np.isnan(table.target).any():
            raise UserError("it lacks truth or probabilities of some options")
    truth = first.target.argmax(axis=1)
    calibration = tuple(name for name in CALIBRATION if name in RECENTRED)
    columns = [CALIBRATION.index(name) for name in calibration]

    def statistic(table: ScoreTable) -> Statistic:
        answer = table.probability.argmax(axis=1)
        right = (answer == truth).astype(np.float64)[:, None]
        # Rounding may leave a probability of 1 a little above it.
        stated = macro_calibration(right, np.minimum(table.probability.max(axis=1), 1.0)[:, None])
        distance = ((table.probability - first.target) ** 2).sum(axis=1)
        return lambda weights: np.column_stack(
            [
                weighted_accuracy(truth, answer, weights),
                weighted_balanced_accuracy(truth, answer, weights),
                weights @ distance / weights.sum(axis=1),
                stated(weights)[:, columns],
            ]
        )

    statistics = {name: statistic(table) for name, table in tables.items()}
    metrics = ("accuracy", "balanced_accuracy", "brier", *calibration)
    return Measured("options", metrics, ("balanced_accuracy",), statistics)


def measure_search(tables: Tables) -> Measured:
    """Searches: recall, mean reciprocal and median rank of each direction; queries are resampled."""
    directions = next(iter(tables.values())).labels
    known = np.logical_and.reduce([~np.isnan(table.rank) for table in tables.values()])
    means = [(d, what) for d in range(len(directions)) for what in (*(f"recall@{k}" for k in KS), "mrr")]
    names = [f"{directions[d]}_{what}" for d, what in means]
    reasons = {
        (metric, run): "its scores do not hold ties: they are of an earlier version"
        for run, table in tables.items()
        if np.isnan(table.tied[known]).any()
        for metric in names
    }

    def statistic(table: ScoreTable) -> Statistic:
        columns = []
        for d, what in means:
            tied = np.nan_to_num(table.tied[:, d], nan=1.0).astype(np.int64)
            greater = np.nan_to_num(table.rank[:, d] - (tied + 1) / 2).round().astype(np.int64)
            ranked = RankedQueries(greater, tied, known[:, d].astype(np.int64), len(known))
            columns.append(reciprocal_rank(ranked) if what == "mrr" else recall_at(ranked, int(what.partition("@")[2])))
        mean = weighted_means(np.column_stack(columns))
        ranks = np.where(known, table.rank, np.nan)
        return lambda weights: np.column_stack([mean(weights), *(weighted_median(one, weights) for one in ranks.T)])

    statistics = {name: statistic(table) for name, table in tables.items()}
    metrics = (*names, *(f"{direction}_median_rank" for direction in directions))
    return Measured("search", metrics, (f"{directions[0]}_recall@{K}",), statistics, reasons)


def measure_values(tables: Tables, known_metrics: Mapping[str, Any]) -> Measured:
    """One score per study and metric: their means, over the studies for which all runs have one."""
    labels = [label for label in next(iter(tables.values())).labels if label in known_metrics]
    if not labels:
        raise UserError("its scores are of none of its metrics")
    own = {name: table.select(labels).value for name, table in tables.items()}
    known = np.logical_and.reduce([~np.isnan(one) for one in own.values()])
    statistics = {name: weighted_means(np.where(known, one, np.nan)) for name, one in own.items()}
    primary = next((name for name in PRIMARY if name in labels), labels[0])
    return Measured("values", tuple(labels), (primary,), statistics)


def weighted_means(values: Floats) -> Statistic:
    """The weighted mean of each column over what is known of it."""
    known = ~np.isnan(values)
    filled = np.where(known, values, 0)
    return lambda weights: ratio_or_nan(weights @ filled, weights @ known.astype(np.float64))

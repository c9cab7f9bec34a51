"""What runs of a robustness task are compared by: the clean score, what is lost of it, how often decisions flip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.errors import UserError
from medvlm_harness.metrics._arrays import ratio_or_nan, row_means
from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.consistency import UNKNOWN, decide
from medvlm_harness.metrics.robustness import CLEAN
from medvlm_harness.results.comparing.paired_measures import Measured, Statistic, scored_labels, weighted_means
from medvlm_harness.results.score_table import ScoreTable
from medvlm_harness.tracks.zero_shot_metrics import enough_support, macro_auroc

__all__ = ["auroc_under", "measure_robustness"]

Floats = NDArray[np.float64]
Tables = Mapping[str, ScoreTable]
KINDS = ("clean", "drop", "retention", "retention_uncorrected")
FLIPS = "flip_rate"


def measure_robustness(
    tables: Tables, clean: Tables, details: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, Floats]
) -> Measured:
    """Per measure of the task: the clean score, the mean drop over the cases of the suite, and retention.

    `{measure}_retention` is the task's own, (score - floor) / (clean - floor), `_uncorrected` is score / clean.
    `flip_rate`, of labels, is the share of decisions at a run's own thresholds that a case changes, mean over cases.

    Args:
        tables: run -> its answers under all conditions.
        clean: run -> those under the first.
        details: run -> what its results file says of the task; cases and labels are those of the first.
        thresholds: run -> the margin from which on each label is present, NaN where there is none, (labels,).

    Raises:
        UserError: if the scores hold none of the measures.
    """
    first, its = next(iter(clean.values())), next(iter(details.values()))
    cases = [case for members in its["groups"].values() for case in members]
    conditions = [CLEAN, *cases]
    under = {run: table.under(first.labels, conditions) for run, table in tables.items()}
    found: list[tuple[str, dict[str, Statistic]]] = []  # measure, and run -> weights to values (b, conditions)
    labels = scored_labels(clean) if not np.isnan(first.margin).all() else None
    extra: dict[str, Any] = {"cases": len(cases)}
    for measure in its["measures"]:
        column = measure.partition("_recall@")[0]
        if measure == "auroc" and labels is not None:
            used = [j for j in labels if enough_support(first.target)[j]]
            extra["labels"] = [first.labels[j] for j in used]
            margins = {run: [one.margin[:, used] for one in of] for run, of in under.items()}
            found.append((measure, {run: auroc_under(first.target[:, used], of) for run, of in margins.items()}))
        elif column in first.labels and not np.isnan(first.value).all():
            at = first.labels.index(column)
            columns = {run: np.column_stack([one.value[:, at] for one in of]) for run, of in under.items()}
            found.append((measure, {run: weighted_means(values) for run, values in columns.items()}))
    if not found:
        raise UserError(f"its scores hold none of {', '.join(its['measures'])}")
    metrics = [f"{measure}_{kind}" for measure, _ in found for kind in KINDS]
    primary = [f"{measure}_{kind}" for measure, _ in found for kind in ("clean", "retention")]
    statistics = {
        run: [_kept(of_runs[run], _floor(details[run], measure)) for measure, of_runs in found] for run in tables
    }
    if labels is not None and all((~np.isnan(one)).any() for one in thresholds.values()):
        metrics.append(FLIPS)
        primary.append(FLIPS)
        for run, parts in statistics.items():
            parts.append(_flips([decide(one.margin, thresholds[run]) for one in under[run]]))
    reasons = {
        (f"{measure}_retention", run): str(own["reason"])
        for measure, _ in found
        for run in tables
        if (own := details[run]["robustness"][f"{measure}_retention"])["value"] is None
    }
    return Measured(
        "robustness",
        tuple(metrics),
        tuple(primary),
        {run: _beside(parts) for run, parts in statistics.items()},
        reasons,
        ratios=frozenset(f"{measure}_retention" for measure, _ in found),
        extra=extra,
    )


def _floor(details: Mapping[str, Any], measure: str) -> float:
    floor = details["robustness"][f"{measure}_clean"]["floor"]
    return float("nan") if floor is None else float(floor)


def auroc_under(truth: Floats, margins: Sequence[Floats]) -> Statistic:
    """Macro AUROC under each condition: weights (b, n) to values (b, conditions)."""
    every = [list(range(truth.shape[1]))]
    areas = [macro_auroc(truth, margin, every) for margin in margins]
    return lambda weights: np.column_stack([area(weights) for area in areas])


def _kept(levels: Statistic, floor: float) -> Statistic:
    """The values of `KINDS` from those under each condition, clean first."""

    def values(weights: Weights) -> Floats:
        clean, *cases = levels(weights).T
        level = np.mean(cases, axis=0)
        drop = np.mean([clean - case for case in cases], axis=0)
        kept = ratio_or_nan(level - floor, clean - floor)
        return np.column_stack([clean, drop, kept, ratio_or_nan(level, clean)])

    return values


def _flips(decisions: Sequence[NDArray[np.int8]]) -> Statistic:
    """The share of decisions that differ from the clean ones: per label, then means over labels and cases."""
    clean, *cases = decisions
    known = (clean != UNKNOWN).astype(np.float64)
    changed = [((case != clean) & (clean != UNKNOWN)).astype(np.float64) for case in cases]

    def values(weights: Weights) -> Floats:
        whole = weights @ known
        of_cases = np.stack([row_means(ratio_or_nan(weights @ one, whole)) for one in changed])
        mean: Floats = of_cases.mean(axis=0)[:, None]
        return mean

    return values


def _beside(parts: Sequence[Statistic]) -> Statistic:
    return lambda weights: np.hstack([part(weights) for part in parts])

"""What runs of a task on the use of images are compared by: the score under each condition, and what the image adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.paired import paired_names
from medvlm_harness.results.comparing.paired_measures import Measured, Statistic, scored_labels, weighted_means
from medvlm_harness.results.comparing.paired_robustness import auroc_under
from medvlm_harness.results.primary import primary_metric
from medvlm_harness.results.score_table import ScoreTable
from medvlm_harness.tracks.zero_shot_metrics import enough_support

__all__ = ["measure_image_use"]

Tables = Mapping[str, ScoreTable]


def measure_image_use(tables: Tables, clean: Tables, details: Mapping[str, Any]) -> Measured:
    """Metrics named as the task's own: `auroc_true`, `auroc_other`, `auroc_true_minus_other`, or those of ROUGE.

    Args:
        tables: run -> its answers under all conditions.
        clean: run -> those with the study's own images.
        details: what the reference's results file says of the task.

    Raises:
        UserError: if the scores hold none of the task's metrics.
    """
    first, conditions = next(iter(clean.values())), details["conditions"]
    under = {run: table.under(first.labels, conditions) for run, table in tables.items()}
    levels: dict[str, dict[str, Statistic]] = {}  # metric -> run -> weights to values (b, conditions)
    extra: dict[str, Any] = {}
    if not np.isnan(first.margin).all():
        used = [j for j in scored_labels(clean) if enough_support(first.target)[j]]
        extra["labels"] = [first.labels[j] for j in used]
        truth = first.target[:, used]
        levels["auroc"] = {run: auroc_under(truth, [one.margin[:, used] for one in of]) for run, of in under.items()}
    else:
        for j, label in enumerate(first.labels):
            if f"{label}_{conditions[0]}" in details["metrics"]:
                levels[label] = {
                    run: weighted_means(np.column_stack([one.value[:, j] for one in of])) for run, of in under.items()
                }
    metrics = paired_names(list(levels), conditions)
    primary = primary_metric({"metrics": dict.fromkeys(metrics)})
    if primary is None:
        raise UserError("its scores are of none of its metrics")
    statistics = {run: _with_differences([of_runs[run] for of_runs in levels.values()]) for run in tables}
    return Measured("image_use", metrics, (primary,), statistics, extra=extra)


def _with_differences(levels: list[Statistic]) -> Statistic:
    """Of each metric the values under all conditions, then the first less each of the others."""

    def values(weights: Weights) -> NDArray[np.float64]:
        parts = []
        for level in levels:
            under = level(weights)
            parts += [under, under[:, :1] - under[:, 1:]]
        return np.hstack(parts)

    return values

"""The one declared primary metric of each track: what a comparison tests first, and a leaderboard shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRIMARY", "primary_metric", "score_of"]

PRIMARY = (
    "balanced_accuracy",  # exclusive options, such as the view
    "auroc",  # independent labels: zero-shot, rare findings, probes
    "i2t_recall@10",  # searches, from the image or the longer text
    "f2i_recall@10",
    "acc",  # choice
    "rougeL",  # texts that are written
    "mesh_f1",  # entities
    "entity_f1",
    "entity_span_f1",
    "latency_p50",  # cost
)
"""A task's primary metric is the first of these that it has, or what it makes of the first: see `DERIVED`."""
# Robustness is what is left of the metric, the use of the image what the true one adds to another patient's.
DERIVED = ("", "_retention", "_true_minus_other")


def primary_metric(details: Mapping[str, Any]) -> str | None:
    """The name of a task's primary metric; None for a task of somebody else's that has none of ours.

    Args:
        details: what a results file says of the task.

    >>> primary_metric({"metrics": {"rouge1": {}, "rougeL_clean": {}, "rougeL_retention": {}}})
    'rougeL_retention'
    """
    names = (f"{metric}{suffix}" for metric in PRIMARY for suffix in DERIVED)
    return next((name for name in names if name in details["metrics"]), None)


def score_of(metric: str) -> str:
    """What a task scores each answer by, of which the metric is made.

    >>> score_of("rougeL_true_minus_other")
    'rougeL'
    """
    for suffix in ("_clean", *DERIVED):
        metric = metric.removesuffix(suffix)
    return metric

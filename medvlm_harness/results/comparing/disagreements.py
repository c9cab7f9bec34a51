"""The studies on which two runs of a task disagree, those first where they are furthest apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics.consistency import UNKNOWN, decide
from medvlm_harness.results.comparing.paired_measures import K
from medvlm_harness.results.comparing.paired_scores import first_condition, own_thresholds
from medvlm_harness.results.primary import score_of
from medvlm_harness.results.score_table import ScoreTable

__all__ = ["disagreements"]

Floats = NDArray[np.float64]


def disagreements(
    kind: str,
    measure: str,
    tables: tuple[ScoreTable, ScoreTable],
    details: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One mapping per document and label on which the second run answered otherwise than the first.

    Labels: another decision, each run at its own thresholds (fitted on validation), or at a probability of 0.5 where
    there are none. Exclusive options: another answer. Searches: the counterpart among the first ten of one run only.
    Texts and choices: another score.

    Args:
        kind: see `paired_measures.Measured`; of several conditions, the answers under the first.
        measure: the primary metric, for tasks that score texts.
        tables: of the reference and of the run, on the same documents and labels.
        details: what their results files say of the task.

    Returns:
        `study`, `image`, `label`, `target`, `reference`, `run` (what each said), `right` (which of them, or None), and
        `distance`: between the places of the score among all of its run (labels; in [0, 1]), probabilities of the
        right option, ranks or scores.
    """
    labels = first_condition(tables[0], details[0])
    first, other = (table.select(labels) for table in tables)
    if not np.isnan(first.rank).all():
        found = _searches(first, other)
    elif kind == "options":
        found = _options(first, other)
    elif not np.isnan(first.margin).all():
        found = _decisions(first, other, (own_thresholds(labels, details[0]), own_thresholds(labels, details[1])))
    else:
        found = _values(first, other, score_of(measure))
    return sorted(found, key=lambda row: (-row["distance"], row["study"], row["image"], row["label"]))


def _row(
    table: ScoreTable, at: int, label: str, target: Any, said: tuple[Any, Any], right: str | None, distance: float
) -> dict[str, Any]:
    study, image = table.documents[at]
    return {
        "study": study,
        "image": image,
        "label": label,
        "target": target,
        "reference": said[0],
        "run": said[1],
        "right": right,
        "distance": float(distance),
    }


def _decisions(first: ScoreTable, other: ScoreTable, cuts: tuple[Floats, Floats]) -> list[dict[str, Any]]:
    said = []
    for table, own in zip((first, other), cuts, strict=True):
        unfitted = np.isnan(cuts[0] + cuts[1]).all()
        said.append(decide(table.probability, np.full(len(own), 0.5)) if unfitted else decide(table.margin, own))
    places = [_places(table.margin) for table in (first, other)]
    apart = np.abs(places[0] - places[1])
    differ = (said[0] != said[1]) & (said[0] != UNKNOWN) & (said[1] != UNKNOWN) & ~np.isnan(apart)
    found = []
    for at, j in zip(*np.nonzero(differ), strict=True):
        target = first.target[at, j]
        right = None if np.isnan(target) else "reference" if said[0][at, j] == target else "run"
        both = int(said[0][at, j]), int(said[1][at, j])
        truth = None if np.isnan(target) else int(target)
        found.append(_row(first, at, first.labels[j], truth, both, right, apart[at, j]))
    return found


def _places(scores: Floats) -> Floats:
    """Each score's place among its column, in [0, 1]; NaN where there is none."""
    known = ~np.isnan(scores)
    order = np.argsort(np.argsort(np.where(known, scores, np.inf), axis=0, kind="stable"), axis=0, kind="stable")
    return np.where(known, order / np.maximum(known.sum(axis=0) - 1, 1), np.nan)


def _options(first: ScoreTable, other: ScoreTable) -> list[dict[str, Any]]:
    answers = [table.probability.argmax(axis=1) for table in (first, other)]
    truth = first.target.argmax(axis=1)
    found = []
    for at in np.flatnonzero(answers[0] != answers[1]).tolist():
        a, b, target = (int(one[at]) for one in (*answers, truth))
        right = "reference" if a == target else "run" if b == target else None
        apart = abs(first.probability[at, target] - other.probability[at, target])
        name: Sequence[str] = first.labels
        found.append(_row(first, at, "", name[target], (name[a], name[b]), right, apart))
    return found


def _searches(first: ScoreTable, other: ScoreTable) -> list[dict[str, Any]]:
    known = ~np.isnan(first.rank + other.rank)
    differ = known & ((first.rank <= K) != (other.rank <= K))
    found = []
    for at, j in zip(*np.nonzero(differ), strict=True):
        both = float(first.rank[at, j]), float(other.rank[at, j])
        right = "reference" if both[0] <= K else "run"
        found.append(_row(first, at, first.labels[j], None, both, right, abs(both[0] - both[1])))
    return found


def _values(first: ScoreTable, other: ScoreTable, measure: str) -> list[dict[str, Any]]:
    j = first.labels.index(measure) if measure in first.labels else 0
    differ = first.value[:, j] != other.value[:, j]
    found = []
    for at in np.flatnonzero(differ & ~np.isnan(first.value[:, j] + other.value[:, j])).tolist():
        both = float(first.value[at, j]), float(other.value[at, j])
        right = "reference" if both[0] > both[1] else "run"
        found.append(_row(first, at, first.labels[j], None, both, right, abs(both[0] - both[1])))
    return found

"""ROC and precision-recall curves, drawn from the scores that runs wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import label_key
from medvlm_harness.results.plots import house_style
from medvlm_harness.results.report.drawing import labelled, legend, look, small_multiples, thinned
from medvlm_harness.results.report.labels import has_labels, label_estimates
from medvlm_harness.results.report.parts import Plot, Section
from medvlm_harness.results.report.runs import Group, ReportRuns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curves_section", "precision_recall", "roc"]

Floats = NDArray[np.float64]
Points = list[tuple[float, float]]
PANELS = 8  # labels with most positives
MINIMUM = 10  # positives and negatives: with fewer a curve is a handful of steps


def roc(target: Floats, score: Floats) -> Points:
    """False positive rate and sensitivity at every threshold, from (0, 0); equal scores pass together.

    Args:
        target: 1 or 0, shape (n,), both among them.
        score: higher for 1, shape (n,).
    """
    positives, counted = _passing(target, score)
    negatives = counted - positives
    rates = zip((negatives / negatives[-1]).tolist(), (positives / positives[-1]).tolist(), strict=True)
    return _corners([(0.0, 0.0), *rates])


def precision_recall(target: Floats, score: Floats) -> Points:
    """Recall and precision at every threshold, from the highest score on; equal scores pass together.

    Args:
        target: 1 or 0, shape (n,), with a 1.
        score: higher for 1, shape (n,).
    """
    positives, counted = _passing(target, score)
    return list(zip((positives / positives[-1]).tolist(), (positives / counted).tolist(), strict=True))


def _passing(target: Floats, score: Floats) -> tuple[Floats, Floats]:
    """At each distinct score from the top: positives, and items, that score as high or higher."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=np.nan) != 0)
    return np.cumsum(target[order])[ends], (ends + 1).astype(np.float64)


def _corners(points: Points) -> Points:
    """Without the points that lie on a straight line between their neighbours."""
    kept = points[:1]
    for before, (x, y), after in zip(points, points[1:], points[2:], strict=False):
        if (x - before[0]) * (after[1] - y) != (y - before[1]) * (after[0] - x):
            kept.append((x, y))
    return [*kept, points[-1]]


class _Kind:
    """What is drawn: a curve of a label, and what guessing gives."""

    def __init__(self, title: str, axes: tuple[str, str], curve: Callable[[Floats, Floats], Points]) -> None:
        self.title, self.axes, self.curve = title, axes, curve


KINDS = {
    "roc": _Kind("ROC", ("False positive rate", "Sensitivity"), roc),
    "pr": _Kind("Precision and recall", ("Recall (sensitivity)", "Precision (PPV)"), precision_recall),
}


def curves_section(runs: ReportRuns) -> Section | None:
    """ROC and precision-recall of the labels with most positives, for every task that scores labels."""
    parts: list[Plot] = []
    for group in runs.groups(has_labels):
        labels = _labels(runs, group)
        if not labels:
            continue
        for name, kind in KINDS.items():
            lines, prevalence = _lines(runs, group, labels, kind)
            if not lines:
                continue
            alt = f"{kind.axes[1]} against {kind.axes[0].lower()} of {len(labels)} findings, one line per run."
            data = [
                {"label": labelled(label), "run": run, kind.axes[0]: x, kind.axes[1]: y}
                for (label, run), points in lines.items()
                for x, y in points
            ]
            draw = partial(_draw, name, labels, runs.places(group.runs), lines, prevalence)
            parts.append(Plot(f"{name}_{group.name}", kind.title, alt, draw, data, group.title))
    text = (
        f"The findings with most positives, at most {PANELS}, from what each run answered for each item. Dashed: "
        "guessing, which for precision is the prevalence. Where a finding is rare, read the second kind: precision "
        "says how many alarms are real.",
    )
    return Section("curves", "ROC and precision-recall", text, parts) if parts else None


def _labels(runs: ReportRuns, group: Group) -> list[str]:
    """Those that enough items are positive and negative for, most positives first."""
    found = label_estimates(runs, group)
    enough = []
    for label, values in found.items():
        one = next(iter(values.values()))
        if min(one.positives or 0, one.n - (one.positives or 0)) >= MINIMUM and label != "no_finding":
            enough.append(label)
    return enough[:PANELS]


def _lines(
    runs: ReportRuns, group: Group, labels: Sequence[str], kind: _Kind
) -> tuple[dict[tuple[str, str], Points], dict[str, float]]:
    """(label, run) -> curve, and label -> prevalence."""
    lines: dict[tuple[str, str], Points] = {}
    prevalence: dict[str, float] = {}
    for run in group.runs:
        table = runs.scores(run, group.task)
        if table is None:
            continue
        places = {label_key(label): j for j, label in enumerate(table.labels)}
        for label in labels:
            if (j := places.get(label)) is None:
                continue
            target, score = table.target[:, j], table.margin[:, j]
            known = ~np.isnan(target) & ~np.isnan(score)
            target, score = target[known], score[known]
            if 0 < target.sum() < len(target):
                lines[label, run] = thinned(kind.curve(target, score))
                prevalence[label] = float(target.mean())
    return lines, prevalence


def _draw(
    name: str,
    labels: Sequence[str],
    runs: Mapping[str, int],
    lines: Mapping[tuple[str, str], Points],
    prevalence: Mapping[str, float],
) -> Figure:
    kind = KINDS[name]
    guess: Any = {"color": "#777777", "linewidth": 0.9, "linestyle": (0, (3, 2))}
    with house_style():
        figure, panels = small_multiples(len(labels), sharex=True, sharey=True)
        for panel, label in zip(panels, labels, strict=True):
            for run, place in runs.items():
                if points := lines.get((label, run)):
                    style = {**look(place), "marker": None}
                    panel.plot(*zip(*points, strict=True), label=run, **style)
            level = prevalence.get(label, float("nan"))
            panel.plot([0, 1], [0, 1] if name == "roc" else [level, level], **guess)
            panel.set_title(labelled(label))
            panel.set_xlim(-0.02, 1.02)
            panel.set_ylim(-0.02, 1.02)
        figure.supxlabel(kind.axes[0], fontsize=9)
        figure.supylabel(kind.axes[1], fontsize=9)
        legend(figure, panels)
    return figure

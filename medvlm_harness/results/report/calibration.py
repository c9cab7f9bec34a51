"""Whether a stated probability is what happens: reliability before and after scaling, and calibration errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from medvlm_harness.metrics.calibration import MINIMUM_SUPPORT
from medvlm_harness.results.plots import house_style
from medvlm_harness.results.report.drawing import labelled, legend, look, small_multiples
from medvlm_harness.results.report.parts import Cell, Column, Plot, Section, Table
from medvlm_harness.results.report.runs import Group, ReportRuns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["calibration_section"]

PANELS = 4  # labels with most positives
ECE = "ece_equal_mass"  # bins of equal counts: with equal widths the upper bins hold a handful of items
METRICS = {
    "ece": ("ECE", "lower"),
    "ece_scaled": ("ECE, scaled", "lower"),
    "ece_equal_mass": ("ECE, equal mass", "lower"),
    "ece_equal_mass_scaled": ("ECE, equal mass, scaled", "lower"),
    "brier_skill": ("Brier skill", "higher"),
    "brier_skill_scaled": ("Brier skill, scaled", "higher"),
}
Tables = Mapping[tuple[str, str, str], Mapping[str, Any]]  # (when, label, run) -> reliability table
WHEN = {"before": "as answered", "after": "scaled on validation"}


def calibration_section(runs: ReportRuns) -> Section | None:
    """Reliability diagrams and calibration errors of every task whose answers are probabilities."""
    parts: list[Table | Plot] = []
    for group in runs.groups(lambda details: "ece" in details["metrics"]):
        labels = _labels(runs, group)
        tables = _tables(runs, group, labels)
        labels = [label for label in labels if any(label == its for _, its, _ in tables)]
        if tables:
            parts.append(
                Plot(
                    f"reliability_{group.name}",
                    "Reliability",
                    f"Observed share of positives against stated probability for {len(labels)} findings: as answered, "
                    "and after scaling on validation where there was one. On the diagonal both agree.",
                    partial(_draw, labels, runs.places(group.runs), tables),
                    _data(tables),
                    group.title,
                )
            )
        parts.append(_errors(runs, group))
    text = (
        "A point on the diagonal means that of the items given this probability so many are positive. Bins hold equal "
        f"numbers of items; shown are findings with at least {MINIMUM_SUPPORT} positives. ECE: mean distance from "
        "the diagonal (its floor: what a perfect model scores by chance at this sample size). Brier skill is the share "
        "of error saved against always stating the prevalence: below 0 the probabilities do harm. Scaled: the same "
        "answers after a temperature or Platt scaling that was fitted on validation.",
    )
    return Section("calibration", "Calibration", text, parts) if parts else None


def _by_label(details: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Label -> its calibration errors, and `scaled`; of tasks with one answer per item the answer itself."""
    metrics = details["metrics"]
    if (metrics.get(ECE) or {}).get("extra", {}).get("reliability"):
        return {"answer": {ECE: metrics[ECE], "scaled": {ECE: metrics.get(f"{ECE}_scaled")}}}
    return {label: one for label, one in (details.get("calibration") or {}).items() if ECE in one}


def _labels(runs: ReportRuns, group: Group) -> list[str]:
    """Those with enough positives and negatives in some run, most positives first."""
    found: dict[str, int] = {}
    for run in group.runs:
        for label, one in _by_label(runs.files[run].tasks[group.task]).items():
            n = one[ECE]["n"]
            positives = n if label == "answer" else one[ECE]["positives"] or 0
            if positives >= MINIMUM_SUPPORT and (label == "answer" or n - positives >= MINIMUM_SUPPORT):
                found[label] = positives
    return sorted(found, key=lambda label: -found[label])[:PANELS]


def _tables(runs: ReportRuns, group: Group, labels: Sequence[str]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    tables: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for run in group.runs:
        of_run = _by_label(runs.files[run].tasks[group.task])
        for label in labels:
            of_label = of_run.get(label) or {}
            for when, its in (("before", of_label), ("after", of_label.get("scaled") or {})):
                reliability = ((its.get(ECE) or {}).get("extra") or {}).get("reliability")
                if reliability and reliability["confidence"]:
                    tables[when, label, run] = reliability
    return tables


def _data(tables: Tables) -> list[dict[str, object]]:
    return [
        {"probabilities": WHEN[when], "label": labelled(label), "run": run, "stated": p, "observed": q, "items": n}
        for (when, label, run), table in tables.items()
        for p, q, n in zip(table["confidence"], table["frequency"], table["support"], strict=True)
    ]


def _draw(labels: Sequence[str], runs: Mapping[str, int], tables: Tables) -> Figure:
    rows = [when for when in WHEN if any(when == its for its, _, _ in tables)]
    highest = max(max(*table["confidence"], *table["frequency"]) for table in tables.values())
    top = min(1.0, 1.1 * highest) + 0.02
    with house_style():
        figure, panels = small_multiples(len(labels), rows=len(rows), sharex=True, sharey=True)
        for k, panel in enumerate(panels):
            when, label = rows[k // len(labels)], labels[k % len(labels)]
            panel.plot([0, 1], [0, 1], color="#777777", linewidth=0.9, linestyle=(0, (3, 2)))
            for run, place in runs.items():
                if table := tables.get((when, label, run)):
                    panel.plot(table["confidence"], table["frequency"], markersize=3.5, label=run, **look(place))
            panel.set_title(f"{labelled(label)}\n{WHEN[when]}")
            panel.set_xlim(-0.01, top)
            panel.set_ylim(-0.01, top)
        figure.supxlabel("Stated probability", fontsize=9)
        figure.supylabel("Observed share", fontsize=9)
        legend(figure, panels)
    return figure


def _errors(runs: ReportRuns, group: Group) -> Table:
    rows: list[dict[str, Cell]] = []
    for run in group.runs:
        found = {metric: runs.estimate(run, group.task, metric) for metric in METRICS}
        rows.append({"run": run, **found})
    shown = [metric for metric in METRICS if any(row[metric] is not None for row in rows)]
    columns = [
        Column("run", "Run"),
        *(
            Column(metric, METRICS[metric][0], "lower" if METRICS[metric][1] == "lower" else "higher")
            for metric in shown
        ),
    ]
    return Table(f"calibration_{group.name}", "Calibration errors", columns, rows, about=group.title)

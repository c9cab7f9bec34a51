"""What is gained by leaving the least confident answers to a person: risk against coverage."""

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

__all__ = ["selective_section"]

PANELS = 4  # labels with most positives
AURC = "aurc"
COLUMNS = (
    Column("run", "Run"),
    Column("aurc", "AURC", "lower", "area under risk-coverage; its floor: answers handed over at random"),
    Column("excess_aurc", "Excess AURC", "lower", "above that of the best possible order"),
    Column("coverage_at_sensitivity_90", "Coverage", "higher", "share kept at the threshold for 90% sensitivity"),
    Column("accepted_sensitivity_90", "Sensitivity reached", None, "of what is kept at that threshold"),
)
Curves = Mapping[tuple[str, str], Mapping[str, Any]]  # (label, run) -> coverage and risk


def selective_section(runs: ReportRuns) -> Section | None:
    """Risk-coverage curves, and their areas, of every task that has them."""
    parts: list[Table | Plot] = []
    for group in runs.groups(lambda details: AURC in details["metrics"]):
        curves, labels = _curves(runs, group)
        if curves:
            data = [
                {"label": labelled(label), "run": run, "coverage": coverage, "risk": risk}
                for (label, run), curve in curves.items()
                for coverage, risk in zip(curve["coverage"], curve["risk"], strict=True)
            ]
            alt = f"Share of wrong answers against the share of items that the model keeps, for {len(labels)} findings."
            draw = partial(_draw, labels, runs.places(group.runs), curves)
            parts.append(Plot(f"selective_{group.name}", "Risk and coverage", alt, draw, data, group.title))
        rows: list[dict[str, Cell]] = [
            {"run": run, **{column.key: runs.estimate(run, group.task, column.key) for column in COLUMNS[1:]}}
            for run in group.runs
        ]
        name, title = f"selective_{group.name}", "Selective prediction"
        parts.append(Table(name, title, COLUMNS, rows, about=group.title))
    text = (
        "If the model keeps only the items it is most sure of and a person reads the rest, how often is it wrong on "
        "those it keeps? A useful curve falls to the left; a flat one means that its confidence says nothing. "
        "Thresholds are chosen on validation.",
    )
    return Section("selective", "When to hand over to a person", text, parts) if parts else None


def _curves(runs: ReportRuns, group: Group) -> tuple[dict[tuple[str, str], Mapping[str, Any]], list[str]]:
    curves: dict[tuple[str, str], Mapping[str, Any]] = {}
    support: dict[str, int] = {}
    for run in group.runs:
        for label, one in (runs.files[run].tasks[group.task].get("selective") or {}).items():
            curve, aurc = one.get("curve"), one.get(AURC)  # without an area of its own the answer itself is meant
            n = aurc["n"] if aurc else runs.files[run].tasks[group.task]["scored"]
            positives = (aurc["positives"] or 0) if aurc else n
            enough = min(positives, n - positives) if aurc else n
            if curve and curve["coverage"] and enough >= MINIMUM_SUPPORT:
                curves[label, run] = curve
                support[label] = positives
    labels = sorted(support, key=lambda label: -support[label])[:PANELS]
    return {key: curve for key, curve in curves.items() if key[0] in labels}, labels


def _draw(labels: Sequence[str], runs: Mapping[str, int], curves: Curves) -> Figure:
    with house_style():
        figure, panels = small_multiples(len(labels), sharex=True)
        for panel, label in zip(panels, labels, strict=True):
            for run, place in runs.items():
                if curve := curves.get((label, run)):
                    panel.plot(curve["coverage"], curve["risk"], label=run, **{**look(place), "marker": None})
            panel.set_title(labelled(label))
            panel.set_xlim(0, 1.02)
            panel.set_ylim(bottom=0)
        figure.supxlabel("Coverage: share of items kept", fontsize=9)
        figure.supylabel("Risk: share wrong", fontsize=9)
        legend(figure, panels)
    return figure

"""Whether groups of patients are served alike: AUROC of each subgroup, gaps, and where there are too few to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.report.drawing import Row, counts_text, forest, forest_data, labelled
from medvlm_harness.results.report.parts import Cell, Column, Plot, Section, Table
from medvlm_harness.results.report.runs import Group, ReportRuns
from medvlm_harness.results.subgroup_tables import GAPS, NO_FINDING

__all__ = ["subgroups_section"]

CELL = tuple[str, str, str]  # attribute, label, subgroup


def subgroups_section(runs: ReportRuns) -> Section | None:
    """AUROC by subgroup, drawn, the gaps between subgroups, and the cells that hold too few."""
    parts: list[Table | Plot] = []
    for group in runs.groups(lambda details: bool(details.get("subgroups"))):
        cells = _sufficient(runs, group)
        rows = [
            Row(
                f"{labelled(attribute)}: {labelled(name)}\n{labelled(label)}",
                counts_text(one.positives, one.n),
                values,
                one.floor,
            )
            for (attribute, label, name), values in cells.items()
            if (one := next(iter(values.values())))
        ]
        if rows:
            parts.append(
                Plot(
                    f"subgroups_{group.name}",
                    "AUROC by subgroup",
                    f"Forest plot of {len(rows)} subgroups and findings with enough items, for {len(group.runs)} runs.",
                    partial(forest, rows, runs.places(group.runs), measure="AUROC, 95% interval", support="positive/n"),
                    forest_data(rows, group.runs),
                    group.title,
                )
            )
        parts.append(_gaps(runs, group))
        parts.append(_table(runs, group, cells))
        if healthy := _healthy(runs, group):
            parts.append(healthy)
    text = (
        "Gaps are the highest subgroup less the lowest, as means over the findings that have at least two subgroups of "
        "20 positives and 20 negatives; a gap is at least 0 by construction, so read its interval. Underdiagnosis: "
        "patients with a finding who are called healthy. Subgroups with fewer are said to be insufficient; "
        "counts below 10 are not shown.",
    )
    return Section("subgroups", "Subgroups of patients", text, parts) if parts else None


def _subgroups(runs: ReportRuns, run: str, task: str) -> Iterator[tuple[CELL, Mapping[str, Any]]]:
    """Each subgroup of each attribute, as to each label."""
    for attribute, labels in runs.files[run].tasks[task]["subgroups"].items():
        for label, found in labels.items():
            for name, one in found["groups"].items():
                yield (attribute, label, name), one


def _sufficient(runs: ReportRuns, group: Group) -> dict[CELL, dict[str, Estimate]]:
    """(attribute, label, subgroup) -> run -> AUROC, of those with enough items."""
    found: dict[CELL, dict[str, Estimate]] = {}
    for run in group.runs:
        for cell, one in _subgroups(runs, run, group.task):
            if "auroc" in one:
                found.setdefault(cell, {})[run] = Estimate.from_dict(one["auroc"])
    return dict(sorted(found.items(), key=lambda item: item[0][:2]))


def _gaps(runs: ReportRuns, group: Group) -> Table:
    rows: list[dict[str, Cell]] = []
    for attribute in runs.files[group.runs[0]].tasks[group.task]["subgroups"]:
        for run in group.runs:
            found = {gap: runs.estimate(run, group.task, f"{gap}_{attribute}") for gap in GAPS}
            rows.append({"attribute": labelled(attribute), "run": run, **found})
    columns = [
        Column("run", "Run"),
        Column("attribute", "Attribute"),
        *(Column(gap, title) for gap, title in GAPS.items()),
    ]
    return Table(f"gaps_{group.name}", "Gaps between subgroups", columns, rows, about=group.title)


def _table(runs: ReportRuns, group: Group, cells: Mapping[CELL, Mapping[str, Estimate]]) -> Table:
    """AUROC of every subgroup with enough items; below it, those without."""
    rows: list[dict[str, Cell]] = []
    for (attribute, label, name), values in cells.items():
        one = next(iter(values.values()))
        where: dict[str, Cell] = {"group": f"{labelled(attribute)}: {name}", "label": labelled(label)}
        rows.append({**where, "positives": one.positives, "n": one.n, **values})
    columns = [
        Column("group", "Subgroup"),
        Column("label", "Finding"),
        Column("positives", "Positive"),
        Column("n", "n"),
        *(Column(run, run, "higher", run=run) for run in group.runs),
    ]
    name, note = f"subgroups_{group.name}", _too_few(runs, group)
    return Table(name, "AUROC by subgroup", columns, rows, note=note, compared="across", about=group.title)


def _healthy(runs: ReportRuns, group: Group) -> Table | None:
    """Who is called healthy: No Finding by subgroup, at one threshold for all."""
    rows: list[dict[str, Cell]] = []
    for run in group.runs:
        for (attribute, label, name), one in _subgroups(runs, run, group.task):
            if label == NO_FINDING and "auroc" in one:
                rates = {rate: Estimate.from_dict(one[rate]) if rate in one else None for rate in ("fpr", "fnr")}
                where: dict[str, Cell] = {"group": f"{labelled(attribute)}: {name}"}
                rows.append({"run": run, **where, "n": one["n"], "positives": one["positives"], **rates})
    columns = [
        Column("run", "Run"),
        Column("group", "Subgroup"),
        Column("positives", "Healthy"),
        Column("n", "n"),
        Column("fpr", "Ill, called healthy", explanation="false positive rate of No Finding: underdiagnosis"),
        Column("fnr", "Healthy, called ill", explanation="false negative rate of No Finding"),
    ]
    title = "Called healthy, by subgroup, at one threshold for all"
    return Table(f"healthy_{group.name}", title, columns, rows, about=group.title) if rows else None


def _too_few(runs: ReportRuns, group: Group) -> str:
    """Which cells no number can be given for."""
    few: dict[tuple[str, str], list[str]] = {}
    labels: dict[str, set[str]] = {}
    for (attribute, label, name), one in _subgroups(runs, group.runs[0], group.task):
        labels.setdefault(attribute, set()).add(label)
        if "auroc" not in one:
            few.setdefault((attribute, name), []).append(labelled(label))
    said = [
        f"{labelled(attribute)} {labelled(name).lower()}: "
        + ("all findings" if len(its) == len(labels[attribute]) else ", ".join(its))
        for (attribute, name), its in few.items()
    ]
    return f"Insufficient, fewer than 20 positives or negatives: {'; '.join(said)}." if said else ""

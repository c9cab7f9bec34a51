"""Findings one by one: AUROC of each label with its support, and what becomes of rare ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.frequency_groups import GROUPS
from medvlm_harness.results.report.drawing import Row, counts_text, forest, forest_data, labelled
from medvlm_harness.results.report.parts import Cell, Column, Plot, Section, Table
from medvlm_harness.results.report.runs import Group, ReportRuns

__all__ = ["has_labels", "label_estimates", "labels_section", "rare_section"]

AUROC = "auroc_"
FREQUENCY = {"head": "Common", "medium": "Less common", "tail": "Rare"}
RARE_METRICS = {"auroc": "AUROC", "average_precision": "Average precision", "sensitivity": "Sensitivity"}


def has_labels(details: Mapping[str, Any]) -> bool:
    """Whether a task scores labels, each with an AUROC of its own."""
    return "label_set" in details and "conditions" not in details and bool(_keys(details))


def _keys(details: Mapping[str, Any]) -> list[str]:
    """Labels with an AUROC: theirs alone knows its positives."""
    metrics = details["metrics"]
    return [
        name.removeprefix(AUROC)
        for name, one in metrics.items()
        if name.startswith(AUROC) and one["positives"] is not None
    ]


def label_estimates(runs: ReportRuns, group: Group) -> dict[str, dict[str, Estimate]]:
    """Label -> run -> AUROC; labels with most positives first."""
    found: dict[str, dict[str, Estimate]] = {}
    for run in group.runs:
        for key in _keys(runs.files[run].tasks[group.task]):
            estimate = runs.estimate(run, group.task, AUROC + key)
            if estimate is not None:
                found.setdefault(key, {})[run] = estimate
    return dict(sorted(found.items(), key=lambda item: -max(one.positives or 0 for one in item[1].values())))


def labels_section(runs: ReportRuns) -> Section | None:
    """AUROC per label, drawn and as a table, for every task that scores labels."""
    parts: list[Table | Plot] = []
    for group in runs.groups(has_labels):
        by_label = label_estimates(runs, group)
        rows = [_row(label, values) for label, values in by_label.items()]
        parts.append(
            Plot(
                f"labels_{group.name}",
                "AUROC of each finding",
                f"Forest plot of {len(rows)} findings for {len(group.runs)} runs, most frequent first. "
                "The table below holds the same numbers.",
                partial(
                    forest,
                    rows,
                    runs.places(group.runs),
                    measure="AUROC, 95% interval",
                    support="positive/n",
                    limits=(0, 1),
                ),
                forest_data(rows, group.runs),
                group.title,
            )
        )
        parts.append(_table(group, by_label))
    text = (
        "AUROC is the chance that a study with the finding scores higher than one without it; 0.5 (dashed) is "
        "guessing. Right of each row: how many are positive. With fewer than 10 positives or negatives the interval is "
        "too wide to choose by, and the finding is left out of means over findings.",
    )
    return Section("findings", "Finding by finding", text, parts) if parts else None


def _row(label: str, values: Mapping[str, Estimate]) -> Row:
    one = next(iter(values.values()))
    few = " (few)" if one.reason else ""
    floors = {value.floor for value in values.values()}
    floor = floors.pop() if len(floors) == 1 else None
    return Row(labelled(label) + few, counts_text(one.positives, one.n), values, floor)


def _table(group: Group, by_label: Mapping[str, Mapping[str, Estimate]]) -> Table:
    columns = [
        Column("label", "Finding"),
        Column("positives", "Positive", explanation="items with the finding"),
        Column("n", "Labelled", explanation="items with a label"),
        *(Column(run, run, "higher", run=run) for run in group.runs),
    ]
    rows: list[dict[str, Cell]] = []
    for label, values in by_label.items():
        one = next(iter(values.values()))
        rows.append({"label": labelled(label), "positives": one.positives, "n": one.n, **values})
    name, title = f"labels_{group.name}", "AUROC of each finding"
    return Table(name, title, columns, rows, compared="across", about=group.title)


def rare_section(runs: ReportRuns) -> Section | None:
    """Common against rare findings: means over labels by how often a label occurs in the training split."""
    parts: list[Table | Plot] = []
    for group in runs.groups(lambda details: bool(details.get("label_frequency"))):
        rows = [row for run in group.runs for row in _frequency_rows(runs, group.task, run)]
        columns = [
            Column("run", "Run"),
            Column("group", "Findings"),
            Column("labels", "Number", explanation="findings in the mean"),
            Column("left_out", "Left out", explanation="findings with too few positives for the mean"),
            *(Column(metric, title) for metric, title in RARE_METRICS.items()),
        ]
        if rows:
            members = _members(runs.files[group.runs[0]].tasks[group.task]["label_frequency"])
            title = "Common and rare findings"
            parts.append(Table(f"rare_{group.name}", title, columns, rows, note=members, about=group.title))
    text = (
        "A mean over findings is carried by the frequent ones. Here findings are grouped by how often they occur; "
        "sensitivity is that at the threshold chosen on validation.",
    )
    return Section("rare", "Rare findings", text, parts) if parts else None


def _frequency_rows(runs: ReportRuns, task: str, run: str) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for group in GROUPS:
        found = {metric: runs.estimate(run, task, f"{metric}_{group}") for metric in RARE_METRICS}
        auroc = found["auroc"]
        if auroc is None:
            continue
        left_out: Sequence[str] = list(auroc.extra.get("left_out_positives") or ())
        row: dict[str, Cell] = {"run": run, "group": FREQUENCY[group], "labels": len(auroc.extra.get("labels") or ())}
        rows.append({**row, "left_out": len(left_out), **found})
    return rows


def _members(frequency: Mapping[str, Any]) -> str:
    """Which labels are in which group, and by what they were counted."""
    labels: Mapping[str, Mapping[str, Any]] = frequency.get("labels") or {}
    said = []
    for group in GROUPS:
        if its := [labelled(label) for label, one in labels.items() if one.get("group") == group]:
            said.append(f"{FREQUENCY[group]}: {', '.join(its)}.")
    return " ".join([f"Counted in {frequency.get('from')}.", *said])

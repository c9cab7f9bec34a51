"""Accuracy against what it costs: latency, memory and weights, with the runs that no other beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.primary import primary_metric
from medvlm_harness.results.report.parts import Cell, Column, Plot, Section, Table
from medvlm_harness.results.report.runs import ReportRuns
from medvlm_harness.results.report.shown import metric_title
from medvlm_harness.results.run_cost import COST_METRICS
from medvlm_harness.results.tradeoff import AXES, tradeoff, tradeoff_figure

__all__ = ["tradeoff_section"]

MOST = 3  # tasks that are drawn, each with another metric: those that most runs can be placed in


def tradeoff_section(runs: ReportRuns) -> Section | None:
    """The primary metric of the tasks that most runs have, against each cost; None with a single run."""
    found: list[tuple[int, str, list[dict[str, Any]]]] = []
    for group in runs.groups(lambda details: "conditions" not in details):
        metric = primary_metric(runs.files[group.runs[0]].tasks[group.task])
        if metric is None or len(group.runs) < 2:
            continue
        rows = tradeoff({run: runs.files[run] for run in group.runs}, metric=f"{group.task}:{metric}")
        placed = sum(row["value"] is not None and _costs(row) != [] for row in rows)
        if placed > 1:
            found.append((placed, group.title, rows))
    found.sort(key=lambda one: -one[0])
    by_metric = {rows[0]["metric"].partition(":")[2]: (title, rows) for _, title, rows in reversed(found)}
    chosen = sorted(by_metric.values(), key=lambda one: [rows for _, _, rows in found].index(one[1]))
    parts = [part for title, rows in chosen[:MOST] for part in _parts(title, rows)]
    text = (
        "A run is on the front where no other run scores higher for less. Bars are the runs' own intervals: whether "
        "two runs differ, `medvlm compare` says.",
    )
    return Section("tradeoff", "What accuracy costs", text, parts) if parts else None


def _costs(row: Mapping[str, Any]) -> list[str]:
    """The costs that are known of a run."""
    return [cost for cost in COST_METRICS if row.get(cost) is not None]


def _parts(title: str, rows: Sequence[Mapping[str, Any]]) -> list[Table | Plot]:
    task, _, metric = rows[0]["metric"].partition(":")
    costs = [key.removesuffix("_source") for key in rows[0] if key.endswith("_source")]
    alt = f"{metric} of {task} for {len(rows)} runs, against {', '.join(costs)}; the table below holds the numbers."
    cells: list[dict[str, Cell]] = []
    for row in rows:
        ends = (row["low"], row["high"]) if row["low"] is not None else (float("nan"), float("nan"))
        value = Estimate.undefined(row["reason"] or "no value", n=0)
        if row["value"] is not None:
            value = Estimate(row["value"], float("nan"), ends, 0)
        fronts = [
            AXES.get(cost, cost).partition(",")[0].partition(" (")[0] for cost in costs if row[f"on_front_{cost}"]
        ]
        cells.append(
            {"run": row["run"], "value": value, **{cost: row[cost] for cost in costs}, "front": ", ".join(fronts)}
        )
    columns = [
        Column("run", "Run"),
        Column("value", metric_title(metric)),
        *(Column(cost, AXES.get(cost, cost), None, COST_METRICS[cost]) for cost in costs),
        Column("front", "On the front of"),
    ]
    return [
        Plot(
            f"tradeoff_{task}_{metric}",
            _titled(metric),
            alt,
            partial(tradeoff_figure, rows),
            rows,
            title,
        ),
        Table(f"tradeoff_{task}_{metric}", _titled(metric), columns, cells, about=title),
    ]


def _titled(metric: str) -> str:
    title = metric_title(metric)
    return f"{title[0].upper()}{title[1:]} against cost"

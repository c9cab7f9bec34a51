"""The page's first answer: who is accurate, what it costs, how far it can be trusted, and who cannot do what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.primary import primary_metric
from medvlm_harness.results.report.parts import Cell, Column, Section, Table
from medvlm_harness.results.report.robustness import has_image_use, has_robustness
from medvlm_harness.results.report.runs import Group, ReportRuns
from medvlm_harness.results.report.shown import beside_floor, interval_of, leading, metric_title
from medvlm_harness.results.run_cost import COST_METRICS, cost_of

__all__ = ["accuracy_tables", "cost_table", "in_short", "leaderboard_section", "trust_tables", "unable_table"]

# What a task asks for, told by its primary metric; the first that fits.
FAMILIES: Mapping[str, tuple[str, Callable[[str], bool]]] = {
    "findings": ("Naming findings", lambda metric: metric.startswith("auroc")),
    "search": ("Finding the matching report or image", lambda metric: "recall@" in metric or metric.endswith("_mrr")),
    "choice": ("Choosing the right answer", lambda metric: metric.startswith(("acc", "balanced_accuracy"))),
    "texts": ("Writing and reading texts", lambda metric: True),
}
COSTS: Mapping[str, tuple[str, Literal["higher", "lower"]]] = {
    "latency_p50": ("Latency, median (ms)", "lower"),
    "latency_p95": ("Latency, 95th percentile (ms)", "lower"),
    "throughput": ("Throughput (items/s)", "higher"),
    "peak_ram_mib": ("Peak RAM (MiB)", "lower"),
    "vram_allocated_mib": ("Peak GPU memory (MiB)", "lower"),
    "weights_memory_mib": ("Weights in memory (MiB)", "lower"),
    "weights_disk_mib": ("Weights on disk (MiB)", "lower"),
    "parameters": ("Parameters (million)", "lower"),
}
# What is said of trust for every task that has it: table, metrics, better, what they are.
TRUST: Mapping[str, tuple[str, Sequence[str], Literal["higher", "lower"], str]] = {
    "ece": (
        "calibration error (ECE)",
        ("ece",),
        "lower",
        "mean distance of stated from observed probability; its floor is what noise alone gives",
    ),
    "aurc": (
        "risk left when the unsure go to a person (AURC)",
        ("aurc",),
        "lower",
        "error averaged over how much is handed over; its floor is handing over at random",
    ),
    "factuality": (
        "what texts get wrong",
        ("unsupported_finding", "omission", "contradiction"),
        "lower",
        "share of texts with a finding that the source lacks, without one that it has, or that contradict it",
    ),
}


def leaderboard_section(runs: ReportRuns) -> Section:
    """Accuracy, cost and trust of every run."""
    unable = unable_table(runs)
    accuracy, cost, trust = accuracy_tables(runs), cost_table(runs), trust_tables(runs)
    short = [in_short([*accuracy, cost, *trust], runs.baselines)] if len(runs.names) > 1 else []
    parts = [*short, *accuracy, cost, *trust, *([unable] if unable else [])]
    text = (
        "Each value has its 95% interval over studies, and its floor: what a constant, a prior or copying scores on "
        "the same items. A value that is not above its floor has shown nothing.",
        "★ marks the best value and those whose interval overlaps its own, where any run can be set apart at all. "
        "Whether two runs differ, `medvlm compare` says from paired differences.",
    )
    return Section("leaderboard", "Leaderboard", text, parts)


def accuracy_tables(runs: ReportRuns) -> list[Table]:
    """The primary metric of each task, one table per kind of task; runs that cannot do any of them are left out."""
    groups: dict[str, list[tuple[Group, str]]] = {}
    for group in runs.groups(lambda details: not has_robustness(details) and not has_image_use(details)):
        metric = primary_metric(runs.files[group.runs[0]].tasks[group.task])
        if metric is not None:
            family = next(name for name, (_, fits) in FAMILIES.items() if fits(metric))
            groups.setdefault(family, []).append((group, metric))
    tables = []
    for family in FAMILIES:
        if members := groups.get(family):
            columns = [
                Column(group.name, runs.short(group), _better(runs, group, metric), metric_title(metric))
                for group, metric in members
            ]
            rows = _rows(runs, {group.name: (group, metric) for group, metric in members})
            tables.append(
                Table(
                    f"accuracy_{family}",
                    f"Accuracy: {FAMILIES[family][0].lower()}",
                    [Column("run", "Run"), *columns],
                    rows,
                )
            )
    return tables


def cost_table(runs: ReportRuns) -> Table:
    """What each run says of its cost."""
    rows: list[dict[str, Cell]] = []
    for run, files in runs.files.items():
        row: dict[str, Cell] = {"run": run}
        for name, one in cost_of(files).items():
            if name in COSTS:
                row[name] = _cost(one, scale=1e6 if name == "parameters" else 1)
        rows.append(row)
    known = [
        name
        for name in COSTS
        if any(isinstance(cell := row.get(name), Estimate) and cell.value == cell.value for row in rows)
    ]
    columns = [Column("run", "Run"), *(Column(name, *COSTS[name], COST_METRICS[name]) for name in known)]
    missing = [COSTS[name][0] for name in COSTS if name not in known]
    note = "Measured by the efficiency task where there was one, else counted along the run."
    note += f" Not known of any run: {', '.join(missing)}." if missing else ""
    return Table("cost", "Cost", columns, rows, note)


def _cost(one: Mapping[str, Any], *, scale: float) -> Estimate:
    if one["value"] is None:
        return Estimate.undefined(str(one["reason"] or "not measured"), n=0)
    low, high = one["ci95"] or (float("nan"), float("nan"))
    return Estimate(one["value"] / scale, float("nan"), (low / scale, high / scale), 0)


def trust_tables(runs: ReportRuns) -> list[Table]:
    """Calibration, hand-over, factuality, robustness and use of the image: one table each, a column per task."""
    tables = [
        _trust(runs, f"trust_{name}", title, what, better, _having(runs, metrics))
        for name, (title, metrics, better, what) in TRUST.items()
    ]
    retained = [(group, f"{_first_measure(runs, group)}_retention") for group in runs.groups(has_robustness)]
    what = "share of what a model has above its floor that disturbed inputs leave it, mean over disturbances"
    tables.append(_trust(runs, "trust_retention", "retained when disturbed", what, "higher", retained))
    gained = [
        (group, metric)
        for group in runs.groups(has_image_use)
        for metric in list(runs.files[group.runs[0]].tasks[group.task]["metrics"])
        if metric.endswith("_true_minus_other")
    ]
    what = "score with the study's own image less that with another patient's"
    tables.append(_trust(runs, "trust_image", "gained by the true image", what, "higher", gained))
    return [table for table in tables if table.rows]


def _trust(
    runs: ReportRuns,
    name: str,
    title: str,
    what: str,
    better: Literal["higher", "lower"],
    members: Sequence[tuple[Group, str]],
) -> Table:
    keys = {f"{group.name}_{metric}": (group, metric) for group, metric in members}
    columns = [Column(key, runs.short(group), better, metric_title(metric)) for key, (group, metric) in keys.items()]
    note = f"{what[0].upper()}{what[1:]}; {better} is better."
    return Table(name, f"Trust: {title}", [Column("run", "Run"), *columns], _rows(runs, keys), note)


def in_short(tables: Sequence[Table], baselines: Collection[str]) -> Table:
    """What each column says, columns that say the same together: who leads, and who is not above the floor."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for table in tables:
        lead = leading(table, baselines)
        for column in table.columns[1:]:
            verdict, behind = _verdict(table, column, lead, baselines)
            if verdict:
                said.setdefault((table.title, verdict, behind), []).append(column.title)
    rows: list[dict[str, Cell]] = [
        {"what": title, "columns": ", ".join(dict.fromkeys(columns)), "lead": verdict, "floor": behind}
        for (title, verdict, behind), columns in said.items()
    ]
    columns = [
        Column("what", "Asked for"),
        Column("columns", "In"),
        Column("lead", "Ahead"),
        Column("floor", "Not above the floor"),
    ]
    return Table("short", "In short", columns, rows, "Baselines are there to be beaten and are not ranked.")


def _verdict(
    table: Table, column: Column, lead: Collection[tuple[int, str]], baselines: Collection[str]
) -> tuple[str, str]:
    """Who leads in a column, and who is not above its floor; nothing where only one run has a value."""
    rows = {
        str(row["run"]): (k, cell)
        for k, row in enumerate(table.rows)
        if isinstance(cell := row.get(column.key), Estimate) and interval_of(cell) and row["run"] not in baselines
    }
    behind = [run for run, (_, cell) in rows.items() if beside_floor(cell, column)]
    ahead = [run for run, (k, _) in rows.items() if (k, column.key) in lead]
    if not rows or (len(rows) == 1 and not behind):
        return "", ""
    if not ahead:
        ahead_text = "none" if len(behind) == len(rows) else "no difference shown" if len(rows) > 1 else "one run only"
        return ahead_text, ", ".join(behind)
    return ", ".join(ahead), ", ".join(behind)


def _having(runs: ReportRuns, metrics: Sequence[str]) -> list[tuple[Group, str]]:
    """Each task that has any of the metrics, with each that it has."""
    found = []
    for group in runs.groups(lambda details: any(metric in details["metrics"] for metric in metrics)):
        its = runs.files[group.runs[0]].tasks[group.task]["metrics"]
        found += [(group, metric) for metric in metrics if metric in its]
    return found


def _first_measure(runs: ReportRuns, group: Group) -> str:
    return str(runs.files[group.runs[0]].tasks[group.task]["measures"][0])


def _rows(runs: ReportRuns, members: Mapping[str, tuple[Group, str]]) -> list[dict[str, Cell]]:
    """One row per run that has any of the values."""
    rows: list[dict[str, Cell]] = []
    for run in runs.names:
        found = {
            key: runs.estimate(run, group.task, metric) for key, (group, metric) in members.items() if run in group.runs
        }
        if any(one is not None for one in found.values()):
            rows.append({"run": run, **found})
    return rows


def _better(runs: ReportRuns, group: Group, metric: str) -> Literal["higher", "lower"]:
    return "lower" if runs.lower_is_better(group.runs[0], group.task, metric) else "higher"


def unable_table(runs: ReportRuns) -> Table | None:
    """Which tasks runs could not do, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs.names:
        of_run: dict[str, list[str]] = {}
        for task, why in runs.unsupported(run).items():
            of_run.setdefault(str(why), []).append(task)
        for why, tasks in of_run.items():
            found.setdefault((why, ", ".join(tasks)), []).append(run)
    rows: list[dict[str, Cell]] = [
        {"runs": ", ".join(members), "why": why, "tasks": tasks} for (why, tasks), members in found.items()
    ]
    columns = [Column("runs", "Runs"), Column("why", "Why"), Column("tasks", "Tasks")]
    return Table("unable", "What each cannot do", columns, rows) if rows else None

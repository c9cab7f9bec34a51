"""What `significance.assess` gives, as Markdown for people and as rows for tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from medvlm_harness.metrics.significance import LEVEL
from medvlm_harness.results.comparing.significance import tasks_by_reason
from medvlm_harness.results.markdown import Notes, markdown_table

__all__ = ["significance_rows", "significance_table"]

COSTS = {
    "latency_p50": "Latency ms",
    "vram_allocated_mib": "GPU memory MiB",
    "peak_ram_mib": "Peak RAM MiB",
    "weights_memory_mib": "Weights MiB",
}
SHOWN = 5  # studies of each task that the table names


def significance_table(block: Mapping[str, Any]) -> str:
    """Verdicts first, then what else differs, what each costs, and the studies on which they disagree most."""
    primary = [row for row in block["tests"] if row["primary"]]
    others = [row for row in block["tests"] if not row["primary"]]
    found = [row for row in others if row["p_adjusted"] is not None and row["p_adjusted"] < LEVEL]
    notes = Notes()
    lines = [f"{name}: {_run(run)}" for name, run in block["runs"].items()]
    if block["differs"]:
        lines.append(f"They differ in {', '.join(block['differs'])}.")
    margin = block["margin"]
    judged = "tested at 5%" if margin is None else f"judged by its 95% interval for a loss of more than {margin:g}"
    lines += [
        "",
        f"Primary metrics, one a task, each {judged}; {block['resamples']} resamples of "
        "studies, the same for both. Detectable: the true difference that these studies show in four of five cases.",
        "",
        *markdown_table([_HEAD, *(_row(row, notes, adjusted=False) for row in primary)]),
        "",
        f"{len(found)} of {len(others)} other metrics differ (p below {LEVEL:g} after Holm's correction over all).",
    ]
    if found:
        lines += ["", *markdown_table([_HEAD, *(_row(row, notes, adjusted=True) for row in found)])]
    lines += [*_costs(block["runs"], notes), *_disagreements(block["disagreements"])]
    if block["refused"]:
        lines += [
            "",
            "Not compared:",
            *(f"- {', '.join(tasks)}: {why}" for why, tasks in tasks_by_reason(block["refused"]).items()),
        ]
    return "\n".join([*lines, *notes.lines()]) + "\n"


_HEAD = ("Task", "Metric", "A", "B", "B less A [95% interval]", "p", "Test", "Detectable", "Verdict on B")


def _run(run: Mapping[str, Any]) -> str:
    way = run["quantization"]
    facts = (run["model"], run["precision"], way and way.get("name"), run["adapter"] and "with an adapter")
    return f"{', '.join(str(one) for one in facts if one)} ({run['path']})"


def _row(row: Mapping[str, Any], notes: Notes, *, adjusted: bool) -> tuple[str, ...]:
    name = row["metric"] + (" (less is better)" if row["lower_is_better"] else "")
    if row["difference"] is None:
        return (row["task"], name, _number(row["reference"]), _number(row["run"]), notes(row["reason"]), *[""] * 3, "")
    low, high = row["ci95"]
    if own := [f"{run} itself reported {one:.4f}" for run, one in row.get("reported", {}).items() if one is not None]:
        name += " " + notes.mark(f"{row['metric']}: {', '.join(own)} (over seeds, or counted over all items)")
    interval = "unknown" if low is None else f"{low:+.4f}, {high:+.4f}"
    return (
        row["task"],
        name,
        _number(row["reference"]),
        _number(row["run"]),
        f"{row['difference']:+.4f} [{interval}]",
        _p(row["p_adjusted"] if adjusted else row["p"]),
        row["test"],
        _number(row["detectable"]),
        row["verdict"],
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _p(value: float | None) -> str:
    return "n/a" if value is None else "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _costs(runs: Mapping[str, Any], notes: Notes) -> list[str]:
    rows: list[tuple[str, ...]] = [("Cost", "A", "B", "B by A")]
    for cost, title in COSTS.items():
        a, b = (runs[name]["cost"][cost] for name in runs)
        if a["value"] is None and b["value"] is None:
            continue
        values = [notes(one["reason"]) if one["value"] is None else f"{one['value']:.4g}" for one in (a, b)]
        ratio = f"{b['value'] / a['value']:.3f}" if a["value"] and b["value"] is not None else ""
        rows.append((title, *values, ratio))
    return ["", *markdown_table(rows)] if len(rows) > 1 else []


def _disagreements(block: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    rows: list[tuple[str, ...]] = [("Task", "Answers", "A right", "B right", "Furthest apart (study: A, B)")]
    for task, found in block.items():
        right = Counter(row["right"] for row in found)
        counts = [str(count) for count in (len(found), right["reference"], right["run"])]
        rows.append((task, *counts, "; ".join(list(dict.fromkeys(map(_named, found)))[:SHOWN])))
    return ["", "Where they disagree:", "", *markdown_table(rows)]


def _named(row: Mapping[str, Any]) -> str:
    label = f" {row['label']}" if row["label"] else ""
    return f"{row['study']}{label}: {_said(row['reference'])}, {_said(row['run'])}"


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def significance_rows(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row per test, for CSV."""
    rows = []
    for row in block["tests"]:
        low, high = row["ci95"]
        rows.append(
            {**{key: value for key, value in row.items() if key not in ("ci95", "reported")}, "low": low, "high": high}
        )
    return rows

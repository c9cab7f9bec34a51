"""The table below lm-eval's own: each number with its interval, its support, and its floor and ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["interval_table"]

HEADER = ("Task", "Metric", "Value", "95% interval", "n", "Positives", "Floor", "Ceiling", "Note")


def interval_table(medvlm: Mapping[str, Any]) -> str:
    """A Markdown table of the `medvlm` block of a results file, and a line on the data of each task."""
    lines = []
    rows = [HEADER]
    for task, details in medvlm["tasks"].items():
        lines.append(_data_line(task, details))
        for i, (metric, estimate) in enumerate(details["metrics"].items()):
            rows.append(
                (
                    task if i == 0 else "",
                    metric,
                    _number(estimate["value"]),
                    _interval(estimate["ci95"]),
                    str(estimate["n"]),
                    "" if estimate["positives"] is None else str(estimate["positives"]),
                    "" if estimate["floor"] is None else _number(estimate["floor"]),
                    "" if estimate["ceiling"] is None else _number(estimate["ceiling"]),
                    estimate["reason"] or "",
                )
            )
    for task, reason in medvlm["unsupported"].items():
        rows.append((task, "n/a", *[""] * (len(HEADER) - 3), reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines_of_table = [_line(row, widths) for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([*lines, "", lines_of_table[0], rule, *lines_of_table[1:]]) + "\n"


def _data_line(task: str, details: Mapping[str, Any]) -> str:
    dataset, counts = details["dataset"], details.get("counts", {})
    facts = [f"{task}: {dataset['name']} ({dataset['source']}), split {details['split']}"]
    if details.get("label_source"):
        facts.append(f"labels {details['label_source']}")
    facts += [f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count]
    cut = {text: share for text, share in details.get("truncated_share", {}).items() if share is not None}
    if cut:
        facts.append("texts cut by the tokenizer: " + ", ".join(f"{text} {share:.1%}" for text, share in cut.items()))
    if details["scored"] < details["documents"]:
        facts.append(f"LIMITED: only {details['scored']} of {details['documents']} scored")
    if note := details["contamination"]["note"]:
        facts.append(note)
    return "; ".join(facts)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    return "|" + "|".join(f" {cell:<{width}} " for cell, width in zip(row, widths, strict=True)) + "|"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"

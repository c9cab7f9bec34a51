"""The table below lm-eval's own: each number with its interval, its support, and its floor and ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["interval_table"]

HEADER = ("Task", "Metric", "Value", "95% interval", "n", "Positives", "Floor", "Ceiling", "Note")


def interval_table(medvlm: Mapping[str, Any]) -> str:
    """A Markdown table of the `medvlm` block of a results file, and a line on the data of each task."""
    lines = []
    rows = [HEADER]
    for task, details in medvlm["tasks"].items():
        lines.append(_data_line(task, details))
        shown = _without_unchanged(details["metrics"])
        for i, (metric, estimate) in enumerate(shown.items()):
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
                    _note(estimate),
                )
            )
    for task, reason in medvlm["unsupported"].items():
        rows.append((task, "n/a", *[""] * (len(HEADER) - 3), reason))
    return "\n".join([*lines, "", *_table(rows), *_factuality_table(medvlm["tasks"])]) + "\n"


def _without_unchanged(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics without those of a second filter pipeline that it left as they were."""
    plain = {name: estimate["value"] for name, estimate in metrics.items() if "," not in name}
    unchanged = {name for name in metrics if "," in name and metrics[name]["value"] == plain[name.partition(",")[0]]}
    return {name: estimate for name, estimate in metrics.items() if name not in unchanged}


def _note(estimate: Mapping[str, Any]) -> str:
    """Why there is no value, or what each kind of floor scores where there are several."""
    floors = estimate["extra"].get("floors", {})
    several = ", ".join(f"{kind} {_number(value)}" for kind, value in floors.items())
    return "; ".join(filter(None, (estimate["reason"], several)))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    head, *rest = (_line(row, widths) for row in rows)
    return [head, rule, *rest]


def _factuality_table(tasks: Mapping[str, Any]) -> list[str]:
    """What texts say that their source does not, and what they leave out, in one row: silence must not win.

    A check is there with the model's rate, the human reference's on the same studies, and the difference.
    """
    rows: list[tuple[str, ...]] = []
    for task, details in tasks.items():
        by_filter: dict[str, dict[str, str]] = {}
        for metric, estimate in details["metrics"].items():
            if "reference" in estimate["extra"]:
                name, _, pipeline = metric.partition(",")
                by_filter.setdefault(pipeline or "none", {})[name] = _against_reference(estimate)
        for pipeline, cells in by_filter.items():
            rows = rows or [("Task", "Filter", *cells)]
            rows.append((task, pipeline, *cells.values()))
    return ["", "Factuality: model, human reference (difference)", "", *_table(rows)] if rows else []


def _against_reference(estimate: Mapping[str, Any]) -> str:
    value, reference, lift = estimate["value"], estimate["extra"]["reference"], estimate["extra"]["lift"]
    if value is None or reference is None:
        return "undefined" if value is None else f"{value:.3f}, undefined"
    return f"{value:.3f}, {reference:.3f} ({lift:+.3f})"


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

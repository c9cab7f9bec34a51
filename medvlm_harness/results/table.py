"""The table below lm-eval's own: each number with its interval, its support, and its floor and ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvlm_harness.results.markdown import interval_cell, markdown_table, number_cell
from medvlm_harness.results.robustness_table import robustness_table
from medvlm_harness.results.subgroup_tables import gap_names, subgroup_tables

__all__ = ["interval_table"]

HEADER = ("Task", "Metric", "Value", "95% interval", "n", "Positives", "Floor", "Ceiling", "Note")


def interval_table(medvlm: Mapping[str, Any]) -> str:
    """A Markdown table of the `medvlm` block of a results file, and a line on the data of each task."""
    lines = []
    rows = [HEADER]
    for task, details in medvlm["tasks"].items():
        lines.append(_data_line(task, details))
        shown = _without_unchanged(details["metrics"])
        elsewhere = gap_names(details)
        shown = {name: estimate for name, estimate in shown.items() if name not in elsewhere}
        for i, (metric, estimate) in enumerate(shown.items()):
            rows.append(
                (
                    task if i == 0 else "",
                    metric,
                    number_cell(estimate["value"]),
                    interval_cell(estimate["ci95"]),
                    str(estimate["n"]),
                    "" if estimate["positives"] is None else str(estimate["positives"]),
                    "" if estimate["floor"] is None else number_cell(estimate["floor"]),
                    "" if estimate["ceiling"] is None else number_cell(estimate["ceiling"]),
                    _note(estimate),
                )
            )
    for task, reason in medvlm["unsupported"].items():
        rows.append((task, "n/a", *[""] * (len(HEADER) - 3), reason))
    tables = (
        *markdown_table(rows),
        *subgroup_tables(medvlm["tasks"]),
        *robustness_table(medvlm["tasks"]),
        *_factuality_table(medvlm["tasks"]),
    )
    return "\n".join([*lines, "", *tables]) + "\n"


def _without_unchanged(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics without those of a second filter pipeline that it left as they were."""
    plain = {name: estimate["value"] for name, estimate in metrics.items() if "," not in name}
    unchanged = {name for name in metrics if "," in name and metrics[name]["value"] == plain[name.partition(",")[0]]}
    return {name: estimate for name, estimate in metrics.items() if name not in unchanged}


def _note(estimate: Mapping[str, Any]) -> str:
    """Why there is no value, which condition it is of, what several floors score, of how many labels a mean is."""
    extra = estimate["extra"]
    several = ", ".join(f"{kind} {number_cell(value)}" for kind, value in extra.get("floors", {}).items())
    labels, left_out = extra.get("labels", ()), extra.get("left_out_positives", ())
    of_labels = f"{len(labels)} of {len(labels) + len(left_out)} labels" if labels and left_out else ""
    return "; ".join(filter(None, (estimate["reason"], extra.get("condition"), several, of_labels)))


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
    return ["", "Factuality: model, human reference (difference)", "", *markdown_table(rows)] if rows else []


def _against_reference(estimate: Mapping[str, Any]) -> str:
    value, reference, lift = estimate["value"], estimate["extra"]["reference"], estimate["extra"]["lift"]
    if value is None or reference is None:
        return "undefined" if value is None else f"{value:.3f}, undefined"
    return f"{value:.3f}, {reference:.3f} ({lift:+.3f})"


def _data_line(task: str, details: Mapping[str, Any]) -> str:
    dataset, counts = details["dataset"], details.get("counts", {})
    facts = [f"{task}: {dataset['name']} ({dataset['source']}), split {details['split']}"]
    if perturbation := details.get("perturbation"):
        facts.append(_perturbed(perturbation))
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


def _perturbed(perturbation: Mapping[str, Any]) -> str:
    """What was done to the inputs; of texts, how many it changed."""
    said = f"perturbed: {perturbation['name']}@{perturbation['severity']}"
    if (changed := perturbation.get("texts_changed")) is None:
        return said
    return f"{said} ({changed:.1%} of {perturbation['texts']} texts changed)"

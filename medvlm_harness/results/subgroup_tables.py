"""The tables of subgroups: gaps between them, and the subgroups themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvlm_harness.results.markdown import markdown_table

__all__ = ["gap_names", "subgroup_tables"]

GAPS = {
    "auroc_gap": "AUROC",
    "fpr_gap": "False positive rate",
    "fnr_gap": "False negative rate",
    "equalized_odds_difference": "Equalised odds",
    "underdiagnosis_gap": "Underdiagnosis",
}
RATES = {"auroc": "AUROC", "fpr": "False positive rate", "fnr": "False negative rate"}
NO_FINDING = "no_finding"


def gap_names(details: Mapping[str, Any]) -> set[str]:
    """The metrics that stand in a table of their own."""
    return {f"{gap}_{attribute}" for attribute in details.get("subgroups", {}) for gap in GAPS}


def subgroup_tables(tasks: Mapping[str, Any]) -> list[str]:
    """How far subgroups are apart, one row per attribute; then the subgroups themselves, as to No Finding."""
    gaps: list[tuple[str, ...]] = []
    groups: list[tuple[str, ...]] = []
    for task, details in tasks.items():
        for attribute, labels in details.get("subgroups", {}).items():
            of_attribute = [details["metrics"].get(f"{gap}_{attribute}") for gap in GAPS]
            averaged = details["metrics"][f"auroc_gap_{attribute}"]["extra"].get("labels", ())
            cells = (_with_interval(one) if one else "" for one in of_attribute)
            gaps.append((task, attribute, str(len(averaged)), *cells))
            for name, group in labels.get(NO_FINDING, {}).get("groups", {}).items():
                counts = ("" if group[count] is None else str(group[count]) for count in ("n", "positives"))
                rates = (_with_interval(group[rate]) if rate in group else "insufficient" for rate in RATES)
                groups.append((task, attribute, name, *counts, *rates))
    head = ("Task", "Attribute", "Labels", *GAPS.values())
    title = "Subgroups: the highest less the lowest, means over labels"
    lines = ["", title, "", *markdown_table([head, *gaps])] if gaps else []
    head = ("Task", "Attribute", "Subgroup", "n", "Positives", *RATES.values())
    title = "Subgroups: No Finding, at one threshold for all; false positives are the underdiagnosed"
    return [*lines, "", title, "", *markdown_table([head, *groups])] if groups else lines


def _with_interval(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "insufficient" if estimate["reason"].startswith(("insufficient", "no label has two")) else "undefined"
    low, high = estimate["ci95"]
    return f"{estimate['value']:.3f} ({low:.3f} to {high:.3f})"

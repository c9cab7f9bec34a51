"""The table of robustness tasks: every condition in a row, with its drop and how many decisions it flips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvlm_harness.results.markdown import markdown_table

__all__ = ["robustness_table"]

HEADER = ("Task", "Score", "Condition", "Value", "Drop", "95% interval of the drop", "Retention", "Flips")
CLEAN = "clean"


def robustness_table(tasks: Mapping[str, Any]) -> list[str]:
    """Lines, from the `tasks` of a results file's `medvlm` block; none where no task is one of robustness.

    Flips of a condition that puts another image in the place of the study's own are its reliance on the image.
    """
    rows: list[tuple[str, ...]] = []
    for task, details in tasks.items():
        if "robustness" not in details:
            continue
        found = details["robustness"]
        conditions = [CLEAN, *(case for members in details["groups"].values() for case in members), *details["others"]]
        for measure in details["measures"]:
            for condition in conditions:
                drop = found.get(f"{measure}_drop_{condition}", {})
                flips = found.get(f"flip_rate_{condition}") or found.get(f"reliance_{condition}") or {}
                rows.append(
                    (
                        task,
                        measure,
                        condition,
                        _number(found[f"{measure}_{condition}"]["value"]),
                        _number(drop.get("value")),
                        " to ".join(map(_number, drop.get("ci95") or ())),
                        _number(found.get(f"{measure}_retention_{condition}", {}).get("value")),
                        _number(flips.get("value")),
                    )
                )
                task = ""
    title = "Robustness: each condition on the same studies"
    return ["", title, "", *markdown_table([HEADER, *rows])] if rows else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

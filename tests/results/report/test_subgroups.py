from __future__ import annotations

from collections.abc import Callable
from typing import Any

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.report.parts import Table
from medvlm_harness.results.report.runs import ReportRuns
from medvlm_harness.results.report.subgroups import subgroups_section
from medvlm_harness.results.run_files import RunFiles

TASK = "demo_cxr_zeroshot"


def tables(run: RunFiles) -> dict[str, Table]:
    section = subgroups_section(ReportRuns({"a": run}))
    assert section is not None
    return {part.name: part for part in section.parts if isinstance(part, Table)}


def test_cells_with_enough_have_their_number_and_the_rest_are_named(guessing: RunFiles) -> None:
    found = tables(guessing)[f"subgroups_{TASK}"]
    groups = [
        (label, name, one)
        for labels in guessing.tasks[TASK]["subgroups"].values()
        for label, of_label in labels.items()
        for name, one in of_label["groups"].items()
    ]
    enough = [one["auroc"]["value"] for _, _, one in groups if "auroc" in one]
    values = [cell.value for row in found.rows if isinstance(cell := row["a"], Estimate)]
    assert sorted(values) == sorted(enough)
    if len(enough) < len(groups):
        assert "Insufficient" in found.note


def test_a_cell_that_becomes_too_small_loses_its_row_not_its_mention(
    guessing: RunFiles, edited: Callable[..., RunFiles]
) -> None:
    def shrink(block: dict[str, Any]) -> None:
        for labels in block["tasks"][TASK]["subgroups"].values():
            for of_label in labels.values():
                for name in of_label["groups"]:
                    of_label["groups"][name] = {"n": None, "positives": None, "reason": "insufficient"}

    found = tables(edited(guessing, shrink))
    assert not found[f"subgroups_{TASK}"].rows
    assert "all findings" in found[f"subgroups_{TASK}"].note
    assert f"healthy_{TASK}" not in found

from __future__ import annotations

from medvlm_harness.results.report.parts import Plot, Table
from medvlm_harness.results.report.robustness import robustness_section
from medvlm_harness.results.report.runs import ReportRuns
from medvlm_harness.results.run_files import RunFiles

TASK = "demo_cxr_robustness_zeroshot"


def test_curves_begin_undisturbed_and_hold_the_runs_numbers(guessing: RunFiles) -> None:
    section = robustness_section(ReportRuns({"a": guessing}))
    assert section is not None
    (plot,) = (part for part in section.parts if isinstance(part, Plot))
    found = guessing.tasks[TASK]["robustness"]
    groups = guessing.tasks[TASK]["groups"]
    assert len(plot.data) == sum(1 + len(cases) for cases in groups.values())
    for row in plot.data:
        name = str(row["disturbance"]).lower().replace(" ", "_")
        case = "clean" if row["severity"] == 0 else f"{name}_{row['severity']:.0f}"
        assert row["value"] == found[f"auroc_{case}"]["value"]


def test_each_disturbance_and_each_other_image_has_a_row(guessing: RunFiles) -> None:
    section = robustness_section(ReportRuns({"a": guessing}))
    assert section is not None
    (drops,) = (part for part in section.parts if isinstance(part, Table) and part.name.startswith("drops"))
    details = guessing.tasks[TASK]
    assert len(drops.rows) == len(details["groups"]) + len(details["others"])


def test_runs_without_disturbances_have_no_section(writing: RunFiles) -> None:
    assert robustness_section(ReportRuns({"a": writing})) is None

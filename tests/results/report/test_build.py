from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results import score_table
from medvlm_harness.results.report.build import build_report, report_sections
from medvlm_harness.results.report.parts import Plot, Report, Table
from medvlm_harness.results.report.runs import name_runs
from medvlm_harness.results.run_files import RunFiles, read_run

MANY = ["leaderboard", "cautions", "findings", "rare", "curves", "calibration", "selective", "robustness"]


def table(report: Report, name: str) -> Table:
    (found,) = (part for one in report.sections for part in one.parts if isinstance(part, Table) and part.name == name)
    return found


def test_all_sections_stand_in_the_order_they_are_read(report: Report) -> None:
    names = [section.name for section in report.sections]
    assert [name for name in names if name in MANY] == MANY
    assert names[-2:] == ["examples", "methods"]
    assert "4 runs of 2 models" in report.summary or "4 runs of 3 models" in report.summary


def test_names_of_parts_are_theirs_alone(report: Report) -> None:
    for kind in (Table, Plot):
        names = [part.name for section in report.sections for part in section.parts if isinstance(part, kind)]
        assert len(names) == len(set(names))


def test_every_plot_can_be_drawn_and_has_its_numbers(report: Report) -> None:
    plots = [part for section in report.sections for part in section.parts if isinstance(part, Plot)]
    assert len(plots) > 5
    for plot in plots[::3]:
        assert plot.draw().axes
        assert plot.data
        assert plot.alt


def test_one_run_is_enough(guessing: RunFiles) -> None:
    sections = {section.name: section for section in report_sections({"only": guessing})}
    assert "tradeoff" not in sections
    assert {"leaderboard", "findings", "methods"} <= sections.keys()
    assert not any(part.name == "short" for part in sections["leaderboard"].parts)


def test_the_leaderboard_holds_the_runs_own_numbers(report: Report, several: dict[str, RunFiles]) -> None:
    found = table(report, "accuracy_findings")
    (row,) = (row for row in found.rows if row["run"] == "reader int8")
    own = several["reader int8"].tasks["demo_cxr_zeroshot"]["metrics"]["auroc"]
    cell = row["demo_cxr_zeroshot"]
    assert isinstance(cell, Estimate)
    assert (cell.value, list(cell.ci95), cell.floor) == (own["value"], own["ci95"], own["floor"])


def test_runs_that_cannot_do_any_of_a_tables_tasks_are_named_with_the_reason(report: Report) -> None:
    assert not any(row["run"] == "medvlm-baseline constant" for row in table(report, "accuracy_findings").rows)
    unable = table(report, "unable").rows
    assert any("demo_cxr_efficiency" in str(row["tasks"]) and "profile" in str(row["why"]) for row in unable)


def limited(block: dict[str, Any]) -> None:
    block["tasks"]["demo_cxr_zeroshot"]["scored"] = 10


def other_labels(block: dict[str, Any]) -> None:
    block["tasks"]["demo_cxr_zeroshot"]["label_source"] = "mesh"


@pytest.mark.parametrize(("edit", "said"), [(limited, "documents scored 10"), (other_labels, "label source mesh")])
def test_unlike_runs_have_columns_of_their_own(
    guessing: RunFiles, edited: Callable[..., RunFiles], edit: Any, said: str
) -> None:
    other = edited(guessing, edit)
    report = build_report({"a": guessing, "b": guessing, "c": other})
    found = table(report, "accuracy_findings")
    columns = [column for column in found.columns if column.key.startswith("demo_cxr_zeroshot")]
    assert len(columns) == 2
    assert said in columns[1].title
    (row,) = (row for row in found.rows if row["run"] == "c")
    assert row.get(columns[0].key) is None
    assert row[columns[1].key] is not None
    assert any("Not comparable" in alert for alert in report.alerts)


def test_like_runs_share_a_column(guessing: RunFiles, edited: Callable[..., RunFiles]) -> None:
    report = build_report({"a": guessing, "b": edited(guessing, lambda block: None)})
    assert not any(column.key != "demo_cxr_zeroshot" for column in table(report, "accuracy_findings").columns[1:])
    assert not any("Not comparable" in alert for alert in report.alerts)


def test_scores_of_a_task_are_read_once(guessing: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[Path, str]] = []
    whole = score_table.read_scores

    def counted(path: Path, task: str) -> Any:
        read.append((path, task))
        return whole(path, task)

    monkeypatch.setattr(score_table, "read_scores", counted)
    report_sections({"only": read_run(guessing.path)})
    assert read
    assert len(read) == len(set(read))


def test_a_file_of_another_shape_is_named(guessing: RunFiles, edited: Callable[..., RunFiles]) -> None:
    broken = edited(guessing, lambda block: block["tasks"]["demo_cxr_zeroshot"].pop("contamination"))
    with pytest.raises(UserError, match=r"results_.* hold has not the shape .*contamination"):
        report_sections({"broken": broken})
    with pytest.raises(UserError, match="at least one run"):
        report_sections({})


def test_names_tell_runs_apart(guessing: RunFiles, several: dict[str, RunFiles]) -> None:
    assert list(several) == [
        "reader fp32",
        "reader int8",
        "medvlm-baseline random",
        "medvlm-baseline constant",
    ]
    with pytest.raises(UserError, match="one of them twice"):
        name_runs([guessing, guessing])


def test_runs_that_nothing_tells_apart_are_numbered(guessing: RunFiles, edited: Callable[..., RunFiles]) -> None:
    names = name_runs([guessing, edited(guessing, lambda block: None)])
    assert list(names) == ["medvlm-baseline random #1", "medvlm-baseline random #2"]


def test_a_run_looks_the_same_in_every_figure(report: Report, several: dict[str, RunFiles]) -> None:
    colours: dict[str, set[str]] = {}
    for section in report.sections:
        for part in section.parts:
            if isinstance(part, Plot) and section.name in ("findings", "curves", "calibration", "robustness"):
                for line in (line for panel in part.draw().axes for line in panel.get_lines()):
                    if line.get_label() in several:
                        colours.setdefault(str(line.get_label()), set()).add(str(line.get_color()))
    assert len(colours) > 2
    assert all(len(its) == 1 for its in colours.values())
    assert len(set.union(*colours.values())) == len(colours)

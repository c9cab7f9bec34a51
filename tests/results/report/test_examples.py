from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from medvlm_harness.results.report.examples import examples_section
from medvlm_harness.results.report.parts import Section, Table
from medvlm_harness.results.report.runs import ReportRuns
from medvlm_harness.results.run_files import RunFiles


def shared_as(sharing: str) -> Callable[[dict[str, Any]], None]:
    def edit(block: dict[str, Any]) -> None:
        for details in block["tasks"].values():
            details["dataset"]["sharing"] = sharing

    return edit


def texts_of(section: Section | None) -> str:
    assert section is not None
    return json.dumps([[str(value) for value in row.values()] for part in section.parts for row in part.rows])  # type: ignore[union-attr]


def test_studies_are_named_only_where_the_data_permit(guessing: RunFiles, edited: Callable[..., RunFiles]) -> None:
    assert guessing.scores is not None
    shown = examples_section(ReportRuns({"open": guessing}))
    closed = examples_section(ReportRuns({"closed": edited(guessing, shared_as("hashed"))}))
    assert shown is not None and closed is not None
    ids = [str(row["study"]) for part in shown.parts if isinstance(part, Table) for row in part.rows]
    assert len(ids) == 20  # two directions, best and worst
    assert not any(one in texts_of(closed) for one in ids)
    assert "are not shown" in " ".join(closed.text)


def test_ranks_are_in_order(guessing: RunFiles) -> None:
    section = examples_section(ReportRuns({"open": guessing}))
    assert section is not None and isinstance(section.parts[0], Table)
    best = [
        row["rank"] for row in section.parts[0].rows if row["which"] == "best" and "report" in str(row["direction"])
    ]
    worst = [row["rank"] for row in section.parts[0].rows if row["which"] == "worst"]
    assert best[:5] == sorted(best[:5])  # type: ignore[type-var]
    assert max(best[:5]) < min(worst[:5])  # type: ignore[type-var]


def test_texts_need_both_the_word_and_the_permission(writing: RunFiles, edited: Callable[..., RunFiles]) -> None:
    first = next(writing.path.parent.glob("samples_*.jsonl")).read_text(encoding="utf-8").splitlines()[0]
    wrote = json.loads(first)["filtered_resps"][0]
    assert wrote in texts_of(examples_section(ReportRuns({"a": writing}), show_text=True))
    assert examples_section(ReportRuns({"a": writing})) is None
    closed = examples_section(ReportRuns({"a": edited(writing, shared_as("hashed"))}), show_text=True)
    assert wrote not in texts_of(closed)
    assert closed is not None and "not shown" in " ".join(closed.text)

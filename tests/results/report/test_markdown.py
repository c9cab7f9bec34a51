from __future__ import annotations

import re

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.report.markdown import render_markdown, table_lines
from medvlm_harness.results.report.parts import Column, Plot, Report, Table


def test_tables_have_as_many_cells_in_every_row_whatever_they_hold(hostile: Report) -> None:
    for section in hostile.sections:
        for part in section.parts:
            if isinstance(part, Table):
                lines = [line for line in table_lines(part) if line.startswith("|")]
                cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
                assert cells == {len(part.columns) + 1}


def test_nothing_hostile_is_markup(hostile: Report) -> None:
    text = render_markdown(hostile)
    assert "<script" not in text and "<img" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert not re.search(r"(?<!\\)\$", text)
    assert "http://evil" not in text


def test_a_value_has_its_interval_and_floor_and_a_missing_one_its_reason() -> None:
    nan = float("nan")
    rows = [
        {"run": "a", "m": Estimate(0.9, nan, (0.85, 0.95), 10, floor=0.5)},
        {"run": "b", "m": Estimate(0.6, nan, (0.45, 0.7), 10, floor=0.5)},
        {"run": "c", "m": Estimate.undefined("no positives", n=10)},
    ]
    lines = table_lines(Table("t", "T", [Column("run", "Run"), Column("m", "M", "higher")], rows))
    assert "0.900 [0.850, 0.950], floor 0.500 ★" in lines[2]
    assert "0.600 [0.450, 0.700], floor 0.500 (not above it)" in lines[3]
    assert "n/a (1)" in lines[4]
    assert "(1) no positives" in lines


def test_pictures_are_linked_where_they_are_written(report: Report) -> None:
    plots = [part for section in report.sections for part in section.parts if isinstance(part, Plot)]
    text = render_markdown(report, lambda plot: f"plots/{plot.name}.png")
    assert text.count("](plots/") == len(plots)
    assert "](plots/" not in render_markdown(report)

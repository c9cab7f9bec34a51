from __future__ import annotations

import re

import pytest

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.report.latex import ESCAPED, escape_latex, latex_table, render_latex
from medvlm_harness.results.report.parts import Column, Report, Table

from .conftest import HOSTILE

COMMANDS = {
    *(
        "section",
        "begin",
        "end",
        "caption",
        "label",
        "resizebox",
        "ifdim",
        "width",
        "textwidth",
        "else",
        "fi",
        "toprule",
    ),
    *("midrule", "bottomrule", "par", "smallskip", "footnotesize", "scriptsize", "textbf", "star", "geq", "usepackage"),
    *(re.match(r"\\(\w+)", one)[1] for one in ESCAPED.values() if re.match(r"\\\w", one)),  # type: ignore[index]
}


def balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def test_only_our_commands_are_in_it_and_braces_match(hostile: Report) -> None:
    text = "\n".join(line for line in render_latex(hostile).splitlines() if not line.startswith("%"))
    assert set(re.findall(r"\\([a-zA-Z]+)", text)) <= COMMANDS
    assert balanced(text)
    assert not re.search(r"(?<!\\)[#~^]", text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text: str) -> None:
    escaped = escape_latex(text)
    assert balanced(escaped)
    assert not re.search(r"\\(input|catcode|write)", escaped)
    assert not re.search(r"(?<!\\)[$&%_#]", escaped)


def test_a_row_that_begins_with_a_bracket_is_no_option_of_the_line_before() -> None:
    text = latex_table(Table("t", "T", [Column("run", "Run")], [{"run": "a"}, {"run": "[9cm] b"}]))
    assert "\n{[9cm] b}" in text


def test_booktabs_with_intervals_and_the_leader_in_bold() -> None:
    nan = float("nan")
    rows = [
        {"run": "a", "m": Estimate(0.9, nan, (0.85, 0.95), 9)},
        {"run": "b", "m": Estimate(0.6, nan, (0.5, 0.7), 9)},
    ]
    text = latex_table(Table("t", "T", [Column("run", "Run"), Column("m", "M", "higher")], rows, about="zero_shot"))
    assert r"{a} & {\textbf{0.900} {\scriptsize [0.850, 0.950]}} \\" in text
    assert r"{b} & {0.600 {\scriptsize [0.500, 0.700]}} \\" in text
    assert r"\caption{T: zero\_shot.}" in text
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_methods_are_in_it(report: Report) -> None:
    assert "We evaluated 4 runs" in render_latex(report)


def test_sentences_are_broken_into_lines_and_leave_the_table_its_size() -> None:
    columns = [Column("run", "Run"), Column("why", "Why")]
    text = latex_table(Table("t", "T", columns, [{"run": "a", "why": "x " * 30}]))
    assert r"\begin{tabular}{lp{.3\textwidth}}" in text

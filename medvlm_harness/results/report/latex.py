"""A report's tables and its methods as LaTeX, for papers: booktabs, values with their intervals."""

from __future__ import annotations

from collections.abc import Iterator

from medvlm_harness.results.report.parts import Cell, Report, Table
from medvlm_harness.results.report.shown import leading, shown

__all__ = ["escape_latex", "latex_table", "render_latex"]

ESCAPED = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "–": "--",
    "≥": r"$\geq$",
    "★": r"$\star$",
}
LATIN = 0x17F  # the last character that LaTeX knows in its usual fonts
SENTENCE = 40  # characters from which on a cell is broken into lines
HEAD = r"""% Needs \usepackage{booktabs,graphicx}, and \usepackage[T1]{fontenc} with pdfLaTeX.
% \input this file: it has no preamble. Tables are as wide as the text; delete those that you do not need.
"""


def escape_latex(text: str) -> str:
    r"""Text that stands for itself: no command, no mathematics; a question mark for what the usual fonts lack.

    >>> escape_latex(r"50% of $\input{x}")
    '50\\% of \\$\\textbackslash{}input\\{x\\}'
    """
    plain = " ".join(text.split())
    return "".join(
        ESCAPED.get(character, character if character.isprintable() and ord(character) <= LATIN else "?")
        for character in plain
    )


def render_latex(report: Report) -> str:
    """Every table, section by section, and the sentences of each section; figures are what --format png writes."""
    return HEAD + "\n".join(_lines(report)).rstrip() + "\n"


def _lines(report: Report) -> Iterator[str]:
    for section in report.sections:
        yield from ("", rf"\section*{{{escape_latex(section.title)}}}", "")
        for text in section.text:
            yield from (escape_latex(text.replace("`", "")), "")
        for part in section.parts:
            if isinstance(part, Table):
                yield from (latex_table(part, report.baselines), "")


def latex_table(table: Table, baselines: frozenset[str] = frozenset()) -> str:
    """One table environment; what leads is bold, reasons for missing values stand below."""
    lead = leading(table, baselines)
    reasons: dict[str, int] = {}
    rows = [
        [_cell(row.get(column.key), reasons, leads=(k, column.key) in lead) for column in table.columns]
        for k, row in enumerate(table.rows)
    ]
    # Braces around every cell: one that begins with a bracket would be an option of the line break before it.
    body = [" & ".join(f"{{{cell}}}" for cell in row) + r" \\" for row in rows]
    head = " & ".join(f"{{{escape_latex(column.title)}}}" for column in table.columns) + r" \\"
    notes = [f"({number}) {escape_latex(reason)}." for reason, number in reasons.items()]
    notes += [escape_latex(table.note)] if table.note else []
    lines = [
        r"\begin{table}",
        rf"\caption{{{escape_latex(table.heading)}.}}",
        rf"\label{{tab:{''.join(c if c.isascii() and c.isalnum() else '-' for c in table.name)}}}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{_layout(table)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *([rf"\par\smallskip\footnotesize {' '.join(notes)}"] if notes else []),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _layout(table: Table) -> str:
    """Columns as wide as what they hold; a paragraph for sentences, which would make the whole table small."""
    longest = (max((len(shown(row.get(column.key)).text) for row in table.rows), default=0) for column in table.columns)
    return "".join(r"p{.3\textwidth}" if length > SENTENCE else "l" for length in longest)


def _cell(cell: Cell, reasons: dict[str, int], *, leads: bool) -> str:
    one = shown(cell)
    if one.text == "n/a" and one.reason:
        return f"n/a ({reasons.setdefault(one.reason, len(reasons) + 1)})"
    text = escape_latex(one.text)
    interval = rf" {{\scriptsize {escape_latex(one.interval)}}}" if one.interval else ""
    return rf"\textbf{{{text}}}{interval}" if leads else f"{text}{interval}"

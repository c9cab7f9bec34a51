"""A report as Markdown: tables as text, figures as files beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.markdown import Notes, escape_markdown, link_text, markdown_table
from medvlm_harness.results.report.parts import Cell, Column, Plot, Report, Table
from medvlm_harness.results.report.shown import beside_floor, leading, number, shown

__all__ = ["render_markdown", "table_lines", "with_code"]

LONGEST = 2_000  # characters of a cell


def render_markdown(report: Report, picture: Callable[[Plot], str] | None = None) -> str:
    """The report in GitHub's Markdown.

    Args:
        report: as `build_report` gives it.
        picture: gives the path of a figure's file, relative to the Markdown; None: figures are left out.
    """
    return "\n".join(_lines(report, picture)).rstrip() + "\n"


def _lines(report: Report, picture: Callable[[Plot], str] | None) -> Iterator[str]:
    yield from (f"# {escape_markdown(report.title)}", "", escape_markdown(report.summary), "")
    yield from ("> **Research benchmark. Not for clinical use.**", "")
    for alert in report.alerts:
        yield f"- {with_code(alert)}"
    for section in report.sections:
        yield from ("", f"## {escape_markdown(section.title)}", "")
        for text in section.text:
            yield from (with_code(text), "")
        for about, parts in groupby(section.parts, key=lambda part: part.about):
            if about:
                yield from (f"### {escape_markdown(about)}", "")
            for part in parts:
                if isinstance(part, Table):
                    yield from (f"**{escape_markdown(part.title)}**", "")
                    yield from (*table_lines(part, report.baselines), "")
                elif picture:
                    yield from (f"![{link_text(f'{part.title}. {part.alt}')}]({picture(part)})", "")


def with_code(text: str) -> str:
    """Our own text: what stands between backticks is code."""
    pieces = text.split("`")
    return "".join(
        f"`{piece}`" if k % 2 and k < len(pieces) - 1 else escape_markdown(f"x{piece}x")[1:-1]
        for k, piece in enumerate(pieces)
    )


def table_lines(table: Table, baselines: frozenset[str] = frozenset()) -> list[str]:
    """A table in Markdown: a star at what leads, reasons and its note below."""
    lead, notes = leading(table, baselines), Notes()
    head = tuple(escape_markdown(_heading(column)) for column in table.columns)
    rows = [
        tuple(_cell(row.get(column.key), column, notes, leads=(k, column.key) in lead) for column in table.columns)
        for k, row in enumerate(table.rows)
    ]
    reasons = [escape_markdown(line) if line else "" for line in notes.lines()]
    return [*markdown_table([head, *rows]), *reasons, *(["", escape_markdown(table.note)] if table.note else [])]


def _heading(column: Column) -> str:
    return f"{column.title}, {column.explanation}" if column.explanation else column.title


def _cell(cell: Cell, column: Column, notes: Notes, *, leads: bool) -> str:
    one = shown(cell)
    if isinstance(cell, Estimate) and one.text == "n/a":
        return escape_markdown(notes(one.reason))
    if not isinstance(cell, Estimate):
        return escape_markdown(one.text, longest=LONGEST)
    said = " ".join(filter(None, (one.text, one.interval)))  # digits: nothing to escape
    if cell.floor is not None:
        said += f", floor {number(cell.floor)}"
    if flag := beside_floor(cell, column):
        said += f" ({flag.removesuffix(' its floor')} it)"
    return said + (" ★" if leads else "")

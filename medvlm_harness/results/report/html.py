"""A report as one HTML file that needs nothing else: no network, no other file, no server."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.plots import plot_data
from medvlm_harness.results.report.drawing import look
from medvlm_harness.results.report.parts import Cell, Column, Plot, Report, Section, Table
from medvlm_harness.results.report.shown import beside_floor, interval_of, leading, number, shown
from medvlm_harness.results.report.svg import inline_svg

__all__ = ["render_html"]

TEMPLATES = Path(__file__).parent / "templates"
# Rows of the numbers behind a figure: so many are a table, so many CSV; more are left to --format csv.
MOST_ROWS, MOST_LINES = 60, 400
FILTERED_FROM = 15  # rows of a table from which on it has a filter
FOLDED = frozenset({"findings", "rare", "curves", "calibration", "selective", "robustness", "subgroups"})


@dataclass(frozen=True)
class HtmlCell:
    """A cell as the template needs it."""

    text: str
    interval: str = ""
    floor: str = ""
    flag: str = ""
    note: int | None = None
    sort: str = ""
    numeric: bool = False
    leads: bool = False
    run: str | None = None
    bar: Mapping[str, str] | None = None


@dataclass(frozen=True)
class HtmlTable:
    """A table as the template needs it."""

    id: str
    title: str
    note: str
    columns: Sequence[Column]
    floors: Sequence[str]
    rows: Sequence[tuple[str | None, Sequence[HtmlCell]]]
    notes: Sequence[str]
    filtered: bool


@dataclass(frozen=True)
class HtmlPlot:
    """A figure as the template needs it."""

    id: str
    title: str
    alt: str
    svg: Markup
    data: HtmlTable | None
    csv: str
    file: str
    count: int


def render_html(report: Report) -> str:
    """The page.

    Whatever comes from results files is escaped: by the template engine, and inside figures as the text of SVG. The
    page forbids itself every request and every script but its own.

    Args:
        report: as `build_report` gives it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    page = _Page(report.baselines)
    return environment.get_template("report.html").render(
        report=report,
        swatches=[(run, look(place)["color"]) for place, run in enumerate(report.runs)],
        sections=[(section, list(page.blocks(section))) for section in report.sections],
        folded=FOLDED,
        style=Markup(style),  # noqa: S704  our own file, as is the script
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


class _Page:
    """What the parts of one page share: their ids, and which runs are baselines."""

    def __init__(self, baselines: frozenset[str]) -> None:
        self._baselines = baselines
        self._given: set[str] = set()
        self._figures = 0

    def blocks(self, section: Section) -> Iterator[tuple[str, list[HtmlTable | HtmlPlot]]]:
        """The parts of a section by the task that they are about."""
        for about, parts in groupby(section.parts, key=lambda part: part.about):
            yield about, [self._table(part) if isinstance(part, Table) else self._plot(part) for part in parts]

    def _id(self, name: str) -> str:
        """Each once in the page, of letters, digits and hyphens."""
        new = "".join(character if character.isascii() and character.isalnum() else "-" for character in name)
        while new in self._given:
            new += "-"
        self._given.add(new)
        return new

    def _plot(self, plot: Plot) -> HtmlPlot:
        name = self._id(f"figure-{plot.name}")
        data, csv = None, ""
        if len(plot.data) <= MOST_ROWS:
            keys = list(dict.fromkeys(key for row in plot.data for key in row))
            columns = [Column(key, key.replace("_", " ")) for key in keys]
            rows = [{key: _plain(row.get(key)) for key in keys} for row in plot.data]
            data = self._table(Table(f"data-{plot.name}", f"Numbers: {plot.title}", columns, rows))
        elif len(plot.data) <= MOST_LINES:
            csv = plot_data([{key: _rounded(value) for key, value in row.items()} for row in plot.data])
        self._figures += 1
        svg = inline_svg(plot.draw(), name, f"f{self._figures}")
        return HtmlPlot(name, plot.title, plot.alt, svg, data, csv, plot.name, len(plot.data))

    def _table(self, table: Table) -> HtmlTable:
        lead = leading(table, self._baselines)
        floors = {column.key: _common_floor(table, column) for column in table.columns}
        scales = _scales(table)
        notes: dict[str, int] = {}
        rows = []
        for k, row in enumerate(table.rows):
            run = row.get("run")
            cells = [
                _cell(
                    row.get(column.key),
                    column,
                    leads=(k, column.key) in lead,
                    scale=scales.get(k if table.compared == "across" else column.key),
                    common_floor=floors[column.key],
                    notes=notes,
                )
                for column in table.columns
            ]
            rows.append((run if isinstance(run, str) else None, cells))
        said = [
            f"floor {number(floor)}" if (floor := floors[column.key]) is not None else "" for column in table.columns
        ]
        name = self._id(f"table-{table.name}")
        filtered = len(rows) >= FILTERED_FROM
        return HtmlTable(name, table.title, table.note, table.columns, said, rows, list(notes), filtered)


def _plain(value: object) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str | int | float) and value == value else None


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _common_floor(table: Table, column: Column) -> float | None:
    """The floor that all values of a column share."""
    known = {
        cell.floor
        for row in table.rows
        if isinstance(cell := row.get(column.key), Estimate) and cell.value == cell.value
    }
    return known.pop() if len(known) == 1 else None


def _scales(table: Table) -> dict[int | str, tuple[float, float]]:
    """Lowest and highest end of what stands below each other, or in one row: the axis of its small bars."""
    found: dict[int | str, list[float]] = {}
    for k, row in enumerate(table.rows):
        for column in table.columns:
            cell = row.get(column.key)
            if (ends := interval_of(cell)) is not None and isinstance(cell, Estimate):
                known = [*ends, cell.value, *([cell.floor] if cell.floor is not None else [])]
                found.setdefault(k if table.compared == "across" else column.key, []).extend(known)
    return {place: (min(values), max(values)) for place, values in found.items() if min(values) < max(values)}


def _cell(
    cell: Cell,
    column: Column,
    *,
    leads: bool,
    scale: tuple[float, float] | None,
    common_floor: float | None,
    notes: dict[str, int],
) -> HtmlCell:
    text, interval, reason = shown(cell)
    note = notes.setdefault(reason, len(notes) + 1) if reason else None
    value = cell.value if isinstance(cell, Estimate) else cell
    numeric = isinstance(value, int | float)
    sort = repr(float(value)) if isinstance(value, int | float) and math.isfinite(value) else ""
    floor = ""
    if isinstance(cell, Estimate) and cell.floor is not None and common_floor is None and cell.value == cell.value:
        floor = f"floor {number(cell.floor)}"
    return HtmlCell(
        text, interval, floor, beside_floor(cell, column), note, sort, numeric, leads, column.run, _bar(cell, scale)
    )


def _bar(cell: Cell, scale: tuple[float, float] | None) -> dict[str, str] | None:
    """Where interval, value and floor lie on the axis, in per cent."""
    ends = interval_of(cell)
    if scale is None or ends is None or not isinstance(cell, Estimate):
        return None
    low, high = scale

    def at(value: float) -> float:
        return 100 * (value - low) / (high - low)

    places: dict[str, Any] = {"left": at(ends[0]), "width": at(ends[1]) - at(ends[0]), "value": at(cell.value)}
    if cell.floor is not None:
        places["floor"] = at(cell.floor)
    return {name: f"{place:.1f}" for name, place in places.items()}

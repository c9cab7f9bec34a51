"""The numbers of a report as CSV: a file for each table, and one for what each figure shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medvlm_harness.files import write_whole
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.plots import plot_data, save_plot
from medvlm_harness.results.report.parts import Cell, Column, Plot, Report, Table

__all__ = ["FileNames", "flat_rows", "write_plots", "write_tables"]


class FileNames:
    """Names of files from names of parts: each once, of characters that every file system takes."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, name: str) -> str:
        """The name without a suffix."""
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-@") else "_" for c in name)[:120]
        new, number = plain, 2
        while new.lower() in self._given:
            new, number = f"{plain}_{number}", number + 1
        self._given.add(new.lower())
        return new


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Write every table, and the numbers behind every figure; what of them holds no rows is left out.

    Args:
        report: as `build_report` gives it.
        folder: is made where there is none; files in it of the same names are replaced.
    """
    names = FileNames()
    written = []
    for section in report.sections:
        for part in section.parts:
            table = isinstance(part, Table)
            rows = flat_rows(part) if isinstance(part, Table) else list(part.data)
            if rows:
                path = folder / f"{names(part.name if table else f'figure_{part.name}')}.csv"
                write_whole(path, plot_data(rows).encode())
                written.append(path)
    return written


def flat_rows(table: Table) -> list[dict[str, object]]:
    """Rows of numbers and strings: of an estimate its value, both ends, n, positives, floor and reason."""
    return [dict(pair for column in table.columns for pair in _flat(column, row.get(column.key))) for row in table.rows]


def _flat(column: Column, cell: Cell) -> Iterator[tuple[str, object]]:
    if not isinstance(cell, Estimate):
        yield column.key, cell
        return
    yield column.key, cell.value
    yield f"{column.key}_low", cell.ci95[0]
    yield f"{column.key}_high", cell.ci95[1]
    if cell.n:
        yield f"{column.key}_n", cell.n
    for name in ("positives", "floor", "reason"):
        if (value := getattr(cell, name)) is not None:
            yield f"{column.key}_{name}", value


def write_plots(report: Report, folder: Path, suffix: str) -> dict[str, Path]:
    """Write every figure with its numbers beside it; name of the plot -> its file.

    Args:
        report: as `build_report` gives it.
        folder: is made where there is none.
        suffix: png or svg.
    """
    names = FileNames()
    written = {}
    for section in report.sections:
        for part in section.parts:
            if isinstance(part, Plot):
                path = folder / f"{names(part.name)}.{suffix}"
                save_plot(part.draw(), path, data=part.data)
                written[part.name] = path
    return written

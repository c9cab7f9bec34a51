"""`medvlm report`: runs side by side, for people who choose, and for papers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from medvlm_harness.results.report.parts import Report
    from medvlm_harness.results.run_files import RunFiles

__all__ = ["app"]

app = typer.Typer()


class Format(StrEnum):
    """What a report may be written as."""

    html = "html"
    md = "md"
    latex = "latex"
    csv = "csv"
    png = "png"
    svg = "svg"


# Where a report goes that is not told where: one file, or a folder for formats of many.
OUTPUT = {
    Format.html: "report.html",
    Format.md: "report.md",
    Format.latex: "report.tex",
    Format.csv: "report_tables",
    Format.png: "report_plots",
    Format.svg: "report_plots",
}
FOLDERS = (Format.csv, Format.png, Format.svg)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Results files, or folders of runs (what --output_path named)."),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File; for csv, png and svg a folder.")] = None,
    form: Annotated[Format, typer.Option("--format", help="One page, text, tables or figures.")] = Format.html,
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Benchmark report",
    show_text: Annotated[
        bool,
        typer.Option(
            "--show-text", "--show_text", help="Show texts of models and their references, where data permit."
        ),
    ] = False,
) -> None:
    """Report runs: accuracy, cost and trust with floors and intervals, cautions, figures, and a methods paragraph.

    One HTML file that needs no network; or Markdown, LaTeX, CSV, or figures with their numbers.
    """
    from medvlm_harness.results.report.build import build_report
    from medvlm_harness.results.report.runs import name_runs

    found = build_report(name_runs(_runs(runs)), title=title, show_text=show_text)
    path = output or Path(OUTPUT[form])
    if form in FOLDERS and path.is_file():
        raise UserError(f"Expected -o to be a folder for --format {form}, but {path} is a file.")
    if form not in FOLDERS and path.is_dir():
        raise UserError(f"Expected -o to be a file for --format {form}, but {path} is a folder.")
    for line in _write(found, form, path):
        typer.echo(line)


def _runs(paths: Sequence[Path]) -> list[RunFiles]:
    """The runs that were named, those of a folder with the oldest first."""
    from medvlm_harness.results.run_files import find_runs, read_run

    found: list[RunFiles] = []
    for path in paths:
        its = find_runs(path)[::-1] if path.is_dir() else [read_run(path)]
        ours = [run for run in its if "medvlm" in run.results]
        if not ours:
            raise UserError(f"Expected runs with medvlm-harness, but found none in {path}.")
        found += ours
    return found


def _write(found: Report, form: Format, path: Path) -> Iterator[str]:
    """Write the report, and say what was written."""
    from medvlm_harness.files import write_whole
    from medvlm_harness.results.report.html import render_html
    from medvlm_harness.results.report.latex import render_latex
    from medvlm_harness.results.report.markdown import render_markdown
    from medvlm_harness.results.report.tables_csv import write_plots, write_tables

    if form is Format.csv:
        yield f"wrote {len(write_tables(found, path))} tables to {path}"
    elif form in FOLDERS:
        yield f"wrote {len(write_plots(found, path, form.value))} figures, each with its numbers, to {path}"
    else:
        if form is Format.html:
            text = render_html(found)
        elif form is Format.latex:
            text = render_latex(found)
        else:
            folder = path.with_name(f"{path.stem}_plots")
            plots = write_plots(found, folder, "png")
            yield f"wrote {len(plots)} figures to {folder}"
            text = render_markdown(found, lambda plot: quote(f"{folder.name}/{plots[plot.name].name}"))
        write_whole(path, text.encode())
        yield f"wrote {path} ({len(text.encode()) / 1e6:.1f} MB)"

"""`medvlm label`: CheXpert labels for a table of reports, for people who want nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["app"]

app = typer.Typer()


@app.command()
def label(
    file: Annotated[Path, typer.Argument(help="Table of reports: .csv, .tsv or .parquet, one report a row.")],
    text_column: Annotated[
        list[str],
        typer.Option("--text-column", "--text_column", help="Column with the report; repeat it for several sections."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: the table with one column per label.")],
    labeler: Annotated[
        str, typer.Option(help="rules, or chexbert,weights=FILE,vocab=FILE; options follow the name, with commas.")
    ] = "rules",
    prefix: Annotated[str, typer.Option(help="Put before the names of the new columns.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there already.")] = False,
) -> None:
    """Label the reports of a table with CheXpert's fourteen observations: 1, 0, -1 (uncertain) or blank."""
    from medvlm_harness.labelers.base import labeler_from_text
    from medvlm_harness.labelers.tables import label_table

    reader = labeler_from_text(labeler)
    columns = (TextColumn("labelling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reports", total=None)
        written = label_table(
            file,
            text_column,
            out,
            reader,
            prefix=prefix,
            overwrite=overwrite,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    empty = f", {written.without_text} without text left blank" if written.without_text else ""
    typer.echo(f"wrote {written.path}: {written.rows} reports labelled by {reader.name} {reader.version}{empty}")

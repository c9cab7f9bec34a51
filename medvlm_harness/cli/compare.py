"""`medvlm compare`: is one run better or worse than another, and where do they disagree?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvlm_harness.errors import UserError

__all__ = ["app"]

app = typer.Typer()

WRITTEN = (".md", ".json", ".csv")


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(metavar="A", help="Results file, or a folder: its newest run.")],
    run: Annotated[Path, typer.Argument(metavar="B", help="The run that is judged, likewise.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="task:metric to test, instead of all of all tasks; repeatable."),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Loss of a primary metric that does not matter: is B not worse by more?")
    ] = None,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit status 1 if B is worse in a primary metric (of those tested).")
    ] = False,
    across: Annotated[
        list[str] | None,
        typer.Option(help="What may differ all the same: preprocessing, perturbation; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write .md, .json (all studies) or .csv (all tests).")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Of studies, for the intervals.")] = 1000,
) -> None:
    """Compare two runs on the same studies: paired intervals, tests, a verdict, and where they disagree."""
    from medvlm_harness.files import write_json, write_whole
    from medvlm_harness.results.comparing.significance import ACROSS, assess
    from medvlm_harness.results.comparing.significance_table import significance_rows, significance_table
    from medvlm_harness.results.manifest import changes
    from medvlm_harness.results.plots import plot_data
    from medvlm_harness.results.run_files import find_run

    if margin is not None and not margin > 0:
        raise UserError(f"Expected --margin above 0, such as 0.02, but got {margin:g}.")
    if output is not None and output.suffix not in WRITTEN:
        raise UserError(f"Expected --output to end in {', '.join(WRITTEN)}, but got {output.name}.")
    if unknown := sorted(set(across or ()) - set(ACROSS)):
        raise UserError(f"Expected --across to be one of {', '.join(ACROSS)}, but got {unknown[0]}.")
    first, second = find_run(reference), find_run(run)
    if first.path.resolve() == second.path.resolve():
        raise UserError(f"Expected two runs, but both are {first.path}.")
    for one in (first, second):
        for change in changes(one.path, one.results) or ():
            typer.echo(f"note: {change}", err=True)
    block = assess(first, second, metrics=metric or (), margin=margin, across=across or (), resamples=resamples)
    table = significance_table(block)
    typer.echo(table)
    if output is not None:
        if output.suffix == ".json":
            write_json(output, block)
        else:
            write_whole(output, table if output.suffix == ".md" else plot_data(significance_rows(block)))
        typer.echo(f"wrote {output}")
    primary = [row for row in block["tests"] if row["primary"]]
    if fail_if_worse and not primary:
        raise UserError("Expected a primary metric among --metric, since --fail-if-worse asks for those only.")
    worse, undecided = (
        [f"{row['task']}:{row['metric']}" for row in primary if row["verdict"] == said]
        for said in ("worse", "undecided")
    )
    if fail_if_worse and undecided:
        typer.echo(f"Undecided: {', '.join(undecided)}", err=True)
    if fail_if_worse and worse:
        typer.echo(f"B is worse: {', '.join(worse)}", err=True)
        raise typer.Exit(1)

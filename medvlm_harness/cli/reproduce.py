"""`medvlm reproduce`: a run again from its results file, and what came out otherwise."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvlm_harness.cli.output import print_table
from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from medvlm_harness.results.reproduce import Reproduction

__all__ = ["app"]

app = typer.Typer()


@app.command()
def reproduce(
    results: Annotated[Path, typer.Argument(help="The results_<date>.json of a run.")],
    model_args: Annotated[
        str | None,
        typer.Option("--model-args", "--model_args", help="Options in place of the file's: pretrained=DIR,..."),
    ] = None,
    metadata: Annotated[str | None, typer.Option(help="Likewise of --metadata: data_dir=DIR,...")] = None,
    include_path: Annotated[
        list[str] | None,
        typer.Option("--include-path", "--include_path", help="Folder with task YAML; repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the new run's files here.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest difference; by default 0 on the same machine and versions, else 0.005."),
    ] = None,
    use_store: Annotated[
        bool, typer.Option("--use-store", help="Take answers from the store, which computes no answer anew.")
    ] = False,
    allow_other_inputs: Annotated[
        bool, typer.Option("--allow-other-inputs", help="Go on with weights or data of another hash.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all differences as JSON.")] = False,
) -> None:
    """Run a results file's run again and print what came out otherwise.

    Exit status 0: every metric came out again; 1: one did not; 2: wrong input, or other weights or data.
    """
    from medvlm_harness.results.manifest import changes
    from medvlm_harness.results.reproduce import call_of, compare, other_inputs, parse_options, run_again
    from medvlm_harness.results.run_files import read_run
    from medvlm_harness.store import ENVIRONMENT as STORE

    before = read_run(results)
    call = call_of(
        before,
        model_args=parse_options(model_args, "--model-args"),
        metadata=parse_options(metadata, "--metadata"),
        include_paths=include_path or (),
    )
    for note in [*call.notes, *(changes(results, before.results) or ())]:
        typer.echo(f"note: {note}", err=True)
    if dry_run:
        typer.echo(shlex.join(call.arguments()))
        return
    if (others := other_inputs(before, call)) and not allow_other_inputs:
        raise UserError(f"This would be another run: {'; '.join(others)}. --allow-other-inputs runs it all the same.")
    with tempfile.TemporaryDirectory(prefix="medvlm-reproduce-") as temporary:
        fresh = {} if use_store else {STORE: str(Path(temporary) / "store.sqlite")}
        now = read_run(run_again(call, output or Path(temporary) / "run", {**os.environ, **fresh}))
        found = compare(before, now, tolerance=tolerance)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "other_inputs": others}, indent=2))
    else:
        _print(found)
    if not found.same:
        raise typer.Exit(1)


def _print(found: Reproduction) -> None:
    """The metrics that differ, one line each; how many came out again; and what else was not the same."""
    differing = [one for one in found.metrics if one.difference or not one.same]
    if differing:
        rows = [
            [one.task, one.metric, _number(one.before), _number(one.now), _number(one.difference), _verdict(one.same)]
            for one in differing
        ]
        print_table("Metrics that differ", ["Task", "Metric", "Before", "Now", "Largest difference", ""], rows)
    for line in [*found.around, *(f"{task} was not reproduced: {why}" for task, why in found.unreproduced.items())]:
        typer.echo(line)
    same = sum(one.same for one in found.metrics)
    typer.echo(f"{same} of {len(found.metrics)} metrics came out again (tolerance {found.tolerance:g}).")


def _verdict(same: bool) -> str:
    return "within tolerance" if same else "DIFFERS"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.6g}"

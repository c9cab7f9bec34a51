"""`medvlm results`: whether results files are what runs wrote, and their JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medvlm_harness.errors import UserError

__all__ = ["app"]

app = typer.Typer(help="Check results files.", no_args_is_help=True)


@app.command()
def validate(
    paths: Annotated[list[Path], typer.Argument(help="Results files, or folders with them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check shape, numbers and manifest of results files; exit status 1 if something is wrong with one."""
    from medvlm_harness.results.run_files import results_files
    from medvlm_harness.results.validation import validate as validate_file

    files = [file for path in paths for file in (results_files(path) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"Expected results files, but there are none in {', '.join(map(str, paths))}.")
    verdicts = [validate_file(file) for file in files]
    if as_json:
        typer.echo(json.dumps([verdict.to_dict() for verdict in verdicts], indent=2))
    else:
        for verdict in verdicts:
            said = "; ".join([*verdict.problems, *verdict.notes])
            typer.echo(f"{verdict.path}: {'ok' if verdict.valid else 'WRONG'}{said and f': {said}'}")
    if not all(verdict.valid for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of results files."""
    from medvlm_harness.results.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))

"""`medvlm sweep`: a grid of runs from one YAML, planned, executed, resumed and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medvlm_harness import plugin
from medvlm_harness.cli.output import print_table
from medvlm_harness.cli.run import duration, refuse_unknown_model, refuse_unknown_tasks
from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from medvlm_harness.sweeps.cells import Cell
    from medvlm_harness.sweeps.declaration import Sweep
    from medvlm_harness.sweeps.state import CellState

__all__ = ["app"]

app = typer.Typer(help="Run a grid of models, options, seeds and tasks, and compare them.", no_args_is_help=True)

SweepOf = Annotated[str, typer.Argument(metavar="SWEEP", help="A shipped sweep (`medvlm sweep list`), or a YAML file.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a sweep.")]
Values = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE for ${NAME} in the YAML; repeatable.")]
Output = Annotated[Path | None, typer.Option("--output", help="Output folder; sweeps/<name> if not said.")]
Include = Annotated[
    list[Path] | None, typer.Option("--include-path", "--include_path", help="Folder with task YAML; repeatable.")
]
Limit = Annotated[float | None, typer.Option(help="Documents of each task, as in lm-eval, for all cells.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Cells by name or pattern; repeatable.")]


@app.command("list")
def list_sweeps() -> None:
    """List the shipped sweeps, what each needs, and their files: copy one to change it."""
    import yaml

    from medvlm_harness.sweeps.declaration import placeholders, shipped_sweeps

    rows = []
    for name, path in shipped_sweeps().items():
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        needs = " ".join(f"--set {one}=..." for one, needed in placeholders(raw).items() if needed)
        rows.append([name, raw["summary"], needs, str(path)])
    print_table("Sweeps", ["Name", "What it varies", "Needs", "File"], rows)


@app.command()
def plan(
    sweep: SweepOf,
    values: Values = None,
    output: Output = None,
    include_path: Include = None,
    limit: Limit = None,
    only: Only = None,
) -> None:
    """Check a sweep and print its cells: what is done already, and the command of each. Runs nothing."""
    from medvlm_harness.sweeps.state import CellFolder

    declared, cells, folder = _prepare(sweep, values, output, include_path, limit, only)
    states = [CellFolder(folder, cell.name, cell.key).state() for cell in cells]
    axes = list(dict.fromkeys(axis for cell in cells for axis in cell.place))
    rows = [
        [cell.name, *(cell.place.get(axis, "") for axis in axes), ", ".join(cell.tasks), state.status]
        for cell, state in zip(cells, states, strict=True)
    ]
    print_table(f"Sweep {declared.name}: {declared.summary}", ["Cell", *axes, "Tasks", "State"], rows)
    for cell in cells:
        typer.echo(cell.command(CellFolder(folder, cell.name, cell.key).run))
    typer.echo()
    typer.echo(_counts(states))


@app.command()
def run(
    sweep: SweepOf,
    values: Values = None,
    output: Output = None,
    include_path: Include = None,
    limit: Limit = None,
    only: Only = None,
    executor: Annotated[str | None, typer.Option(help="local, slurm, or debug (one by one); else the sweep's.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Cells at once; else the sweep's.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", "--retry_failed", help="Run those again that failed.")
    ] = False,
) -> None:
    """Run what is not done yet, each cell in a process of its own; then compare.

    Stop it with Ctrl-C or kill it: the same command goes on. Exit status 0: all done; 1: some are not; 2: wrong input.
    """
    from medvlm_harness.sweeps.execution import run_cells, to_run
    from medvlm_harness.sweeps.state import CellFolder, locked, write_record

    declared, cells, folder = _prepare(sweep, values, output, include_path, limit, only)
    where = _executor(declared, executor, parallel)
    with locked(folder):
        write_record(folder, declared, _all_cells(declared, include_path))
        left = to_run(cells, folder, retry_failed=retry_failed)
        typer.echo(f"{len(cells)} cells, {len(left)} to run; output in {folder}")
        ended = 0

        def finished(cell: Cell, state: CellState) -> None:
            nonlocal ended
            ended += 1
            typer.echo(f"[{ended}/{len(left)}] {cell.name}: {_in_words(state)}")

        try:
            run_cells(left, folder, where, finished)
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on", err=True)
            raise
        states = {cell.name: CellFolder(folder, cell.name, cell.key).state() for cell in cells}
        typer.echo(_counts(list(states.values())))
        _print_comparison(folder)
    for name, state in states.items():
        if state.status != "done":
            typer.echo(f"{name}: {_in_words(state)}", err=True)
    if any(state.status != "done" for state in states.values()):
        raise typer.Exit(1)


@app.command()
def status(folder: Folder) -> None:
    """Which cells are done, at work, failed or waiting, and why; from files alone, also while the sweep runs."""
    from medvlm_harness.sweeps.state import controller, read_record

    recorded = read_record(folder)
    states = [(name, cell.state()) for name, cell in recorded.folders(folder)]
    rows = [
        [name, state.status, _took(state), _memory(state.peak_ram_mib), state.reason or ""] for name, state in states
    ]
    print_table(f"Sweep {recorded.name}", ["Cell", "State", "Time", "Peak memory", "Reason"], rows)
    typer.echo(_counts([state for _, state in states]))
    process = controller(folder)
    if process is not None:
        typer.echo(f"Process {process.pid} on {process.host} runs the sweep.")
    elif any(state.status in ("running", "queued") for _, state in states):
        typer.echo("The process that ran the sweep is gone; what is at work goes on. `medvlm sweep run` waits for it.")


@app.command()
def table(folder: Folder) -> None:
    """Compare the cells that are done, once more."""
    if not _print_comparison(folder):
        raise UserError(f"No cell of {folder} is done yet.")


def _prepare(
    name: str,
    values: Sequence[str] | None,
    output: Path | None,
    include_paths: Sequence[Path] | None,
    limit: float | None,
    only: Sequence[str] | None,
) -> tuple[Sweep, list[Cell], Path]:
    """The sweep, its chosen cells, all of them checked, and the output folder."""
    from medvlm_harness.sweeps.cells import choose
    from medvlm_harness.sweeps.declaration import find_sweep, read_sweep

    given = {}
    for value in values or ():
        placeholder, equals, text = value.partition("=")
        if not equals:
            raise UserError(f"Expected --set NAME=VALUE, but got {value!r}.")
        given[placeholder] = text
    declared = read_sweep(find_sweep(name), given)
    if limit is not None:
        declared = replace(declared, limit=int(limit) if limit == int(limit) else limit)
    cells = choose(_all_cells(declared, include_paths), only or ())
    _check(cells, include_paths or ())
    return declared, cells, output or Path("sweeps") / declared.name


def _all_cells(sweep: Sweep, include_paths: Sequence[Path] | None) -> list[Cell]:
    from medvlm_harness.sweeps.cells import make_cells

    return make_cells(sweep, include_paths or ())


def _check(cells: Sequence[Cell], include_paths: Sequence[Path]) -> None:
    """Refuse unknown tasks, models and options of models, before anything runs."""
    plugin.scope.builtin_tasks = False
    plugin.scope.include_paths = tuple(include_paths)
    plugin.install()
    refuse_unknown_tasks(dict.fromkeys(task for cell in cells for task in cell.tasks))
    for model in dict.fromkeys(cell.model for cell in cells):
        refuse_unknown_model(model)
    from lm_eval.api.registry import get_model

    for cell in cells:
        backend: Any = get_model(cell.model)
        if hasattr(backend, "refuse_options"):  # of lm-eval's own models nothing is known
            try:
                backend.refuse_options(cell.args)
            except UserError as error:
                raise UserError(f"{cell.name}: {error}") from error


def _executor(declared: Sweep, kind: str | None, parallel: int | None) -> Any:
    from medvlm_harness.sweeps.executor import as_kind

    chosen = declared.executor
    return replace(chosen, kind=as_kind(kind or chosen.kind), parallel=parallel or chosen.parallel).checked()


def _print_comparison(folder: Path) -> bool:
    """Print and write the comparison of the cells that are done; whether there was one."""
    from medvlm_harness.sweeps.comparison import compare_cells

    found = compare_cells(folder)
    if found is None:
        return False
    typer.echo(found.table)
    for path in found.files:
        typer.echo(f"wrote {path}")
    return True


def _counts(states: Sequence[CellState]) -> str:
    counts = Counter(state.status for state in states)
    return f"{len(states)} cells: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def _in_words(state: CellState) -> str:
    took = f" ({_took(state)})" if state.seconds is not None else ""
    return f"{state.status}{took}" + (f": {state.reason}" if state.reason else "")


def _took(state: CellState) -> str:
    return "" if state.seconds is None else duration(state.seconds)


def _memory(mib: float | None) -> str:
    return f"{mib:,.0f} MiB" if mib else ""

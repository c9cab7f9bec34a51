"""`medvlm store`: what the store of answers holds, and its upkeep."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvlm_harness.cli.output import print_table
from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from medvlm_harness.store import Store, Verification

__all__ = ["app"]

app = typer.Typer(help="See, trim, check and export what models answered.", no_args_is_help=True)

SHOWN_HASH = 12  # characters, as in every other table
File = Annotated[Path | None, typer.Option("--file", help="The store, if not the default one.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Only this model: its name, or the beginning of its weights' hash; repeatable."),
]


@app.command()
def info(file: File = None) -> None:
    """How large it is, and what it holds of which model."""
    from medvlm_harness.store_upkeep import format_size, size_on_disk, summarise

    path = _existing(file)
    with _opened(path, read_only=True) as store:
        infos = store.spaces()
    answers = sum(info.answers for info in infos)
    typer.echo(f"{path}: {format_size(size_on_disk(path))}, {answers:,} answers")
    print_table(
        "Models",
        ["Model", "Weights", "Precision", "Answers", "Size", "Last used"],
        [
            [
                summary.name or "unnamed",
                summary.weights[:SHOWN_HASH],
                summary.precision,
                ", ".join(f"{kind} {count:,}" for kind, count in summary.kinds.items()),
                format_size(summary.bytes),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(summary.used)),
            ]
            for summary in summarise(infos)
        ],
    )


@app.command()
def prune(
    file: File = None,
    model: Models = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", "--older_than", help="Only what no run has used for: 12h, 30d, 8w.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size", "--max_size", help="Only until the file is no larger: 500MB, 10GB. Oldest use first."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="Say what would go, and remove nothing.")
    ] = False,
) -> None:
    """Remove answers, and give their room back to the disk. Several options narrow each other."""
    from medvlm_harness import store_upkeep as upkeep

    if not (model or older_than or max_size):
        raise UserError("Expected one or more of --model, --older-than and --max-size: what shall be removed?")
    since = None if older_than is None else time.time() - upkeep.parse_age(older_than)
    limit = None if max_size is None else upkeep.parse_size(max_size)
    path = _existing(file)
    with _opened(path, read_only=dry_run) as store:
        candidates = store.spaces()
        if model:
            candidates = upkeep.of_models(candidates, model)
        if since is not None:
            candidates = upkeep.idle_since(candidates, since)
        pruned = upkeep.prune(store, candidates, limit=limit, dry_run=dry_run)
    for gone in pruned.spaces:
        about = ", ".join(part for part in (gone.space.prompt[:40], gone.space.perturbation) if part)
        weights = upkeep.weights_sha256(gone.space.model)[:SHOWN_HASH]
        name = gone.space.name or "unnamed"
        typer.echo(f"  {name} ({weights}), {gone.space.kind}{f' ({about})' if about else ''}: {gone.answers:,} answers")
    room = upkeep.format_size(pruned.bytes)
    if dry_run:
        typer.echo(f"would remove {pruned.answers:,} answers: about {room}")
    else:
        typer.echo(
            f"removed {pruned.answers:,} answers: {room} won, {upkeep.format_size(upkeep.size_on_disk(path))} left"
        )


@app.command()
def verify(
    file: File = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Begin a new file with the sound answers; the old one is kept beside it.")
    ] = False,
) -> None:
    """Check the file and every answer in it; exit status 1 if it is damaged and not repaired."""
    from medvlm_harness.store_upkeep import check

    path = _existing(file)
    with _clear_errors(path):
        found = check(path)
    if found.sound:
        typer.echo(f"{path}: {found.answers:,} answers, all sound")
        return
    if not repair:
        typer.echo(
            f"{path} is damaged ({_damage(found)}): run `{_mend(path)}`. Until then what is damaged is computed again."
        )
        raise typer.Exit(1)
    typer.echo(f"{path} is damaged ({_damage(found)})")
    with _opened(path) as store:  # which begins a new file already if it cannot be opened at all
        found = store.verify()
        kept = found.answers if found.sound else store.rebuild()
    typer.echo(f"repaired: {kept:,} sound answers taken over; the old file is kept beside it, as *.damaged-*")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="OUT.sqlite (made, or added to) or OUT.parquet (made).")],
    file: File = None,
    model: Models = None,
) -> None:
    """Copy answers: to another store, or to a table with a row per answer.

    To OUT.sqlite they are added to what is there, so the stores of several machines become one:
    medvlm store export all.sqlite --file machine1.sqlite, then the same with machine2.sqlite.
    """
    from medvlm_harness import store_upkeep as upkeep

    if out.suffix not in (".sqlite", ".parquet"):
        raise UserError(f"Expected OUT.sqlite or OUT.parquet, but got {out}.")
    path = _existing(file)
    if out.exists() and out.samefile(path):
        raise UserError(f"Expected another file than the store itself, but got {out}.")
    with _opened(path, read_only=True) as store:
        infos = store.spaces()
        if model:
            infos = upkeep.of_models(infos, model)
        held = sum(info.answers for info in infos)
        if out.suffix == ".parquet":
            written = upkeep.export_parquet(store, out, infos)
        else:
            with _opened(out) as other:
                written = store.copy_to(other, [info.space.sha256 for info in infos])
    typer.echo(f"wrote {written:,} of {held:,} answers to {out}")


def _existing(file: Path | None) -> Path:
    from medvlm_harness.store import default_path

    path = default_path() if file is None else file.expanduser()
    if not path.exists():
        raise UserError(f"no store at {path}: the first run makes it; or name one with --file.")
    return path


@contextlib.contextmanager
def _opened(path: Path, *, read_only: bool = False) -> Iterator[Store]:
    from medvlm_harness.store import Store

    with _clear_errors(path):
        store = Store(path, read_only=read_only)
        try:
            yield store
        finally:
            store.close()


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """What SQLite says of a file, as one line and what to do about it."""
    from medvlm_harness.store_file import DAMAGE, FAILURES, error_code

    try:
        yield
    except FAILURES as error:
        if error_code(error) in DAMAGE:
            raise UserError(f"The store {path} is damaged ({error}): run `{_mend(path)}`.") from error
        raise UserError(f"The store {path} cannot be used: {error}.") from error


def _mend(path: Path) -> str:
    """The command that mends a store."""
    from medvlm_harness.store import default_path

    return "medvlm store verify --repair" + ("" if path == default_path() else f" --file {shlex.quote(str(path))}")


def _damage(found: Verification) -> str:
    answers = [f"{found.damaged:,} of {found.answers:,} answers"] if found.damaged else []
    more = [f"and {len(found.problems) - 1} more"] if len(found.problems) > 1 else []
    return "; ".join([*answers, *found.problems[:1], *more])

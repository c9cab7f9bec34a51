"""`medvlm models`: which models there are, what is known of one, which fit, and whether backends compute right."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medvlm_harness import plugin
from medvlm_harness.cli.fits import show_fits
from medvlm_harness.cli.output import print_table
from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection

    from medvlm_harness.model_backends.cards import ModelCard
    from medvlm_harness.model_backends.catalogue import Entry

__all__ = ["app", "catalogue_rows"]

HEADER = ["Name", "What", "Parameters", "Licence of weights", "Trained on", "Run with", "Can it run"]
LISTED = ("Name", "What", "Parameters", "Can it run")  # what a terminal has room for

app = typer.Typer()


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show all that is known of one model.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the list as in docs/models.md.")] = False,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Compare the backends with reference answers; needs --golden.")
    ] = False,
    golden: Annotated[Path | None, typer.Option("--golden", help="Folder of reference answers.")] = None,
    fits: Annotated[
        str | None, typer.Option("--fits", help="Predict which models a memory is large enough for: 16GB, 24GiB.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="With --fits: only models that can do this task.")] = None,
) -> None:
    """List the models that can be run, those that cannot and why; or show one of them."""
    if selftest != (golden is not None):
        raise UserError("--selftest and --golden DIR go together.")
    if task is not None and fits is None:
        raise UserError("--task needs --fits SIZE.")
    if sum((name is not None, markdown, selftest, fits is not None)) > 1:
        raise UserError("Expected one of NAME, --markdown, --selftest and --fits.")
    if fits is not None:
        show_fits(fits, task)
    elif golden is not None:
        _selftest(golden)
    elif name is not None:
        _show(name)
    elif markdown:
        typer.echo(markdown_table())
    else:
        columns = [HEADER.index(heading) for heading in LISTED]
        rows = catalogue_rows(plugin.model_targets())
        print_table("Models", list(LISTED), [[row[column] for column in columns] for row in rows])
        typer.echo("medvlm models NAME shows all that is known of one, and how it is run.")


def catalogue_rows(registered: Collection[str] | None = None) -> list[list[str]]:
    """The list, a row for each card; `registered` are the backends that there are, all of them by default."""
    from medvlm_harness.model_backends.catalogue import catalogue, state

    rows = []
    for name, entry in catalogue().items():
        card, run = entry.card, entry.run
        backends = registered if registered is not None else {run.model or ""}
        rows.append(
            [
                name,
                card.summary,
                _size(card),
                card.licence or "not stated",
                _trained_on(card),
                _command(entry),
                state(entry, backends),
            ]
        )
    return rows


def markdown_table() -> str:
    """The list in Markdown, of an installation that has every backend."""
    rows = [HEADER, ["---"] * len(HEADER), *catalogue_rows()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _size(card: ModelCard) -> str:
    """`151.3M`; where nobody counted, what the name says; marked where it is over the limit."""
    from medvlm_harness.model_backends.catalogue import PARAMETER_LIMIT, over_limit

    if card.parameters is not None:
        size = f"{card.parameters / 1e6:,.1f}M"
    elif card.billions is not None:
        size = f"{card.billions:g}B by its name"
    else:
        return "not stated"
    return f"{size}, over the limit of {PARAMETER_LIMIT / 1e9:g}B" if over_limit(card) else size


def _trained_on(card: ModelCard) -> str:
    return "not stated" if card.trained_on is None else ", ".join(map(str, card.trained_on)) or "nothing"


def _command(entry: Entry) -> str:
    if entry.run.model is None:
        return ""
    return f"--model {entry.run.model}" + (f" --model_args {shlex.quote(entry.run.args)}" if entry.run.args else "")


def _show(name: str) -> None:
    """Every field; what nobody published says so."""
    from medvlm_harness.model_backends.catalogue import find, state

    entry = find(name)
    card, source, prompts = entry.card, entry.card.source, entry.card.prompts
    rows: list[list[Any]] = [
        ["what", card.summary],
        ["family", card.family],
        ["can it run", state(entry, plugin.model_targets())],
        ["run with", _command(entry) or "nothing here"],
        ["weights", "not stated" if source is None else source.location],
        ["revision", "unpinned" if source is None or source.revision is None else source.revision],
    ]
    hashes = source.sha256 if source is not None else {}
    rows += [["sha256", f"{sha256} {file}"] for file, sha256 in hashes.items()] or [["sha256", "unpinned"]]
    rows += [
        ["licence of weights", card.licence or "not stated"],
        ["parameters", _size(card) if card.parameters is None else f"{card.parameters:,}"],
        *([["counted", card.counted]] if card.counted else []),
        ["trained on", _trained_on(card)],
        ["preprocessing", card.preprocessing or "not stated"],
        ["probability scale", card.probability_scale or "none"],
    ]
    if prompts is None:
        rows.append(["published prompts", "none"])
    else:
        rows += [["published prompt", repr(text)] for text in (*prompts.positive, *prompts.negative)]
        rows += [["published turn", repr(prompts.conversation)]] if prompts.conversation else []
        rows.append(["prompts from", f"{prompts.source} ({prompts.licence})"])
    rows += [["known trap", trap] for trap in card.traps]
    rows.append(["reference", card.reference or "not stated"])
    print_table(card.name, ["Field", "Value"], rows)


def _selftest(golden: Path) -> None:
    """Print every comparison.

    Raises:
        UserError: if one is above its tolerance or failed, or nothing could be compared.
    """
    from medvlm_harness.model_backends.selftest import run_selftest

    report = run_selftest(golden)
    rows = [[c.family, c.name, f"{c.difference:.2e}", f"{c.tolerance:g}", c.verdict] for c in report.comparisons]
    print_table(
        "Largest absolute differences from the reference", ["Model", "What", "Difference", "Tolerance", ""], rows
    )
    for family, reason in (*report.skipped.items(), *report.failed.items()):
        typer.echo(f"{family}: {reason}")
    if problem := report.problem:
        raise UserError(problem)

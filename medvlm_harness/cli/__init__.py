"""The `medvlm` command: its entry point, what it does about errors, and where each command is mounted."""

from __future__ import annotations

import os
import sys

import typer
from typer.exceptions import TyperException

from medvlm_harness.cli import (
    compare,
    convert,
    data,
    finetune,
    label,
    listing,
    models,
    perturb,
    push,
    report,
    reproduce,
    results,
    run,
    store,
    sweep,
    tokenizers,
)
from medvlm_harness.errors import UserError

__all__ = ["main"]

app = typer.Typer(
    help="Benchmark small medical vision-language models with lm-eval.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# The help lists the commands in this order; without a name they are commands of `medvlm` itself.
app.add_typer(run.app)
app.add_typer(reproduce.app)
app.add_typer(results.app, name="results")
app.add_typer(listing.app)
app.add_typer(models.app)
app.add_typer(convert.app)
app.add_typer(data.app, name="data")
app.add_typer(label.app)
app.add_typer(perturb.app)
app.add_typer(finetune.app)
app.add_typer(compare.app)
app.add_typer(report.app)
app.add_typer(sweep.app, name="sweep")
app.add_typer(push.app)
app.add_typer(tokenizers.app, name="tokenizers")
app.add_typer(store.app, name="store")


def main() -> None:
    """Entry point: one clear line and exit status 2 for what the user can mend; tracebacks only with --debug."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if len(arguments) < len(sys.argv) - 1:
        os.environ["MEDVLM_DEBUG"] = "1"
    debug = os.environ.get("MEDVLM_DEBUG", "") not in ("", "0")
    try:
        sys.exit(app(arguments, prog_name="medvlm", standalone_mode=False) or 0)
    except UserError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except TyperException as error:
        if message := " ".join(error.format_message().split()):
            _fail(message, 2)
        sys.exit(2)  # no arguments at all: the help is printed already
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", 130)
    except OSError as error:  # a full disk, a folder that may not be written
        if debug:
            raise
        _fail(str(error), 1)


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(status)

"""`medvlm run`: lm-eval's own run on our tasks, and the plan of one."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medvlm_harness import plugin
from medvlm_harness.cli.output import print_table
from medvlm_harness.cli.stability import run_variants, variants
from medvlm_harness.errors import UserError, near_matches

if TYPE_CHECKING:
    from medvlm_harness.results.plan import PlannedRun

__all__ = ["app", "duration", "refuse_unknown_model", "refuse_unknown_tasks"]

GC_THRESHOLD = 200_000  # objects; Python's own is 700

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", "--include_path", help="Folder with task YAML; repeatable.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print forward passes and time, and run nothing.")] = False,
    seeds: Annotated[
        str | None, typer.Option(help="0,1,2: run once with each seed, then print how far the numbers spread.")
    ] = None,
    prompt_sets: Annotated[
        str | None,
        typer.Option("--prompt-sets", "--prompt_sets", help="task,published: likewise, with each value of prompts=."),
    ] = None,
) -> None:
    """Run tasks: the same as `lm_eval run`, with all its options, without indexing lm-eval's own tasks.

    Dashes and underscores are the same: --model-args, --output-path, --log-samples...
    """
    # Documents, requests and rows are many and live to the end: looking among them for rubbish costs a second in seven.
    gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
    plugin.scope.builtin_tasks = False
    plugin.scope.include_paths = tuple(include_path or ())
    plugin.install()
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    sys.argv = ["lm_eval", "run", *map(_underscores, context.args)]
    command = HarnessCLI()
    arguments = _parsed(command)
    _check_names(arguments, with_model=not plan)
    asked = variants(arguments, seeds, prompt_sets)
    if plan:
        from medvlm_harness.results.plan import plan as plan_run

        if len(asked.arguments) > 1:
            raise UserError("--plan counts one run: name one seed and one prompt set.")
        _print_plan(plan_run(asked.arguments[0]))
    elif len(asked.arguments) > 1:
        run_variants(command, asked)
    else:
        command.execute(asked.arguments[0])
    gc.freeze()  # to look among them once more at the end takes as long


def _underscores(argument: str) -> str:
    """lm-eval spells its options with underscores."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _parsed(command: Any) -> Any:
    """The arguments of `lm_eval run`; argparse's errors as ours, with near matches for an unknown option."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return command.parse_args()
    except SystemExit as error:
        if not error.code:  # --help
            raise
    message = " ".join(printed.getvalue().partition(" error: ")[2].split())
    unknown = message.removeprefix("unrecognized arguments: ")
    known = [option for option in command._subparsers.choices["run"]._option_string_actions if option.startswith("--")]
    known += ["--debug", "--plan", "--seeds", "--prompt-sets"]
    close = near_matches(unknown.split()[0], known) if unknown != message else ""
    raise UserError(message + (f".{close}" if close.startswith(" Did") else ""))


def _check_names(arguments: Any, *, with_model: bool) -> None:
    """Refuse unknown task and model names with near matches, before anything is loaded."""
    asked = [name for part in arguments.tasks or [] for name in str(part).split(",") if name]
    if arguments.config is not None and not Path(arguments.config).is_file():
        raise UserError(f"Expected --config to be a YAML file, but {arguments.config} is not one.")
    if not asked and arguments.config is None:
        raise UserError("Expected --tasks, such as --tasks 'iu_cxr_*'; `medvlm ls` lists them.")
    if with_model and arguments.model is None and arguments.config is None:
        raise UserError("Expected --model, such as --model medvlm-tiny; `medvlm models` lists ours.")
    refuse_unknown_tasks(asked)
    if arguments.model is not None:
        refuse_unknown_model(arguments.model)


def refuse_unknown_tasks(asked: Iterable[str]) -> None:
    """Check names, patterns, files and folders of tasks.

    Raises:
        UserError: for one that is nowhere, with near matches, or a file that is wrong.
    """
    from fnmatch import fnmatch

    from medvlm_harness.tracks.declarations import check_file, declared_names, declared_tags

    folders = [plugin.tasks_folder(), *plugin.scope.include_paths]
    known = {name for folder in folders for name in (*declared_names(folder), *declared_tags(folder))}
    for name in asked:
        if name.endswith(".yaml") and Path(name).is_file():
            check_file(Path(name))
        elif not Path(name).is_dir() and not any(fnmatch(one, name) for one in known):
            raise UserError(
                f"Unknown task {name!r}.{near_matches(name, known)} "
                "(lm-eval's own tasks run under `lm_eval run`; --include-path adds a folder.)"
            )


def refuse_unknown_model(name: str) -> None:
    """Raise UserError, with near matches, for a model that lm-eval and we do not have."""
    import lm_eval.models  # noqa: F401  # fills the registry
    from lm_eval.api.registry import model_registry

    if name not in model_registry:
        raise UserError(f"Unknown model {name!r}.{near_matches(name, model_registry.keys())}")


def _print_plan(planned: PlannedRun) -> None:
    tasks = planned.tasks
    rows = [[task.name, task.documents, task.images, task.texts, task.new_images, task.new_texts] for task in tasks]
    rows.append(["all", "", "", "", sum(task.new_images for task in tasks), sum(task.new_texts for task in tasks)])
    print_table(
        "Forward passes of a dual encoder (each distinct image and text is encoded once in a run)",
        ["Task", "Documents", "Images", "Texts", "New images", "New texts"],
        rows,
    )
    if planned.images is None:
        typer.echo("Name one of our models that has weights (--model) to see how long this takes here.")
        return
    speeds = [
        f"{1 / seconds:,.1f} {what}/s"
        for what, seconds in (("images", planned.seconds_per_image), ("texts", planned.seconds_per_text))
        if seconds
    ]
    measured = f" at {' and '.join(speeds)}, measured here on one batch" if speeds else ""
    typer.echo(f"Not in the store yet: {planned.images:,} images and {planned.texts:,} texts.")
    typer.echo(f"Forward passes: about {duration(planned.seconds)}{measured}; loading and metrics come on top.")


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

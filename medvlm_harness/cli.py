"""The `medvlm` command."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.exceptions import TyperException

from medvlm_harness import plugin
from medvlm_harness.errors import UserError, near_matches

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

app = typer.Typer(
    help="Benchmark small medical vision-language models with lm-eval.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare data sets and look at them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

DATASETS = ("iu_cxr", "demo_cxr")
SHOWN_NAMES = 10  # of what a rule removed; the rest is in the log
ACTIVE_AT_START = plugin.is_active()  # by the .pth file, before this module asks for it


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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", "--include_path", help="Folder with task YAML; repeatable.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the forward passes per task, and run nothing.")] = False,
) -> None:
    """Run tasks: the same as `lm_eval run`, with all its options, without indexing lm-eval's own tasks.

    Dashes and underscores are the same: --model-args, --output-path, --log-samples...
    """
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
    if plan:
        from medvlm_harness.results.plan import forward_passes

        _print_plan(forward_passes(arguments))
    else:
        command.execute(arguments)


@app.command()
def ls(
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", "--include_path", help="Folder with task YAML; repeatable.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Load every task; exit status 2 if one does not.")] = False,
) -> None:
    """List tasks and groups."""
    from medvlm_harness.tracks.declarations import declared_names, summarise

    folders = [plugin.tasks_folder(), *(include_path or ())]
    names = {name: path for folder in folders for name, path in declared_names(folder).items()}
    failures = _load_all(names, include_path or []) if check else {}
    rows = []
    for name, path in sorted(names.items()):
        summary = summarise(path)
        state = [failures.get(name, "ok")] if check else []
        rows.append([name, summary.kind, summary.dataset, str(path), *state])
    _print_table("Tasks", ["Name", "Track", "Data set", "File", *(["Check"] if check else [])], rows)
    if failures:
        raise UserError(f"{len(failures)} of {len(names)} tasks do not load: {', '.join(sorted(failures))}.")


@app.command()
def models() -> None:
    """List the registered models and what is known of them."""
    from importlib import import_module

    rows = []
    for name, target in sorted(plugin.model_targets().items()):
        module, _, attribute = target.partition(":")
        backend = getattr(import_module(module), attribute)
        card = backend.card
        trained_on = "unknown" if card.trained_on is None else ", ".join(map(str, card.trained_on)) or "nothing"
        needs = ", ".join(sorted(backend.options() - {"device", "batch_size", "max_batch_size"}))
        rows.append([name, card.family, card.summary, card.licence or "not stated", trained_on, needs])
    _print_table("Models", ["Name", "Family", "What", "Licence of weights", "Trained on", "Options"], rows)


@app.command("tasks-dir")
def tasks_dir() -> None:
    """Print the folder of the packaged task YAML."""
    typer.echo(str(plugin.tasks_folder()))


@app.command()
def doctor() -> None:
    """Versions, devices, data found, and whether lm-eval finds us."""
    from medvlm_harness.results.doctor import findings

    rows = [["lm-eval plug-in", "active" if ACTIVE_AT_START else "NOT active (is medvlm_harness.pth installed?)"]]
    rows += [list(row) for row in findings(DATASETS)]
    _print_table("medvlm doctor", ["What", "State"], rows)
    if not ACTIVE_AT_START:
        raise typer.Exit(1)


@data_app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="Data set: iu_cxr or demo_cxr.")],
    source: Annotated[Path | None, typer.Option(help="Folder as downloaded; its layout is detected.")] = None,
    labels: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Table of labels, keyed by filename or uid.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the prepared set.")] = None,
    split_scheme: Annotated[
        str, typer.Option("--split-scheme", "--split_scheme", help="r2gen, or hash: 70/10/20 by patient.")
    ] = "r2gen",
    layout: Annotated[str | None, typer.Option(help="kaggle, openi or r2gen, if several lie there.")] = None,
) -> None:
    """Read a data set once, check every image, and write its records."""
    from medvlm_harness.data.locate import data_root

    _known_dataset(name)
    folder = (out or data_root() / name).expanduser()
    if name == "demo_cxr":
        from medvlm_harness.demo.generate import prepare_demo

        if source or labels or layout:
            raise UserError("demo_cxr is drawn, not read: leave out --source, --labels and --layout.")
        typer.echo(f"wrote {prepare_demo(folder)}")
        return
    if source is None:
        raise UserError(f"Expected --source DIR, the folder of {name} as downloaded.")
    from medvlm_harness.data.prepare import prepare_iu_cxr

    columns = (TextColumn("checking images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("images", total=None)
        report = prepare_iu_cxr(
            source,
            labels=labels,
            out=folder,
            split_scheme=split_scheme,  # type: ignore[arg-type]  # checked there, with near matches
            layout=layout,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    _print_report(report)


@data_app.command()
def info(
    name: Annotated[str, typer.Argument(help="Data set: iu_cxr or demo_cxr.")],
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", "--data_dir", help="The prepared set's folder, if not where it is sought."),
    ] = None,
) -> None:
    """Splits, label supports, section coverage, and agreement between label sources."""
    from medvlm_harness.data.info import describe
    from medvlm_harness.data.locate import find_dataset

    _known_dataset(name)
    dataset = find_dataset(name, data_dir=data_dir)
    summary = describe(dataset)
    manifest = dataset.manifest
    typer.echo(
        f"{name}: {dataset.folder} (layout {manifest.source}, licence {manifest.licence}, {dataset.sha256[:12]})"
    )
    for policy, value in manifest.policies.items():
        typer.echo(f"  {policy}: {value}")
    _print_table(
        "Splits",
        ["Split", "Studies", "Images", "Frontal", "Lateral", "View unknown", "Without image", "Without frontal"],
        [[s.split, s.studies, s.images, s.frontal, s.lateral, s.view_unknown, s.without_image, s.without_frontal]
         for s in summary.splits],
    )  # fmt: skip
    _print_table(
        "Labels (studies)",
        ["Source", "Label", "Positive", "Negative", "Uncertain", "Unmentioned", "Unlabelled"],
        [[s.source, s.label, s.positive, s.negative, s.uncertain, s.unmentioned, s.unlabelled] for s in summary.labels],
    )
    _print_table(
        "Sections",
        ["Section", "Studies", "With a de-identified word"],
        [[s.section, s.studies, s.with_token] for s in summary.sections],
    )
    _print_table(
        "Agreement between label sources (Cohen's kappa; uncertain left out, unmentioned negative)",
        ["Label", "Sources", "Studies", "Kappa"],
        [[a.label, f"{a.first} / {a.second}", a.studies, f"{a.kappa:.2f}"] for a in summary.agreement],
    )


def _known_dataset(name: str) -> None:
    if name not in DATASETS:
        raise UserError(f"Unknown data set {name!r}.{near_matches(name, DATASETS)}")


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
    close = near_matches(unknown.split()[0], [*known, "--debug", "--plan"]) if unknown != message else ""
    raise UserError(message + (f".{close}" if close.startswith(" Did") else ""))


def _check_names(arguments: Any, *, with_model: bool) -> None:
    """Refuse unknown task and model names with near matches, before anything is loaded."""
    from fnmatch import fnmatch

    from medvlm_harness.tracks.declarations import check_file, declared_names

    folders = [plugin.tasks_folder(), *plugin.scope.include_paths]
    known = {name for folder in folders for name in declared_names(folder)}
    asked = [name for part in arguments.tasks or [] for name in str(part).split(",") if name]
    if arguments.config is not None and not Path(arguments.config).is_file():
        raise UserError(f"Expected --config to be a YAML file, but {arguments.config} is not one.")
    if not asked and arguments.config is None:
        raise UserError("Expected --tasks, such as --tasks 'iu_cxr_*'; `medvlm ls` lists them.")
    if with_model and arguments.model is None and arguments.config is None:
        raise UserError("Expected --model, such as --model medvlm-tiny; `medvlm models` lists ours.")
    for name in asked:
        if name.endswith(".yaml") and Path(name).is_file():
            check_file(Path(name))
        elif not Path(name).is_dir() and not any(fnmatch(one, name) for one in known):
            raise UserError(
                f"Unknown task {name!r}.{near_matches(name, known)} "
                "(lm-eval's own tasks run under `lm_eval run`; --include-path adds a folder.)"
            )
    if with_model and arguments.model is not None:
        import lm_eval.models  # noqa: F401  # fills the registry
        from lm_eval.api.registry import model_registry

        if arguments.model not in model_registry:
            raise UserError(f"Unknown model {arguments.model!r}.{near_matches(arguments.model, model_registry.keys())}")


def _load_all(names: dict[str, Path], include_path: Sequence[Path]) -> dict[str, str]:
    plugin.scope.builtin_tasks = False
    plugin.install()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(path) for path in include_path])
    failures = {}
    for name in names:
        try:
            manager.load(name)
        except Exception as error:  # noqa: BLE001  # a stranger's task may fail in any way; each is reported
            failures[name] = " ".join(str(error).split()) or type(error).__name__
    return failures


def _print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column, heading in enumerate(header):
        numeric = bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))  # "[x]" in a path or a message is no markup
    console = Console()
    # Folded columns help nobody: a pipe or a file gets the table at its own width.
    console = console if console.is_terminal else Console(width=10_000)
    console.print(table)


def _print_report(report: Any) -> None:
    from medvlm_harness.data.prepare import LOG_FILE

    typer.echo(f"read {report.studies_read} studies and {report.images_read} images (layout {report.layout})")
    for title, rules in (("dropped", report.dropped), ("noted", report.noted)):
        for rule, names in rules.items():
            shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
            typer.echo(f"  {title}: {len(names)} {rule.replace('_', ' ')} ({shown})")
    for warning in report.warnings:
        typer.echo(f"  warning: {warning}")
    rows = [[split, *counts.values()] for split, counts in report.splits.items() if counts["studies"]]
    _print_table("Prepared", ["Split", "Studies", "Images", "Frontal", "Lateral", "View unknown"], rows)
    typer.echo(f"wrote {report.folder} (every name above: {LOG_FILE} there)")


def _print_plan(passes: Any) -> None:
    rows = [[task.name, task.documents, task.images, task.texts, task.new_images, task.new_texts] for task in passes]
    rows.append(["all", "", "", "", sum(task.new_images for task in passes), sum(task.new_texts for task in passes)])
    _print_table(
        "Forward passes of a dual encoder (each distinct image and text is encoded once in a run)",
        ["Task", "Documents", "Images", "Texts", "New images", "New texts"],
        rows,
    )

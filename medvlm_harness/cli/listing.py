"""`medvlm ls`, `tasks-dir` and `doctor`: what there is, and where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvlm_harness import plugin
from medvlm_harness.cli.data import DATASETS
from medvlm_harness.cli.output import print_table
from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["app"]

app = typer.Typer()

ACTIVE_AT_START = plugin.is_active()  # by the .pth file, before this module asks for it


@app.command()
def ls(
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", "--include_path", help="Folder with task YAML; repeatable.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Load every task; exit status 2 if one does not.")] = False,
) -> None:
    """List tasks, groups, and the tags under which several tasks run."""
    from medvlm_harness.tracks.declarations import declared_names, declared_tags, summarise

    folders = [plugin.tasks_folder(), *(include_path or ())]
    names = {name: path for folder in folders for name, path in declared_names(folder).items()}
    failures = _load_all(names, include_path or []) if check else {}
    rows = []
    for name, path in sorted(names.items()):
        summary = summarise(path)
        state = [failures.get(name, "ok")] if check else []
        rows.append([name, summary.kind, summary.dataset, str(path), *state])
    for folder in folders:
        rows += [[tag, "tag", ", ".join(tasks), str(folder), *([""] if check else [])]
                 for tag, tasks in declared_tags(folder).items()]  # fmt: skip
    print_table("Tasks", ["Name", "Track", "Data set", "File", *(["Check"] if check else [])], rows)
    if failures:
        raise UserError(f"{len(failures)} of {len(names)} tasks do not load: {', '.join(sorted(failures))}.")


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
    print_table("medvlm doctor", ["What", "State"], rows)
    if not ACTIVE_AT_START:
        raise typer.Exit(1)


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

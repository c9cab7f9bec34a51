"""`medvlm models --fits`: which models a memory is large enough for, and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from medvlm_harness import plugin
from medvlm_harness.cli.output import print_table
from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medvlm_harness.model_backends.cards import ModelCard
    from medvlm_harness.model_backends.catalogue import Entry

__all__ = ["show_fits"]

GB = 1e9


def show_fits(size: str, task: str | None) -> None:
    """Print the predicted memory of every model that runs here, in each precision, small models first.

    Args:
        size: of the memory, such as 16GB.
        task: leave out models whose backend cannot do it.

    Raises:
        UserError: if the size is none, or the task is unknown or no model can do it.
    """
    from medvlm_harness.model_backends.memory import ENCODER_WORKING, GENERATOR_WORKING, LIBRARIES, parse_size

    room = parse_size(size)
    asked = list(_entries(task))
    if not asked:
        raise UserError(f"No model of the catalogue can do {task}.")
    rows: list[tuple[int, str, list[Any]]] = []
    unknown = []
    for name, entry in asked:
        if entry.card.parameters is None:
            unknown.append(name)
        elif entry.card.parameters:
            rows += _rows(name, entry.card, room)
    rows.sort(key=lambda row: row[:2])
    header = ["Model", "Precision", "Weights GB", "Working GB", "Libraries GB", "Total GB", f"Fits {size}", "Rounded"]
    print_table(f"Predicted memory, {room / GB:.1f} GB at hand", header, [row[2] for row in rows])
    if unknown:
        typer.echo(f"Unknown, as their cards have no count of parameters: {', '.join(unknown)}.")
    typer.echo(
        "Predictions, not measurements. Weights: parameters of the card x bytes of a weight; of int8 and nf4 for the "
        "share that is rounded, counted on the model named in the last column. Working: measured for encoders "
        f"({ENCODER_WORKING / GB:.1f} GB, 64 items in fp32), for generators the limit that this package keeps "
        f"({GENERATOR_WORKING / GB:.1f} GB). Libraries: measured on a CPU ({LIBRARIES / GB:.1f} GB), assumed on a GPU. "
        "docs/quantization.md has all of it."
    )


def _rows(name: str, card: ModelCard, room: int) -> list[tuple[int, str, list[Any]]]:
    """One for each precision, with what it is sorted by: the model's size and name."""
    from medvlm_harness.model_backends.memory import PRECISIONS, predict

    parameters = card.parameters or 0
    rows = []
    for precision in PRECISIONS:
        found = predict(card.family, parameters, precision)
        rounded = "" if found.reference is None else f"{100 * found.reference.share:.0f}% ({found.reference.name})"
        sizes = [f"{part / GB:.2f}" for part in (found.weights, found.working, found.libraries, found.total)]
        fits = "yes" if found.total <= room else "no"
        rows.append((parameters, name, [name, precision, *sizes, fits, rounded]))
    return rows


def _entries(task: str | None) -> Iterator[tuple[str, Entry]]:
    """The models that a backend here runs; of these, what can do a task."""
    from medvlm_harness.model_backends.catalogue import catalogue

    targets = plugin.model_targets()
    tasks = [] if task is None else _tasks(task)
    for name, entry in catalogue().items():
        model = entry.run.model
        if model not in targets or entry.run.cannot:
            continue
        backend: Any = plugin.load_target(targets[model]) if tasks else None
        if all(one.needs(backend) <= backend.CAPABILITIES for one in tasks):
            yield name, entry


def _tasks(task: str) -> list[Any]:
    """A task, or all tasks of a group."""
    plugin.scope.builtin_tasks = False
    plugin.install()
    from lm_eval.tasks import TaskManager

    from medvlm_harness.errors import near_matches

    manager = TaskManager()
    if task not in manager.all_tasks:
        raise UserError(f"Unknown task {task!r}.{near_matches(task, manager.all_tasks)}")
    return list(manager.load([task])["tasks"].values())

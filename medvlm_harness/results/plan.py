"""What a run would cost before it is run: the distinct images and texts of each task."""

from __future__ import annotations

from typing import Any, NamedTuple

from medvlm_harness.requests import ImageRef, LabelSet

__all__ = ["PlannedTask", "forward_passes"]


class PlannedTask(NamedTuple):
    """Forward passes of one task for a dual encoder; "new" are those that no task before it needed."""

    name: str
    documents: int
    images: int
    texts: int
    new_images: int
    new_texts: int


def forward_passes(arguments: Any) -> list[PlannedTask]:
    """Build the requests of the tasks of an lm-eval command line, and count; no model is loaded.

    Args:
        arguments: the parsed namespace of `lm_eval run`.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig.from_cli(arguments)
    manager = config.process_tasks(config.metadata)
    tasks = manager.load(config.tasks)["tasks"]
    seen: tuple[set[str], set[str]] = set(), set()
    planned = []
    for name, task in tasks.items():
        if not getattr(task, "is_medvlm", False):
            continue
        images, texts = _distinct(task)
        new = images - seen[0], texts - seen[1]
        planned.append(PlannedTask(name, len(task.documents), len(images), len(texts), len(new[0]), len(new[1])))
        seen = seen[0] | images, seen[1] | texts
    return planned


def _distinct(task: Any) -> tuple[set[str], set[str]]:
    images: set[str] = set()
    texts: set[str] = set()
    for document in task.documents:
        built = task.construct_requests(document, "", metadata=(task.task_name, 0, 1))
        for request in built if isinstance(built, list) else [built]:
            for argument in request.arguments:
                if isinstance(argument, ImageRef):
                    images.add(str(argument))
                elif isinstance(argument, LabelSet):
                    texts.update(p for label in argument.labels for p in (*label.positive, *label.negative))
                else:
                    texts.add(getattr(argument, "text", str(argument)))
    return images, texts

"""What a run would cost before it is run: the distinct images and texts of each task, and the time they take."""

from __future__ import annotations

from typing import Any, NamedTuple

from medvlm_harness.requests import ImageRef, LabelSet, TextRef

__all__ = ["PlannedRun", "PlannedTask", "distinct_inputs", "plan"]


class PlannedTask(NamedTuple):
    """Forward passes of one task for a dual encoder; "new" are those that no task before it needed."""

    name: str
    documents: int
    images: int
    texts: int
    new_images: int
    new_texts: int


class PlannedRun(NamedTuple):
    """All tasks of a run, and what its model would have to compute."""

    tasks: list[PlannedTask]
    images: int | None  # not stored yet; None where no model of ours is named
    texts: int | None
    seconds_per_image: float | None  # None where nothing is to be computed
    seconds_per_text: float | None

    @property
    def seconds(self) -> float:
        """Of the forward passes, decoding included; loading the model and computing metrics come on top."""
        return (self.images or 0) * (self.seconds_per_image or 0) + (self.texts or 0) * (self.seconds_per_text or 0)


def plan(arguments: Any) -> PlannedRun:
    """Build the requests of the tasks of an lm-eval command line, and count.

    With `--model`, what the store holds is counted off, and the rest is timed on one batch of images and one of texts.

    Args:
        arguments: the parsed namespace of `lm_eval run`.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig.from_cli(arguments)
    manager = config.process_tasks(config.metadata)
    tasks = manager.load(config.tasks)["tasks"]
    lm: Any = _model(config) if arguments.model is not None else None
    images: dict[ImageRef, None] = {}
    texts: dict[str, None] = {}
    planned = []
    for name, task in tasks.items():
        if not getattr(task, "is_medvlm", False):
            continue
        if hasattr(lm, "CAPABILITIES"):
            task.prepare_for(lm)
        its_images, its_texts = distinct_inputs(task)
        new = len(its_images.keys() - images.keys()), len(its_texts.keys() - texts.keys())
        planned.append(PlannedTask(name, len(task.documents), len(its_images), len(its_texts), *new))
        images |= its_images
        texts |= its_texts
    if not hasattr(lm, "seconds_per_item"):
        return PlannedRun(planned, None, None, None, None)
    missing = lm.missing(images, texts)
    return PlannedRun(planned, *map(len, missing), *lm.seconds_per_item(*missing))


def _model(config: Any) -> Any:
    import lm_eval.models  # noqa: F401  # fills the registry
    from lm_eval.api.registry import get_model

    beside = {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size, "device": config.device}
    backend = get_model(config.model)
    # Of lm-eval's own models nothing is known without loading them.
    return backend.create_from_arg_obj(config.model_args or {}, beside) if hasattr(backend, "options") else None


def distinct_inputs(task: Any) -> tuple[dict[ImageRef, None], dict[str, None]]:
    """The images and texts that a task asks an encoder about, each once and in order."""
    images: dict[ImageRef, None] = {}
    texts: dict[str, None] = {}
    task.build_all_requests()
    for request in task.instances:
        # An encoder ignores the indication that may stand behind a label set.
        for argument in request.arguments[:2]:
            if isinstance(argument, ImageRef):
                images.setdefault(argument)
            elif isinstance(argument, LabelSet):
                texts |= dict.fromkeys(p for label in argument.labels for p in (*label.positive, *label.negative))
            elif isinstance(argument, TextRef):
                texts.setdefault(argument.text)
    return images, texts

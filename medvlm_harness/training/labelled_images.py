"""Images with the labels of their studies, as a loss takes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.data.labels import resolve
from medvlm_harness.data.records import Study, Views
from medvlm_harness.errors import UserError
from medvlm_harness.requests import ImageRef
from medvlm_harness.tracks.task_data import LABEL_SOURCE_ORDER
from medvlm_harness.training.data import TrainingData

__all__ = ["LabelledImages", "Targets", "label_source_of", "labelled_images", "learnable"]

_log = logging.getLogger("lm_eval.medvlm")

Targets = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images with 1, 0, or NaN (left out of the loss) for each label, (n, labels)."""

    images: tuple[ImageRef, ...]
    targets: Targets


def labelled_images(
    data: TrainingData, studies: Sequence[Study], source: str, labels: Sequence[str], views: Views
) -> LabelledImages:
    """The images of studies, each with its study's labels; images of which no label is known are left out."""
    images: list[ImageRef] = []
    rows: list[list[float]] = []
    for study in studies:
        values = [resolve(study.labels.get(source), name) for name in labels]
        if any(value is not None for value in values):
            found = data.images(study, views)
            images += found
            rows += [[np.nan if value is None else value for value in values]] * len(found)
    return LabelledImages(tuple(images), np.array(rows, dtype=np.float32).reshape(len(images), len(labels)))


def learnable(data: TrainingData, source: str) -> tuple[str, ...]:
    """The labels that the source covers and of which the train split has positives and negatives."""
    covered = next((tuple(study.labels[source]) for study in data.train if source in study.labels), ())
    targets = labelled_images(data, data.train, source, covered, "all").targets
    both = [bool((column == 1).any() and (column == 0).any()) for column in targets.T]
    if left_out := [name for name, enough in zip(covered, both, strict=True) if not enough]:
        _log.warning("labels without both positives and negatives in train are not learnt: %s", ", ".join(left_out))
    labels = tuple(name for name, enough in zip(covered, both, strict=True) if enough)
    if not labels:
        raise UserError(f"{data.name} has no label of {source} with positives and negatives in its train split.")
    return labels


def label_source_of(data: TrainingData, asked: str | None) -> str:
    """The label source that is asked for; by default the first in the order that tasks take them in.

    Raises:
        UserError: if it was not prepared, or none was.
    """
    prepared = data.label_sources
    ordered = [source for source in LABEL_SOURCE_ORDER if source in prepared] or list(prepared)
    if not ordered or asked not in (None, *prepared):
        raise UserError(
            f"Expected label_source to be one of {', '.join(prepared) or 'those prepared with --labels'}, "
            f"but got {asked!r}."
        )
    return asked or ordered[0]

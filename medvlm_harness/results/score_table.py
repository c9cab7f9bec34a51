"""Reading scores.parquet: the answers of one task as arrays of documents by labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.results.scores import SCHEMA

__all__ = ["ScoreTable", "read_scores"]

Floats = NDArray[np.float64]
NUMBERS = ("target", "margin", "probability", "rank", "tied", "value")
REQUIRED = ("task", "study", "label")


@dataclass(frozen=True)
class ScoreTable:
    """What one run answered to one task; arrays have shape (documents, labels), NaN or None where there is nothing.

    Attributes:
        documents: study and image ("" where a document is a study), in the order that tasks score them in.
        labels: labels, directions or metrics, in the order of the file; `label@condition` under further conditions.
        target: 1 or 0.
        margin: scores that rank.
        probability: in [0, 1].
        rank: of a search, from 1.
        tied: items that tie with what is searched for, itself included.
        value: of a metric of one text.
        answer: what was answered, in a form that tells whether it changed.
    """

    documents: Sequence[tuple[str, str]]
    labels: Sequence[str]
    target: Floats
    margin: Floats
    probability: Floats
    rank: Floats
    tied: Floats
    value: Floats
    answer: NDArray[np.object_]

    @property
    def studies(self) -> list[str]:
        """The study of each document."""
        return [study for study, _ in self.documents]

    def select(self, labels: Sequence[str]) -> ScoreTable:
        """The table of some labels, in that order."""
        place = {label: j for j, label in enumerate(self.labels)}
        columns = [place[label] for label in labels]
        arrays = {name: getattr(self, name)[:, columns] for name in (*NUMBERS, "answer")}
        return ScoreTable(self.documents, list(labels), **arrays)

    def under(self, labels: Sequence[str], conditions: Sequence[str]) -> list[ScoreTable]:
        """The tables of the same labels under each condition; those of all but the first are `label@condition`."""
        further = [[f"{label}@{other}" for label in labels] for other in conditions[1:]]
        return [self.select(names) for names in (labels, *further)]


def read_scores(path: Path, task: str) -> ScoreTable:
    """The answers to one task.

    A column that files of earlier versions lack is empty.

    Args:
        path: a scores.parquet.
        task: the task's name.

    Raises:
        UserError: if the file cannot be read, has no such task, or one document twice under a label.
    """
    try:
        known = pq.read_schema(path).names
        if missing := [name for name in REQUIRED if name not in known]:
            raise UserError(f"Expected a scores.parquet of a run, but {path} has no column {missing[0]}.")
        columns = [field for field in SCHEMA if field.name in known]
        table = pq.read_table(path, columns=[field.name for field in columns]).cast(pa.schema(columns))
        table = table.filter(pa.compute.equal(table["task"], task))
    except (OSError, pa.ArrowException) as error:
        message = f"Expected a scores.parquet of a run, but {path} is none: {first_line(error)}"
        raise UserError(message) from error
    if not table.num_rows:
        raise UserError(f"{path} has no scores of a task {task}.")
    if any(table[name].null_count for name in REQUIRED):
        raise UserError(f"{path} has scores of {task} without a study or a label.")
    images = table["image"].to_pylist() if "image" in known else [None] * table.num_rows
    keys = [(study, image or "") for study, image in zip(table["study"].to_pylist(), images, strict=True)]
    of_rows = table["label"].to_pylist()
    documents, labels = sorted(set(keys)), list(dict.fromkeys(of_rows))
    row, column = {key: k for k, key in enumerate(documents)}, {label: j for j, label in enumerate(labels)}
    at = np.array([row[key] for key in keys]), np.array([column[label] for label in of_rows])
    if len(set(zip(*(one.tolist() for one in at), strict=True))) < table.num_rows:
        raise UserError(f"{path} has a document of {task} twice under one label.")
    shape = len(documents), len(labels)
    numbers = {name: np.full(shape, np.nan) for name in NUMBERS}
    for name, array in numbers.items():
        if name in known:
            array[at] = table[name].cast(pa.float64()).to_numpy()
    answer = np.full(shape, None, dtype=np.object_)
    if "answer" in known:
        answer[at] = np.array(table["answer"].to_pylist(), dtype=np.object_)
    return ScoreTable(documents, labels, **numbers, answer=answer)

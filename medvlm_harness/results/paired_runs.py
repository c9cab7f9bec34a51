"""Two runs on the same documents: the paired difference of their macro AUROC, from the scores that each wrote."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.paired import paired_estimates
from medvlm_harness.tracks.zero_shot_metrics import enough_support, macro_auroc

__all__ = ["paired_auroc"]


class _Scores(NamedTuple):
    """One task of a scores.parquet, documents in the order that tasks score them in."""

    documents: list[tuple[str, str]]  # study, image
    labels: list[str]
    target: NDArray[np.float64]  # 1, 0, or NaN where unlabelled or left out, (documents, labels)
    margin: NDArray[np.float64]  # (documents, labels)


def paired_auroc(first: Path, second: Path, *, task: str, resamples: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Macro AUROC of both runs and the first less the second, from the same resamples of studies.

    The labels are those that the task's own macro takes: enough positives and negatives.

    Args:
        first: a scores.parquet.
        second: another, of the same documents and truth.
        task: a multilabel task of both.
        resamples: number of resamples.
        seed: the task's own is 0.

    Returns:
        `auroc_first`, `auroc_second` and `auroc_first_minus_second`.

    Raises:
        UserError: if a run has no such task, or they differ in documents, labels or truth.
    """
    one, other = _read(first, task), _read(second, task)
    for what, a, b in (("documents", one.documents, other.documents), ("labels", one.labels, other.labels)):
        if a != b:
            raise UserError(f"Expected the same {what} of {task} in both runs, but {len(a)} and {len(b)} differ.")
    if not np.array_equal(one.target, other.target, equal_nan=True):
        raise UserError(f"Expected the same truth of {task} in both runs, but the label source or the data differ.")
    used = np.flatnonzero(enough_support(one.target)).tolist()
    statistics = {
        "first": macro_auroc(one.target, one.margin, [used]),
        "second": macro_auroc(one.target, other.margin, [used]),
    }
    labels = {"auroc": {"labels": [one.labels[j] for j in used]}}
    studies = [study for study, _ in one.documents]
    return paired_estimates(
        statistics, studies, ["auroc"], floors={"auroc": 0.5}, extras=labels, resamples=resamples, seed=seed
    )


def _read(path: Path, task: str) -> _Scores:
    columns = ["task", "study", "image", "label", "target", "margin"]
    try:
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"Expected a scores.parquet of a run, but {path} is none: {error}") from error
    rows = [row for row in table.to_pylist() if row["task"] == task and row["margin"] is not None]
    if not rows:
        raise UserError(f"{path} has no scores of labels of a task {task}.")
    documents = sorted({(row["study"], row["image"] or "") for row in rows})
    labels = list(dict.fromkeys(row["label"] for row in rows))
    place = {document: k for k, document in enumerate(documents)}
    column = {label: j for j, label in enumerate(sorted(labels))}
    target, margin = np.full((2, len(documents), len(labels)), np.nan)
    for row in rows:
        at = place[row["study"], row["image"] or ""], column[row["label"]]
        target[at] = np.nan if row["target"] is None else row["target"]
        margin[at] = row["margin"]
    if np.isnan(margin).any():
        raise UserError(f"{path} lacks scores of {task}: expected each label of each document.")
    return _Scores(documents, sorted(labels), target, margin)

"""F1 of the labels that a labeler finds in generated reports against those it finds in the reference reports.

Labels are 1 positive, 0 negative, -1 uncertain and NaN blank (unmentioned), in arrays of shape (n, labels). As
everywhere in report generation ("rrg" mode of CheXbert F1) blank counts as negative. Everything is a count, so that it
can be taken again for every resample: see `bootstrap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.data.chexpert import CHEXPERT_5, CHEXPERT_14
from medvlm_harness.errors import UserError
from medvlm_harness.metrics._arrays import checked_weights, ratio_or_nan
from medvlm_harness.metrics.bootstrap import bootstrap_columns
from medvlm_harness.metrics.estimate import Estimate

__all__ = [
    "Average",
    "F1Counts",
    "UncertainPolicy",
    "averaged_f1",
    "checked_labels",
    "count_f1",
    "each_f1",
    "label_f1",
    "label_f1_estimates",
    "label_matrix",
    "weighted_label_f1",
]

UncertainPolicy = Literal["ones", "zeros", "ignore"]
"""What -1 becomes: positive, negative, or, in the reference, left out (see `label_f1`)."""
Average = Literal["micro", "macro", "macro_supported", "weighted"]
"""Over all decisions; over all labels; over the labels with a positive reference; by number of positive references."""


class F1Counts(NamedTuple):
    """What F1 is made of, per resample and label; each of shape (resamples, labels)."""

    both: NDArray[np.float64]  # positive on both sides
    true: NDArray[np.float64]  # positive in the reference: the support
    predicted: NDArray[np.float64]


def label_matrix(labels: Sequence[Mapping[str, int | None]], names: Sequence[str] = CHEXPERT_14) -> NDArray[np.float64]:
    """Labels by name as an array of shape (n, labels): 1, 0, -1, and NaN for None.

    Raises:
        UserError: if a report has no entry for one of the names, or another value: what was not looked for is unknown,
            and must not count as negative.
    """
    matrix = np.full((len(labels), len(names)), np.nan)
    for row, (place, report) in zip(matrix, enumerate(labels), strict=True):
        for column, name in enumerate(names):
            if name not in report or report[name] not in (1, 0, -1, None):
                came = repr(report[name]) if name in report else "no such label"
                raise UserError(f"Expected 1, 0, -1 or None as {name} of report {place}, but got {came}.")
            value = report[name]
            if value is not None:
                row[column] = value
    return matrix


def label_f1(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    average: Average = "micro",
    uncertain: UncertainPolicy = "ones",
    zero_division: float = 0.0,
) -> float:
    """F1 of generated against reference labels; in [0, 1], higher is better.

    Args:
        y_true: labels of the reference reports, shape (n, labels).
        y_pred: labels of the generated reports, likewise.
        average: how labels are put together. NaN where "macro_supported" or "weighted" find no positive reference.
        uncertain: "ones" makes -1 positive and "zeros" negative, on both sides. "ignore" leaves out the labels that are
            uncertain in the reference; a hedge of the model counts as positive, else hedging would cost it nothing.
        zero_division: what F1 is where neither side is positive: 0 as in CheXbert F1, 1, or NaN, which also leaves such
            labels out of "macro".

    Raises:
        ValueError: if shapes differ, or something is neither 1, 0, -1 nor NaN.

    Source: Smit et al. 2020, arXiv 2004.09167; averages as in scikit-learn's f1_score.
    """
    positive, predicted, counted = _decisions(y_true, y_pred, uncertain)
    counts = count_f1(positive, predicted, np.ones((1, len(positive))), counted)
    return float(averaged_f1(counts, average, zero_division=zero_division)[0])


def weighted_label_f1(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    weights: ArrayLike,
    *,
    average: Average = "micro",
    uncertain: UncertainPolicy = "ones",
    zero_division: float = 0.0,
) -> NDArray[np.float64]:
    """`label_f1` once per row of weights (resamples, n); shape (resamples,)."""
    positive, predicted, counted = _decisions(y_true, y_pred, uncertain)
    return averaged_f1(count_f1(positive, predicted, weights, counted), average, zero_division=zero_division)


def label_f1_estimates(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    study_ids: ArrayLike,
    *,
    names: Sequence[str] = CHEXPERT_14,
    uncertain: UncertainPolicy = "ones",
    floors: Mapping[str, float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every average over all labels and over CheXpert's five, and each label by itself, with intervals over studies.

    Keys are `micro_14`, `macro_14`, `macro_supported_14`, the same for 5 where all five are among the names, and the
    names. An average's `extra` says what was done with uncertain labels and what F1 without any positive is (0 in the
    averages; a single label is undefined then). `positives` is the support.

    Args:
        y_true: as for `label_f1`.
        y_pred: as for `label_f1`.
        study_ids: the study of each report, shape (n,).
        names: of the labels, in the order of the columns.
        uncertain: as for `label_f1`.
        floors: what a constant scores, by key.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    positive, predicted, counted = _decisions(y_true, y_pred, uncertain)
    if positive.shape[1] != len(names):
        raise ValueError(f"Expected one column for each of {len(names)} names, but got {positive.shape[1]}.")
    sets = {str(len(names)): np.arange(len(names))}
    if set(CHEXPERT_5) < set(names):
        sets["5"] = np.array([list(names).index(name) for name in CHEXPERT_5])
    averages: tuple[Average, ...] = ("micro", "macro", "macro_supported")
    support = (positive & counted).sum(axis=0)
    keys = [f"{average}_{size}" for size in sets for average in averages] + list(names)
    supports = [int(support[columns].sum()) for columns in sets.values() for _ in averages] + support.tolist()

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = count_f1(positive, predicted, weights, counted)
        parts = [F1Counts(*(one[:, columns] for one in counts)) for columns in sets.values()]
        values = [averaged_f1(part, average) for part in parts for average in averages]
        return np.column_stack([*values, each_f1(counts, zero_division=np.nan)])

    stated = {"uncertain": uncertain, "blank": "negative", "zero_division": 0.0}
    estimates = bootstrap_columns(
        statistic,
        study_ids,
        positives=supports,
        floors=[(floors or {}).get(key) for key in keys],
        extras=[stated if key not in names else {"uncertain": uncertain} for key in keys],
        resamples=resamples,
        seed=seed,
    )
    return dict(zip(keys, estimates, strict=True))


def count_f1(
    positive: NDArray[np.bool_],
    predicted: NDArray[np.bool_],
    weights: ArrayLike,
    counted: NDArray[np.bool_] | None = None,
) -> F1Counts:
    """Counts for F1 of decisions of shape (n, labels), once per row of weights (resamples, n).

    Args:
        positive: whether the reference is positive.
        predicted: whether the prediction is.
        weights: at least 0.
        counted: False for decisions to leave out; all count by default.
    """
    w = checked_weights(weights, len(positive))
    mask = np.ones_like(positive) if counted is None else counted
    tables = (positive & predicted & mask, positive & mask, predicted & mask)
    return F1Counts(*(w @ table.astype(np.float64) for table in tables))


def each_f1(counts: F1Counts, *, zero_division: float = 0.0) -> NDArray[np.float64]:
    """F1 of each label, shape (resamples, labels)."""
    f1 = ratio_or_nan(2 * counts.both, counts.true + counts.predicted)
    return np.where(np.isnan(f1), zero_division, f1)


def averaged_f1(counts: F1Counts, average: Average, *, zero_division: float = 0.0) -> NDArray[np.float64]:
    """F1 over labels, shape (resamples,); see `Average` and `label_f1`."""
    if average == "micro":
        return each_f1(F1Counts(*(part.sum(axis=1, keepdims=True) for part in counts)), zero_division=zero_division)[
            :, 0
        ]
    f1 = each_f1(counts, zero_division=zero_division)
    if average == "macro":
        shares = np.ones_like(f1)
    elif average == "macro_supported":
        shares = (counts.true > 0).astype(np.float64)
    elif average == "weighted":
        shares = counts.true
    else:
        raise ValueError(f"Expected average to be micro, macro, macro_supported or weighted, but got {average!r}.")
    shares = np.where(np.isnan(f1), 0, shares)
    return ratio_or_nan((np.where(np.isnan(f1), 0, f1) * shares).sum(axis=1), shares.sum(axis=1))


def checked_labels(y_true: ArrayLike, y_pred: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as float64 of one shape (n, labels) with nothing but 1, 0, -1 and NaN, or ValueError."""
    true, predicted = np.asarray(y_true, dtype=np.float64), np.asarray(y_pred, dtype=np.float64)
    if true.shape != predicted.shape or true.ndim != 2:
        raise ValueError(
            f"Expected y_true and y_pred of one shape (n, labels), but got {true.shape} and {predicted.shape}."
        )
    for values in (true, predicted):
        odd = values[~(np.isin(values, (1, 0, -1)) | np.isnan(values))]
        if odd.size:
            raise ValueError(f"Expected labels to be 1, 0, -1 or NaN, but got {odd[0]}.")
    return true, predicted


def _decisions(
    y_true: ArrayLike, y_pred: ArrayLike, uncertain: UncertainPolicy
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Positive in the reference, positive in the prediction, and whether the decision counts; each (n, labels)."""
    true, predicted = checked_labels(y_true, y_pred)
    if uncertain not in ("ones", "zeros", "ignore"):
        raise ValueError(f"Expected uncertain to be ones, zeros or ignore, but got {uncertain!r}.")
    counted = true != -1 if uncertain == "ignore" else np.ones(true.shape, dtype=np.bool_)
    values = (1,) if uncertain == "zeros" else (1, -1)
    return np.isin(true, values), np.isin(predicted, values), counted

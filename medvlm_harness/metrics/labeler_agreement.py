"""Agreement of a labeler with another reading of the same reports, as in the CheXpert and CheXbert papers.

Each status is a question of its own: did the text mention the observation, and if so was it positive, negative or
uncertain? Labels are arrays as in `label_f1`. Against another labeler this is agreement, not accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.metrics.agreement import cohen_kappa
from medvlm_harness.metrics.bootstrap import bootstrap_columns
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.label_f1 import F1Counts, averaged_f1, checked_labels, count_f1, each_f1

__all__ = [
    "STATUSES",
    "Status",
    "StatusF1",
    "label_kappa",
    "labeler_agreement_estimates",
    "status_f1",
    "status_names",
    "weighted_status_f1",
]

Status = Literal["mention", "positive", "negative", "uncertain", "blank"]
STATUSES: tuple[Status, ...] = ("mention", "positive", "negative", "uncertain", "blank")
_VALUES: dict[Status, tuple[int, ...]] = {"positive": (1,), "negative": (0,), "uncertain": (-1,), "mention": (1, 0, -1)}
# A text states neither that "no finding" is absent, nor that it, or a device, may be there.
_WITHOUT: dict[Status, frozenset[str]] = {
    "negative": frozenset({"No Finding"}),
    "uncertain": frozenset({"No Finding", "Support Devices"}),
}


class StatusF1(NamedTuple):
    """One status against all others; arrays hold one value per label of `names`."""

    names: tuple[str, ...]
    f1: NDArray[np.float64]  # NaN where neither side has the status
    support: NDArray[np.int64]  # how often the reference has the status
    weighted: float  # mean of F1 by support; NaN without any
    macro: float  # mean of F1 over labels with support; NaN without any


def status_names(status: Status, names: Sequence[str] = CHEXPERT_14) -> tuple[str, ...]:
    """The labels that a status is scored on.

    >>> sorted(set(CHEXPERT_14) - set(status_names("uncertain")))
    ['No Finding', 'Support Devices']
    """
    if status not in STATUSES:
        raise ValueError(f"Expected status to be one of {', '.join(STATUSES)}, but got {status!r}.")
    return tuple(name for name in names if name not in _WITHOUT.get(status, frozenset()))


def status_f1(y_true: ArrayLike, y_pred: ArrayLike, status: Status, *, names: Sequence[str] = CHEXPERT_14) -> StatusF1:
    """F1 of one status against all others, per label and over labels; in [0, 1], higher is better.

    Args:
        y_true: the reading to agree with, shape (n, labels).
        y_pred: the labeler's, likewise.
        status: "mention" is anything but blank.
        names: of the labels, in the order of the columns.

    Raises:
        ValueError: if shapes differ, or something is neither 1, 0, -1 nor NaN.

    Source: Irvin et al. 2019, arXiv 1901.07031, table 2; Smit et al. 2020, arXiv 2004.09167, section 4.1.
    """
    counts = _counts(y_true, y_pred, status, names, np.ones((1, len(np.asarray(y_true)))))
    return StatusF1(
        names=status_names(status, names),
        f1=each_f1(counts, zero_division=np.nan)[0],
        support=counts.true[0].astype(np.int64),
        weighted=float(averaged_f1(counts, "weighted")[0]),
        macro=float(averaged_f1(counts, "macro_supported")[0]),
    )


def weighted_status_f1(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    status: Status,
    weights: ArrayLike,
    *,
    average: Literal["weighted", "macro_supported"] = "weighted",
    names: Sequence[str] = CHEXPERT_14,
) -> NDArray[np.float64]:
    """`status_f1` over labels, once per row of weights (resamples, n); shape (resamples,)."""
    return averaged_f1(_counts(y_true, y_pred, status, names, weights), average)


def label_kappa(y_true: ArrayLike, y_pred: ArrayLike) -> NDArray[np.float64]:
    """Cohen's kappa over positive, negative, uncertain and blank; shape (labels,), NaN where undefined."""
    true, predicted = checked_labels(y_true, y_pred)
    codes = [np.where(np.isnan(values), 2, values) for values in (true, predicted)]
    return np.array([cohen_kappa(first, second) for first, second in zip(codes[0].T, codes[1].T, strict=True)])


def labeler_agreement_estimates(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    study_ids: ArrayLike,
    *,
    names: Sequence[str] = CHEXPERT_14,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """F1 of each status over labels, by support and unweighted, with intervals over studies.

    Keys are `positive_weighted`, `positive_macro` and so on for each of `STATUSES`; `positives` is the support.
    """
    checked = checked_labels(y_true, y_pred)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = [_counts(*checked, status, names, weights) for status in STATUSES]
        return np.column_stack([averaged_f1(c, average) for c in counts for average in ("weighted", "macro_supported")])

    supports = [int(status_f1(*checked, status, names=names).support.sum()) for status in STATUSES for _ in range(2)]
    estimates = bootstrap_columns(statistic, study_ids, positives=supports, resamples=resamples, seed=seed)
    keys = [f"{status}_{average}" for status in STATUSES for average in ("weighted", "macro")]
    return dict(zip(keys, estimates, strict=True))


def _counts(y_true: ArrayLike, y_pred: ArrayLike, status: Status, names: Sequence[str], weights: ArrayLike) -> F1Counts:
    true, predicted = checked_labels(y_true, y_pred)
    if true.shape[1] != len(names):
        raise ValueError(f"Expected one column for each of {len(names)} names, but got {true.shape[1]}.")
    kept = [list(names).index(name) for name in status_names(status, names)]
    has = [
        np.isnan(values) if status == "blank" else np.isin(values, _VALUES[status])
        for values in (true[:, kept], predicted[:, kept])
    ]
    return count_f1(has[0], has[1], weights)

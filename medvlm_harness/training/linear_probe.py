"""Linear probe: what a linear classifier reads out of frozen features, the one number that all architectures share.

StandardScaler and logistic regression on the training patients, the penalty chosen by cross-validation over patients
among them, for several seeds of the folds. Features come from any encoder; nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["PENALTIES", "SEEDS", "LinearProbe", "linear_probe", "multilabel_probe"]

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C: the inverse of the penalty's strength
SEEDS = (0, 1, 2)
FOLDS = 5
ITERATIONS = 2000


class LinearProbe(NamedTuple):
    """What the probes of all seeds say of the test items; NaN throughout where nothing could be learnt."""

    margin: NDArray[np.float64]  # log-odds, (seeds, n)
    probability: NDArray[np.float64]  # in [0, 1], (seeds, n)
    penalty: tuple[float, ...]  # C chosen for each seed
    inner_auroc: tuple[float, ...]  # of that C, the mean over the folds
    positives: int  # among the training items
    reason: str = ""  # why nothing was learnt


def linear_probe(
    features: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str],
    test_features: ArrayLike,
    test_patients: Sequence[str],
    *,
    seeds: Sequence[int] = SEEDS,
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
) -> LinearProbe:
    """Learn one label from frozen features, and score test items of other patients.

    Args:
        features: of the training items, (n, d).
        labels: 1, 0, or NaN where nothing is known (such items are left out), (n,).
        patients: of the training items; no patient is in two folds.
        test_features: (m, d).
        test_patients: of the test items; none may be a training patient.
        seeds: one probe each: the folds are drawn anew, and so the penalty is chosen anew.
        penalties: values of C to choose among, by the mean AUROC of the folds; of equal ones the strongest penalty.
        folds: at most; fewer where a class has fewer patients.

    Raises:
        ValueError: if shapes do not fit, a value is none of the above, or patients are on both sides.
    """
    x, y, groups, x_test = _checked(features, labels, patients, test_features, test_patients)
    known = ~np.isnan(y)
    x, y, groups = x[known], y[known], groups[known]
    positives = int(y.sum())
    per_class = [len(set(groups[y == value])) for value in (0, 1)]
    if min(per_class) < 2:
        empty = np.full((len(seeds), len(x_test)), np.nan)
        reason = f"{per_class[1]} patients with and {per_class[0]} without it in training: two of each are needed"
        return LinearProbe(empty, empty, (), (), positives, reason)
    chosen = [_choose(x, y, groups, seed, sorted(penalties), min(folds, *per_class)) for seed in seeds]
    fitted = {penalty: _fit(x, y, penalty) for penalty in {penalty for penalty, _ in chosen}}
    margin = np.stack([fitted[penalty].decision_function(x_test) for penalty, _ in chosen])
    probability = np.stack([fitted[penalty].predict_proba(x_test)[:, 1] for penalty, _ in chosen])
    return LinearProbe(margin, probability, tuple(p for p, _ in chosen), tuple(a for _, a in chosen), positives)


def multilabel_probe(
    features: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str],
    test_features: ArrayLike,
    test_patients: Sequence[str],
    **options: Any,
) -> list[LinearProbe]:
    """A probe for each column of `labels`, (n, labels); see `linear_probe`."""
    columns = np.asarray(labels, dtype=np.float64)
    if columns.ndim != 2:
        raise ValueError(f"Expected labels of shape (n, labels), but got {columns.shape}.")
    return [linear_probe(features, y, patients, test_features, test_patients, **options) for y in columns.T]


def _choose(
    x: NDArray[np.float64], y: NDArray[np.float64], groups: NDArray[Any], seed: int, penalties: list[float], folds: int
) -> tuple[float, float]:
    """The C with the highest mean AUROC over folds of patients, and that mean."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    # A patient with several items may leave a fold without one class: it says nothing of a penalty.
    parts = [(a, b) for a, b in splitter.split(x, y, groups) if len(set(y[a])) == 2 and len(set(y[b])) == 2]
    if not parts:
        return penalties[0], float("nan")
    scores = [
        float(np.mean([roc_auc_score(y[b], _fit(x[a], y[a], penalty).decision_function(x[b])) for a, b in parts]))
        for penalty in penalties
    ]
    best = int(np.argmax(scores))  # the first of equals
    return penalties[best], scores[best]


def _fit(x: NDArray[np.float64], y: NDArray[np.float64], penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Exact in some ten steps where there are fewer features than items, of which lbfgs takes hundreds.
    model = LogisticRegression(C=penalty, solver="newton-cholesky", tol=1e-8, max_iter=ITERATIONS)
    return make_pipeline(StandardScaler(), model).fit(x, y)


def _checked(
    features: ArrayLike, labels: ArrayLike, patients: Sequence[str], test: ArrayLike, test_patients: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[Any], NDArray[np.float64]]:
    x, x_test = np.asarray(features, dtype=np.float64), np.asarray(test, dtype=np.float64)
    y, groups = np.asarray(labels, dtype=np.float64), np.asarray(patients)
    if x.ndim != 2 or x_test.ndim != 2 or x.shape[1] != x_test.shape[1] or not len(x):
        raise ValueError(f"Expected features (n, d) and (m, d) with n > 0, but got {x.shape} and {x_test.shape}.")
    if not (y.shape == groups.shape == (len(x),)) or len(test_patients) != len(x_test):
        raise ValueError(
            f"Expected a label and a patient for each of {len(x)} training and a patient for each of {len(x_test)} "
            f"test items, but got {y.shape}, {groups.shape} and {len(test_patients)}."
        )
    if not (np.isfinite(x).all() and np.isfinite(x_test).all()):
        raise ValueError("Expected finite features, but some are not.")
    if not np.isin(y[~np.isnan(y)], (0, 1)).all():
        raise ValueError(f"Expected labels 0, 1 or NaN, but got {sorted(set(y[~np.isnan(y)]))[:5]}.")
    if both := sorted(set(groups.tolist()) & set(test_patients)):
        raise ValueError(f"Expected no patient on both sides, but {len(both)} are (such as {both[0]}).")
    return x, y, groups, x_test

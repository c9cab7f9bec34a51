"""Linear probe: what a linear classifier reads out of frozen features, the one number that all architectures share.

StandardScaler and logistic regression on the training patients, the penalty chosen by cross-validation over patients
among them, for several seeds of the folds. Features come from any encoder; nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from medvlm_harness.metrics.ranking import auroc
from medvlm_harness.training.logistic import fit_logistic

__all__ = ["PENALTIES", "SEEDS", "LinearProbe", "linear_probe", "multilabel_probe"]

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C: the inverse of the penalty's strength
SEEDS = (0, 1, 2)
FOLDS = 5


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
    chosen = _choose(x, y, groups, seeds, sorted(penalties), min(folds, *per_class))
    wanted = sorted({penalty for penalty, _ in chosen})
    fits = fit_logistic(x, y[:, None], np.ones((len(x), len(wanted)), bool), wanted)
    margins = dict(zip(wanted, fits.log_odds(x_test).T, strict=True))
    margin = np.stack([margins[penalty] for penalty, _ in chosen])
    penalty, inner_auroc = zip(*chosen, strict=True)
    return LinearProbe(margin, expit(margin), penalty, inner_auroc, positives)


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
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    groups: NDArray[Any],
    seeds: Sequence[int],
    penalties: list[float],
    folds: int,
) -> list[tuple[float, float]]:
    """For each seed the C with the highest mean AUROC over folds of patients, and that mean."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    # Of patients with one item each, folds of items are folds of patients, and found a hundred times faster.
    alone = len(set(groups.tolist())) == len(groups)
    kind, by = (StratifiedKFold, None) if alone else (StratifiedGroupKFold, groups)
    splitters = [kind(folds, shuffle=True, random_state=seed) for seed in seeds]
    parts = [(place, *sides) for place, one in enumerate(splitters) for sides in one.split(x, y, by)]
    # A patient with several items may leave a fold without one class: it says nothing of a penalty.
    parts = [(place, a, b) for place, a, b in parts if len(set(y[a])) == 2 and len(set(y[b])) == 2]
    taken = np.zeros((len(x), len(parts)), dtype=bool)
    for number, (_, learnt, _) in enumerate(parts):
        taken[learnt, number] = True
    areas: list[list[list[float]]] = [[] for _ in seeds]
    if parts:
        # All at once: folds by folds, the penalties of each after one another.
        fits = fit_logistic(x, y[:, None], np.repeat(taken, len(penalties), axis=1), penalties * len(parts))
        for number, (place, _, held) in enumerate(parts):
            its = fits.coefficients[:, number * len(penalties) : (number + 1) * len(penalties)]
            areas[place].append([auroc(y[held], ranked) for ranked in (x[held] @ its).T])
    chosen = []
    for of_folds in areas:
        means = np.mean(of_folds, axis=0) if of_folds else np.full(len(penalties), np.nan)
        best = int(np.argmax(means))  # the first of equals
        chosen.append((penalties[best], float(means[best])))
    return chosen


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

"""DeLong's variance of an AUROC, and of the difference between two on the same items; clustered by study.

Both are sums over studies of how far each item's placement lies from the mean: an item's placement is the share of the
other class that it is on the right side of. Of two scores, the difference of the placements takes that place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from medvlm_harness.metrics.ranking import auroc

__all__ = ["Components", "PairedAuroc", "compare_aurocs", "components", "delong_variance"]

Floats = NDArray[np.float64]


class Components(NamedTuple):
    """DeLong's variance in parts: from positives, from negatives, and (of studies that hold both) their covariance."""

    positive: float
    negative: float
    covariance: float
    positive_studies: int
    negative_studies: int

    @property
    def variance(self) -> float:
        """Of the whole; rounding, or a strong negative covariance in few studies, does not end below 0."""
        return float(np.maximum(self.positive + self.negative + 2 * self.covariance, 0))  # which keeps NaN


class PairedAuroc(NamedTuple):
    """The AUROC of one score less that of another, on the same items."""

    difference: float
    stderr: float
    p: float  # two-sided


def compare_aurocs(
    y_true: ArrayLike, first: ArrayLike, second: ArrayLike, *, clusters: ArrayLike | None = None
) -> PairedAuroc:
    """DeLong's test of two correlated AUROCs, or Obuchowski's for clustered items: first less second.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        first: any real scale, higher means more likely 1, shape (n,).
        second: likewise.
        clusters: the study (or patient) of each item, shape (n,); None if each item is its own.

    Returns:
        All NaN unless both classes are there. Where the placements of the two never differ, p is 1; where they differ
        in the same way everywhere, the sample shows no variance and p is NaN.

    Source: DeLong et al. 1988, Biometrics 44(3); Obuchowski 1997, Biometrics 53(2).
    """
    value = auroc(y_true, first), auroc(y_true, second)
    difference = value[0] - value[1]
    if np.isnan(difference):
        return PairedAuroc(np.nan, np.nan, np.nan)
    placements = _placements(y_true, first) - _placements(y_true, second)
    variance = _components(y_true, placements, clusters).variance
    if not placements.any():
        return PairedAuroc(0.0, 0.0, 1.0)
    if not variance > 0:
        return PairedAuroc(difference, np.nan, np.nan)
    stderr = float(np.sqrt(variance))
    return PairedAuroc(difference, stderr, float(2 * ndtr(-abs(difference) / stderr)))


def delong_variance(y_true: ArrayLike, score: ArrayLike, *, clusters: ArrayLike | None = None) -> float:
    """DeLong's variance of the AUROC, or Obuchowski's for clustered items.

    Returns:
        NaN unless each class is in at least two clusters; 0 if all placements are alike (perfect separation, or all
        scores tied), which says that the sample shows no variance, not that there is none.

    Source: DeLong et al. 1988, Biometrics 44(3); Obuchowski 1997, Biometrics 53(2).
    """
    if np.isnan(auroc(y_true, score)):
        return float("nan")
    return components(y_true, score, clusters).variance


def components(y_true: ArrayLike, score: ArrayLike, clusters: ArrayLike | None) -> Components:
    """The parts of `delong_variance`; both classes must be there."""
    return _components(y_true, _placements(y_true, score), clusters)


def _placements(y_true: ArrayLike, score: ArrayLike) -> Floats:
    """Of each item, the share of the other class that it is on the right side of, ties counted half."""
    y, s = np.asarray(y_true) == 1, np.asarray(score, dtype=np.float64)
    m, n = int(y.sum()), int((~y).sum())
    overall = _average_rank(s)
    placement = np.empty(y.size)
    placement[y] = (overall[y] - _average_rank(s[y])) / n
    placement[~y] = 1 - (overall[~y] - _average_rank(s[~y])) / m
    return placement


def _components(y_true: ArrayLike, placement: Floats, clusters: ArrayLike | None) -> Components:
    y = np.asarray(y_true) == 1
    ids = np.arange(y.size) if clusters is None else np.asarray(clusters)
    if ids.shape != y.shape:
        raise ValueError(f"Expected clusters of shape {y.shape}, but got {ids.shape}.")
    names, study = np.unique(ids, return_inverse=True)
    m, n = int(y.sum()), int((~y).sum())
    centred = placement - placement[y].mean()
    of_positives = np.bincount(study[y], weights=centred[y], minlength=len(names)) / m
    of_negatives = np.bincount(study[~y], weights=centred[~y], minlength=len(names)) / n
    i, j, k = np.unique(study[y]).size, np.unique(study[~y]).size, len(names)
    return Components(
        positive=i / (i - 1) * float(of_positives @ of_positives) if i > 1 else float("nan"),
        negative=j / (j - 1) * float(of_negatives @ of_negatives) if j > 1 else float("nan"),
        covariance=k / (k - 1) * float(of_positives @ of_negatives) if k > 1 else float("nan"),
        positive_studies=i,
        negative_studies=j,
    )


def _average_rank(values: Floats) -> Floats:
    """Rank of each value from 1, tied ones sharing their mean (scipy.stats takes half a second to import)."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: Floats = np.cumsum(count) - (count - 1) / 2
    return mean[group]

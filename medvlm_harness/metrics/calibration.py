"""Calibration of predicted probabilities: how far a stated probability is from the observed frequency.

A calibration error is a sum of distances: noise alone lifts it above 0, and resampling adds noise once more. The
percentile interval therefore lies too high; the intervals here are recentred at the value. Coverage in simulation of
what samples of this size score on average, nominally 95% (n of 296, 590 and 2,000, mean prevalence 0.1 and 0.5,
log-odds overstated 1, 1.5 and 3 times; 150 samples each): 92 to 99% with equal-width, 91 to 99% with equal-mass bins,
most where the model is perfect. Not recentred, a perfect model's interval covers 69% (prevalence 0.5) and 86% (0.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from medvlm_harness.metrics._arrays import ratio_or_nan, row_means
from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.per_label import PerLabel, checked_labels

__all__ = [
    "BINS",
    "METRICS",
    "MINIMUM_SUPPORT",
    "Binning",
    "Reliability",
    "brier_score",
    "brier_skill",
    "calibration_estimates",
    "calibration_names",
    "expected_calibration_error",
    "macro_calibration",
    "noise_floor",
    "reliability",
]

Binning = Literal["width", "mass"]
BINS = 15
MINIMUM_SUPPORT = 50  # and negatives, that a label needs to go into a macro: with fewer, ECE is mostly noise
Floats = NDArray[np.float64]
BINNINGS: Mapping[str, Binning] = {"ece": "width", "ece_equal_mass": "mass"}
METRICS = ("brier", "brier_skill", *BINNINGS)


class Reliability(NamedTuple):
    """One row per non-empty bin; all arrays have shape (bins,)."""

    confidence: Floats  # mean predicted probability, in [0, 1]
    frequency: Floats  # observed share of positives, in [0, 1]
    support: NDArray[np.int64]


def brier_score(y_true: ArrayLike, y_prob: ArrayLike) -> float:
    """Mean squared difference between probability and outcome; in [0, 1], lower is better.

    At a low prevalence it is low for everyone: read `brier_skill` beside it.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        y_prob: predicted probability of 1, in [0, 1], shape (n,).

    Source: Brier 1950, Mon. Weather Rev. 78(1); equal to scikit-learn's brier_score_loss.
    """
    y, p = _validated(y_true, y_prob, BINS)
    return float(np.mean((p - y) ** 2))


def brier_skill(y_true: ArrayLike, y_prob: ArrayLike) -> float:
    """Share of the Brier score of always predicting the sample's prevalence that is saved; at most 1, 0 is no skill.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        y_prob: predicted probability of 1, in [0, 1], shape (n,).

    Returns:
        Below 0 where predicting the prevalence is better; NaN where one class is missing.

    >>> brier_skill([0, 0, 0, 1], [0.25, 0.25, 0.25, 0.25])
    0.0
    """
    y, p = _validated(y_true, y_prob, BINS)
    variance = y.mean() * (1 - y.mean())
    return float(1 - np.mean((p - y) ** 2) / variance) if variance > 0 else float("nan")


def reliability(y_true: ArrayLike, y_prob: ArrayLike, *, bins: int = BINS, binning: Binning = "width") -> Reliability:
    """Group predictions into bins and compare what was predicted with what happened.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        y_prob: predicted probability of 1, in [0, 1], shape (n,).
        bins: number of bins asked for; empty ones are left out.
        binning: "width" for equal-width bins, "mass" for (nearly) equal counts; equal values share a bin in both.

    Raises:
        ValueError: if shapes differ, nothing is given, or a value is outside its range.

    Source: Guo et al. 2017, arXiv 1706.04599, eq. 2; equal mass: Nixon et al. 2019, arXiv 1904.01685.
    """
    y, p = _validated(y_true, y_prob, bins)
    index = _bin_of(p, bins, binning)
    count = np.bincount(index)
    filled = count > 0
    confidence = np.bincount(index, weights=p)[filled] / count[filled]
    frequency = np.bincount(index, weights=y)[filled] / count[filled]
    return Reliability(confidence, frequency, count[filled])


def expected_calibration_error(
    y_true: ArrayLike, y_prob: ArrayLike, *, bins: int = BINS, binning: Binning = "width"
) -> float:
    """Mean gap between predicted and observed frequency, weighted by bin size; in [0, 1], lower is better.

    A model that always predicts the prevalence scores near 0: read it beside AUROC and `noise_floor`.

    >>> expected_calibration_error([0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0])
    0.5
    """
    table = reliability(y_true, y_prob, bins=bins, binning=binning)
    return float(np.average(np.abs(table.confidence - table.frequency), weights=table.support))


def noise_floor(
    y_prob: ArrayLike,
    *,
    studies: ArrayLike | None = None,
    bins: int = BINS,
    binning: Binning = "width",
    draws: int = 200,
    seed: int = 0,
) -> float:
    """What a perfectly calibrated model with these predictions would score, on average, at this sample size.

    Args:
        y_prob: predicted probability of 1, in [0, 1], shape (n,).
        studies: the study of each item, (n,), whose items have their outcome in common; None if each is its own.
        bins: see `reliability`.
        binning: see `reliability`.
        draws: outcomes that are drawn for each prediction.
        seed: of the draws.
    """
    _, p = _validated(np.zeros(np.shape(y_prob)), y_prob, bins)
    member = csr_array((np.ones(p.size), (_bin_of(p, bins, binning), np.arange(p.size))))
    names, item = np.unique(np.arange(p.size) if studies is None else np.asarray(studies), return_inverse=True)
    rng = np.random.default_rng(seed)
    return float(
        np.mean([np.abs(member @ (p - (rng.random(len(names))[item] < p))).sum() for _ in range(draws)]) / p.size
    )


def calibration_names(keys: Sequence[str]) -> tuple[str, ...]:
    """The keys of `calibration_estimates`, in its order: means over labels first.

    >>> calibration_names(["edema"])[:5]
    ('brier', 'brier_skill', 'ece', 'ece_equal_mass', 'brier_edema')
    """
    return (*METRICS, *(f"{metric}_{key}" for key in keys for metric in METRICS))


def calibration_estimates(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    studies: ArrayLike,
    *,
    keys: Sequence[str],
    bins: int = BINS,
    reasons: Sequence[str | None] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Brier score, Brier skill and both calibration errors, per label and as means over labels; by `calibration_names`.

    The floor of a Brier score is that of always predicting the prevalence, that of a calibration error is its
    `noise_floor`. An interval of a calibration error is for what samples of this size score on average, not for the
    error at unlimited size: one that holds the floor cannot be told from a perfect model's. Bins stay those of the
    sample in all resamples. `extra` of ece and ece_equal_mass holds the reliability table.

    Args:
        y_true: 1, 0, or NaN where unlabelled, shape (n, labels).
        y_prob: predicted probability of 1, in [0, 1], shape (n, labels); a column of NaN where a label has none.
        studies: the study of each row, (n,).
        keys: the labels' names, (labels,).
        bins: see `reliability`.
        reasons: why a label has no probability, None for those that have, (labels,).
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    y, p = checked_labels(y_true, studies, keys, y_prob)
    ids = np.asarray(studies)
    columns = [_Column(y[:, j], p[:, j], bins) for j in range(len(keys))]
    floors = [column.floors(ids) for column in columns]
    table = PerLabel(
        lambda weights: np.stack([column(weights) for column in columns], axis=2),
        y,
        studies,
        keys,
        METRICS,
        resamples=resamples,
        seed=seed,
    )
    estimates = {
        metric: table.macro(
            metric,
            range(len(keys)),
            minimum=MINIMUM_SUPPORT,
            floors=[of_label[metric] for of_label in floors],
            recentred=metric in BINNINGS,
        )
        for metric in METRICS
    }
    for j, key in enumerate(keys):
        for metric in METRICS:
            estimates[f"{metric}_{key}"] = table.single(
                metric,
                j,
                floor=floors[j][metric],
                why=reasons[j] if reasons else None,
                minimum=MINIMUM_SUPPORT,
                recentred=metric in BINNINGS,
                extra={"reliability": columns[j].tables[metric]._asdict()} if metric in columns[j].tables else None,
            )
    return estimates


def macro_calibration(y_true: ArrayLike, y_prob: ArrayLike, *, bins: int = BINS) -> Callable[[Weights], Floats]:
    """The means over labels of `METRICS` as a statistic: weights (b, n) to values (b, metrics).

    Args:
        y_true: 1, 0, or NaN where unlabelled, shape (n, labels).
        y_prob: predicted probability of 1, in [0, 1], shape (n, labels).
        bins: see `reliability`; they stay those of the sample.
    """
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_prob, dtype=np.float64)
    if y.ndim != 2 or y.shape != p.shape or not y.shape[1]:
        raise ValueError(f"Expected arrays of one shape (n, labels) with labels, but got {y.shape} and {p.shape}.")
    columns = [_Column(y[:, j], p[:, j], bins) for j in range(y.shape[1])]

    def statistic(weights: Weights) -> Floats:
        of_labels = np.stack([column(weights) for column in columns], axis=2)  # (b, metrics, labels)
        return row_means(of_labels.reshape(-1, len(columns))).reshape(len(weights), len(METRICS))

    return statistic


class _Column:
    """All metrics of one label as a statistic, with floors and reliability tables; NaN without probabilities."""

    def __init__(self, y: Floats, p: Floats, bins: int) -> None:
        counted = np.flatnonzero(~np.isnan(y))
        if np.isnan(p).all():
            counted = counted[:0]
        self.bins, self.counted, self.counted_p = bins, counted, p[counted]
        self.tables: dict[str, Reliability] = {}
        self.gaps: list[csr_array] = []
        self.known, self.truth, self.squared = np.zeros(len(y)), np.zeros(len(y)), np.zeros(len(y))
        if counted.size == 0:
            return
        y, p = _validated(y[counted], p[counted], bins)
        self.known[counted], self.truth[counted], self.squared[counted] = 1, y, (p - y) ** 2
        for metric, binning in BINNINGS.items():
            # Of a bin, an error needs the sum of its gaps only: they are added up by a product.
            index = _bin_of(p, bins, binning)
            self.gaps.append(csr_array((p - y, (index, counted)), shape=(int(index.max()) + 1, len(self.known))))
            self.tables[metric] = reliability(y, p, bins=bins, binning=binning)

    def floors(self, studies: NDArray[np.generic]) -> dict[str, float]:
        """What always predicting the prevalence, and a perfectly calibrated model, score."""
        if self.counted.size == 0:
            return dict.fromkeys(METRICS, float("nan"))
        prevalence = float(self.truth[self.counted].mean())
        its = studies[self.counted]
        noise = {
            metric: noise_floor(self.counted_p, studies=its, bins=self.bins, binning=binning)
            for metric, binning in BINNINGS.items()
        }
        return {"brier": prevalence * (1 - prevalence), "brier_skill": 0.0, **noise}

    def __call__(self, weights: Weights) -> Floats:
        """Weights (b, n) to values (b, metrics)."""
        total = weights @ self.known
        brier, prevalence = ratio_or_nan(weights @ self.squared, total), ratio_or_nan(weights @ self.truth, total)
        skill = 1 - ratio_or_nan(brier, prevalence * (1 - prevalence))
        errors = [ratio_or_nan(np.abs(gaps @ weights.T).sum(axis=0), total) for gaps in self.gaps]
        return np.stack([brier, skill, *(errors or [total * np.nan] * len(BINNINGS))], axis=1)


def _bin_of(p: Floats, bins: int, binning: Binning) -> NDArray[np.intp]:
    """The bin of each probability: edges belong to the bin above, except 1, which belongs to the last."""
    # The last edge is closed: a model that is always sure (p = 1) must not fall outside every bin.
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    if binning == "mass":
        inner = np.unique(np.quantile(p, inner))
    return np.searchsorted(inner, p, side="right")


def _validated(y_true: ArrayLike, y_prob: ArrayLike, bins: int) -> tuple[Floats, Floats]:
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_prob, dtype=np.float64)
    if y.shape != p.shape or y.ndim != 1 or y.size == 0:
        raise ValueError(f"Expected y_true and y_prob of one shape (n,) with n > 0, but got {y.shape} and {p.shape}.")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"Expected y_true to hold only 0 and 1, but got {np.unique(y)[:5]}.")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"Expected y_prob in [0, 1], but got values from {np.nanmin(p)} to {np.nanmax(p)}.")
    if bins < 1:
        raise ValueError(f"Expected bins to be at least 1, but got {bins}.")
    return y, p

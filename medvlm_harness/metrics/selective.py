"""Selective prediction: how the error falls when the least confident answers are left to a person.

Answers of equal confidence are never put in an order: within a tie the risk is its expectation over all orders, and a
confidence threshold takes all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from medvlm_harness.metrics._arrays import checked_weights, ratio_or_nan, running_sum
from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.per_label import PerLabel, checked_labels

__all__ = [
    "MINIMUM_SUPPORT",
    "Acceptance",
    "RiskCoverage",
    "aurc",
    "binary_decisions",
    "coverage_at_sensitivity",
    "excess_aurc",
    "risk_coverage",
    "selective_estimates",
    "selective_names",
    "weighted_aurc",
]

Floats = NDArray[np.float64]
MINIMUM_SUPPORT = 10  # positives, and negatives, that a label needs to go into a macro
METRICS = ("aurc", "excess_aurc")


class RiskCoverage(NamedTuple):
    """The curve: answering the k most confident items, k from 1 to n; both arrays have shape (n,)."""

    coverage: Floats  # share of items answered, in (0, 1]
    risk: Floats  # expected share of errors among them, in [0, 1]


class Acceptance(NamedTuple):
    """Answering only what is at least as confident as a threshold."""

    threshold: float
    coverage: float  # share of items answered
    sensitivity: float  # among them, share of the positives that are called positive


def risk_coverage(error: ArrayLike, confidence: ArrayLike) -> RiskCoverage:
    """Error among the most confident answers, at every coverage.

    Args:
        error: 1 for a wrong answer, 0 for a right one, shape (n,).
        confidence: any real scale, higher is surer, shape (n,).

    Source: El-Yaniv and Wiener 2010, JMLR 11; ties by expectation.

    >>> risk_coverage([0, 1, 0], [0.9, 0.6, 0.6]).risk.tolist()
    [0.0, 0.25, 0.3333333333333333]
    """
    e, c = _validated(error, confidence)
    _, group, count = np.unique(-c, return_inverse=True, return_counts=True)
    mean = np.bincount(group, weights=e) / count
    answered = np.arange(1, e.size + 1)
    return RiskCoverage(answered / e.size, np.cumsum(np.repeat(mean, count)) / answered)


def aurc(error: ArrayLike, confidence: ArrayLike) -> float:
    """Area under the risk-coverage curve, the mean of its risks; in [0, 1], lower is better.

    Confidence that says nothing scores the error rate.

    Args:
        error: 1 for a wrong answer, 0 for a right one, shape (n,).
        confidence: any real scale, higher is surer, shape (n,).

    Source: Geifman and El-Yaniv 2017, arXiv 1705.08500.
    """
    return float(weighted_aurc(error, confidence, np.ones((1, np.size(error))))[0, 0])


def excess_aurc(error: ArrayLike, confidence: ArrayLike) -> float:
    """`aurc` less that of an oracle, which is least confident where it errs; at least 0, lower is better.

    Source: Geifman et al. 2019, arXiv 1805.08206; the oracle's area is exact, not their approximation.
    """
    return float(weighted_aurc(error, confidence, np.ones((1, np.size(error))))[0, 1])


def weighted_aurc(error: ArrayLike, confidence: ArrayLike, weights: ArrayLike) -> Floats:
    """`aurc` and `excess_aurc` once per row of whole weights (resamples, n); shape (resamples, 2)."""
    e, c = _validated(error, confidence)
    return _Curve(e, c, np.ones(e.size, dtype=np.bool_))(checked_weights(weights, e.size))


def binary_decisions(y_true: ArrayLike, y_prob: ArrayLike) -> tuple[Floats, Floats]:
    """Error and confidence of the answers that probabilities give at 0.5, both of the shape given.

    Args:
        y_true: 1, 0, or NaN where unlabelled; there, the error is NaN.
        y_prob: predicted probability of 1, in [0, 1]; NaN where there is none, and then the error is NaN too.

    Returns:
        1 for a wrong answer and 0 for a right one; and the probability of what is answered, in [0.5, 1].
    """
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_prob, dtype=np.float64)
    error = np.where(np.isnan(y) | np.isnan(p), np.nan, (p >= 0.5) != (y == 1))
    return error, np.maximum(p, 1 - p)


def coverage_at_sensitivity(
    y_true: ArrayLike, positive: ArrayLike, confidence: ArrayLike, *, sensitivity: float
) -> Acceptance:
    """The largest share of items that can be answered with this sensitivity among them.

    A threshold chosen on the items that it is then judged by is too good: choose on validation, apply on test.

    Args:
        y_true: 0 or 1 per item, shape (n,).
        positive: what is answered, 0 or 1 per item, shape (n,).
        confidence: any real scale, higher is surer, shape (n,).
        sensitivity: to be reached, in (0, 1].

    Returns:
        All NaN without positives; coverage 0, threshold infinite and sensitivity NaN where no threshold reaches it.
        A threshold above which there is no positive does not count as reaching it.
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"Expected sensitivity in (0, 1], but got {sensitivity}.")
    y, c = _validated(y_true, confidence)
    called, _ = _validated(positive, confidence)
    if not y.any():
        return Acceptance(np.nan, np.nan, np.nan)
    levels, group = np.unique(-c, return_inverse=True)
    answered = np.cumsum(np.bincount(group))
    found = ratio_or_nan(np.cumsum(np.bincount(group, weights=y * called)), np.cumsum(np.bincount(group, weights=y)))
    reached = np.flatnonzero(found >= sensitivity)
    if reached.size == 0:
        return Acceptance(np.inf, 0.0, np.nan)
    last = reached[-1]
    return Acceptance(float(-levels[last]), float(answered[last] / y.size), float(found[last]))


def selective_names(keys: Sequence[str], *, accepted: bool = False) -> tuple[str, ...]:
    """The keys of `selective_estimates`, in its order; `accepted`: with thresholds.

    >>> selective_names(["edema"])
    ('aurc', 'excess_aurc', 'aurc_edema', 'excess_aurc_edema')
    """
    metrics = (*METRICS, "coverage", "accepted_sensitivity") if accepted else METRICS
    return (*metrics, *(f"{metric}_{key}" for key in keys for metric in metrics))


def selective_estimates(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    studies: ArrayLike,
    *,
    keys: Sequence[str],
    thresholds: Sequence[float] | None = None,
    reasons: Sequence[str | None] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """AURC and excess AURC of `binary_decisions`, per label and as means over labels; by `selective_names`.

    With thresholds also `coverage` and `accepted_sensitivity`: what is answered at them, and how well. The floor of
    AURC is the error rate, which confidence that says nothing scores; that of excess AURC likewise.

    Args:
        y_true: 1, 0, or NaN where unlabelled, shape (n, labels).
        y_prob: predicted probability of 1, in [0, 1], shape (n, labels); a column of NaN where a label has none.
        studies: the study of each row, (n,).
        keys: the labels' names, (labels,).
        thresholds: of confidence, from `coverage_at_sensitivity` on validation, (labels,); NaN: none.
        reasons: why a label has no probability or threshold, (labels,).
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    y, p = checked_labels(y_true, studies, keys, y_prob)
    error, confidence = binary_decisions(y, p)
    known = ~np.isnan(error)
    curves = [_Curve(error[:, j], confidence[:, j], known[:, j]) for j in range(len(keys))]
    metrics: tuple[str, ...] = METRICS
    parts: list[Floats] = []
    whole: dict[str, NDArray[np.bool_]] = {}
    if thresholds is not None:
        metrics = (*METRICS, "coverage", "accepted_sensitivity")
        least = np.asarray(thresholds, dtype=np.float64)
        usable = known & ~np.isnan(least)
        accepted = usable & (confidence >= least)
        present = accepted & (y == 1)
        whole = {"coverage": usable, "accepted_sensitivity": present}
        parts = [one.astype(np.float64) for one in (accepted, usable, present & (p >= 0.5), present)]

    def statistic(weights: Weights) -> Floats:
        values = np.stack([curve(weights) for curve in curves], axis=2)
        if not parts:
            return values
        taken, asked, found, present = (weights @ part for part in parts)
        shares = np.stack([ratio_or_nan(taken, asked), ratio_or_nan(found, present)], axis=1)
        return np.concatenate([values, shares], axis=1)

    fixed = "" if thresholds is None else "thresholds chosen on validation and held fixed"
    table = PerLabel(statistic, y, studies, keys, metrics, fixed=fixed, resamples=resamples, seed=seed)
    # Of confidence that says nothing: all items are one tie.
    silent = [_Curve(error[:, j], np.zeros(len(y)), known[:, j])(np.ones((1, len(y))))[0] for j in range(len(keys))]
    floors = {metric: [float(one[k]) for one in silent] for k, metric in enumerate(METRICS)}
    estimates = {
        metric: table.macro(metric, range(len(keys)), minimum=MINIMUM_SUPPORT, floors=floors.get(metric))
        for metric in metrics
    }
    ids = np.asarray(studies)
    for j, key in enumerate(keys):
        for metric in metrics:
            floor = floors[metric][j] if metric in floors else None
            estimates[f"{metric}_{key}"] = table.single(
                metric,
                j,
                floor=floor,
                why=reasons[j] if reasons else None,
                minimum=MINIMUM_SUPPORT,
                trials=len(np.unique(ids[whole[metric][:, j]])) if metric in whole else None,
            )
    return estimates


class _Curve:
    """AURC and excess AURC of known items as a statistic: weights (b, n) to (b, 2); NaN without weight.

    An error adds to the risk at its own place and at all after it. So only confidences at which there is an error, the
    levels, are told apart, and other items are counted between them.
    """

    def __init__(self, error: Floats, confidence: Floats, known: NDArray[np.bool_]) -> None:
        n = len(error)
        self.known = known.astype(np.float64)
        wrong = np.flatnonzero(known & (error == 1))
        levels, level = np.unique(-confidence[wrong], return_inverse=True)
        self.errors = csr_array((np.ones(wrong.size), (level, wrong)), shape=(levels.size, n))
        place = np.searchsorted(levels, -confidence, side="left")  # the first level that is not more confident
        counted = known & (place < levels.size)
        tied = counted.copy()
        tied[counted] = levels[place[counted]] == -confidence[counted]
        self.tied, self.above = (
            csr_array((np.ones(one.sum()), (place[one], np.flatnonzero(one))), shape=(levels.size, n))
            for one in (tied, counted & ~tied)
        )

    def __call__(self, weights: Weights) -> Floats:
        n = weights @ self.known
        errors, tied, above = (one @ weights.T for one in (self.errors, self.tied, self.above))  # (levels, resamples)
        total = errors.sum(axis=0)
        upto = running_sum(above + tied)
        before, through = upto[:-1] + above, upto[1:]
        sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n.max(initial=0) + 1))])

        def harmonic(whole: Floats) -> Floats:
            return np.asarray(sums[whole.astype(np.intp)])

        # Within a tie of m items after `before` others, the expected risks sum to
        # (errors / m) * sum over j <= m of j / (before + j); after it, each error adds 1 / k at every k.
        rise = harmonic(through) - harmonic(before)
        within = 1 - np.divide(before, tied, out=np.zeros_like(before), where=tied > 0) * rise
        found = np.einsum("lr,lr->r", errors, within + harmonic(n) - harmonic(through))
        # The oracle's errors are the last: after k > n - total answers it has made k - (n - total) of them.
        oracle = total - (n - total) * (harmonic(n) - harmonic(n - total))
        return np.stack([ratio_or_nan(found, n), ratio_or_nan(found - oracle, n)], axis=1)


def _validated(binary: ArrayLike, confidence: ArrayLike) -> tuple[Floats, Floats]:
    e, c = np.asarray(binary, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    if e.shape != c.shape or e.ndim != 1 or e.size == 0:
        raise ValueError(f"Expected two arrays of one shape (n,) with n > 0, but got {e.shape} and {c.shape}.")
    if not np.isin(e, (0, 1)).all():
        raise ValueError(f"Expected only 0 and 1, but got {np.unique(e)[:5]}.")
    if np.isnan(c).any():
        raise ValueError(f"Expected confidences that are numbers, but got NaN for {np.isnan(c).sum()} of {c.size}.")
    return e, c

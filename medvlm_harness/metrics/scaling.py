"""Scaling of logits to calibrated probabilities: temperature and Platt, fitted on validation items, never on test.

Each label has a fit of its own where validation has enough positives and negatives; else the temperature that all
labels share; else none, and the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax

from medvlm_harness.metrics.per_label import checked_labels

__all__ = [
    "MINIMUM_SUPPORT",
    "Method",
    "Scaling",
    "fit_scaling",
    "fit_softmax_temperature",
    "scaled",
    "softmax_scaled",
]

Method = Literal["temperature", "platt"]
Floats = NDArray[np.float64]
MINIMUM_SUPPORT = 20  # positives, and negatives, that a fit needs


@dataclass(frozen=True)
class Scaling:
    """How the logits of one label become probabilities: 1 / (1 + exp(-(slope * logit + offset))).

    Attributes:
        fitted: what was fitted; None: nothing could be, and slope and offset are NaN.
        slope: above 0; the inverse of the temperature.
        offset: 0 for temperatures.
        n: labelled validation items of this label.
        positives: how many of them are positive.
        reason: why there is no fit of this label's own.
    """

    fitted: Literal["temperature", "platt", "shared temperature"] | None
    slope: float
    offset: float
    n: int
    positives: int
    reason: str | None = None


def fit_scaling(y_true: ArrayLike, logit: ArrayLike, *, keys: Sequence[str], method: Method) -> dict[str, Scaling]:
    """Scalings by label, from validation items.

    Args:
        y_true: 1, 0, or NaN where unlabelled, of validation items, shape (n, labels).
        logit: log-odds that the model states for them, finite, shape (n, labels).
        keys: the labels' names, (labels,).
        method: "temperature": one slope; "platt": slope and offset, against targets that Laplace's rule draws in from
            0 and 1, so that separable classes have a finite fit.

    Source: Guo et al. 2017, arXiv 1706.04599; Platt 1999 with Lin et al. 2007, Mach. Learn. 68(3).
    """
    y, z = checked_labels(y_true, np.arange(len(np.asarray(y_true))), keys, logit)
    if not np.isfinite(z[~np.isnan(y)]).all():
        raise ValueError("Expected finite logits, but got NaN or an infinite one (a probability of 0 or 1).")
    known = ~np.isnan(y)
    shared, why_none = _fit(y[known], z[known], "temperature")
    scalings = {}
    for j, key in enumerate(keys):
        of_label, of_logit = y[known[:, j], j], z[known[:, j], j]
        counts = len(of_label), int(of_label.sum())
        own, reason = _fit(of_label, of_logit, method)
        if own is not None:
            scalings[key] = Scaling(method, *own, *counts)
        elif shared is not None:
            scalings[key] = Scaling("shared temperature", *shared, *counts, reason=reason)
        else:
            both = f"{reason}; no temperature shared by all labels either: {why_none}"
            scalings[key] = Scaling(None, np.nan, np.nan, *counts, reason=both)
    return scalings


def scaled(logit: ArrayLike, scalings: Sequence[Scaling]) -> Floats:
    """Probabilities of logits (n, labels), of the same shape; NaN for labels without a fit."""
    z = np.asarray(logit, dtype=np.float64)
    if z.ndim != 2 or z.shape[1] != len(scalings):
        raise ValueError(f"Expected logits of shape (n, {len(scalings)}), but got {z.shape}.")
    probability: Floats = expit(z * [one.slope for one in scalings] + [one.offset for one in scalings])
    return probability


def fit_softmax_temperature(y_true: ArrayLike, y_prob: ArrayLike) -> Scaling:
    """The temperature of exclusive options, one for all, from validation items.

    Needs 20 items of each of two options; `positives` are the items whose most probable option is right.

    Args:
        y_true: one-hot, shape (n, options).
        y_prob: rows that sum to 1, shape (n, options).

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    y, z = _log_odds_scale(y_true, y_prob)
    right = int(y[np.arange(len(y)), z.argmax(axis=1)].sum()) if len(y) else 0
    frequent = sorted(y.sum(axis=0).astype(int).tolist(), reverse=True)[1]

    def undefined(reason: str) -> Scaling:
        return Scaling(None, np.nan, np.nan, len(y), right, reason)

    if frequent < MINIMUM_SUPPORT:
        return undefined(f"validation has not {MINIMUM_SUPPORT} items of each of two options")
    if right == len(y):
        return undefined("all validation answers are right: no temperature is too low")
    unit = z.std()
    if unit == 0:
        return undefined("all options are equally probable on validation")
    z, of_truth = z / unit, (y * z).sum(axis=1) / unit

    def loss(w: Floats) -> tuple[float, Floats]:
        """Mean negative log-likelihood, and its gradient."""
        expected = (softmax(w[0] * z, axis=1) * z).sum(axis=1)
        value = float(np.mean(logsumexp(w[0] * z, axis=1) - w[0] * of_truth))
        return value, np.array([np.mean(expected - of_truth)])

    found = minimize(loss, np.zeros(1), jac=True, method="BFGS", options={"gtol": 1e-9})
    if np.abs(found.jac).max() > 1e-6:
        return undefined(f"the fit did not converge ({found.message})")
    slope = float(found.x[0] / unit)
    if slope <= 0:
        return undefined("more probable validation options are not more often right: the slope would not be above 0")
    return Scaling("temperature", slope, 0.0, len(y), right)


def softmax_scaled(y_prob: ArrayLike, scaling: Scaling) -> Floats:
    """Probabilities of exclusive options (n, options) after their temperature; NaN without a fit."""
    _, z = _log_odds_scale(y_prob, y_prob)
    probability: Floats = softmax(scaling.slope * z, axis=1)
    return probability


def _log_odds_scale(y_true: ArrayLike, y_prob: ArrayLike) -> tuple[Floats, Floats]:
    """Truth, and log probabilities less their mean, which softmax does not see; 0 counts as 1e-12."""
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_prob, dtype=np.float64)
    if y.ndim != 2 or y.shape != p.shape or y.shape[1] < 2:
        raise ValueError(f"Expected arrays of one shape (n, options), two or more, but got {y.shape} and {p.shape}.")
    z = np.log(np.clip(p, 1e-12, 1))
    return y, z - z.mean(axis=1, keepdims=True)


def _fit(y: Floats, z: Floats, method: Method) -> tuple[tuple[float, float] | None, str | None]:
    """Slope and offset, or why there are none."""
    positives = int(y.sum())
    if min(positives, len(y) - positives) < MINIMUM_SUPPORT:
        few = f"{positives} positives and {len(y) - positives} negatives"
        return None, f"validation has {few}, fewer than {MINIMUM_SUPPORT} of one"
    if np.ptp(z) == 0:
        return None, f"all validation logits are {z[0]:g}"
    target = y
    if method == "platt":
        negatives = len(y) - positives
        target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    elif ((y == 1) == (z > 0))[z != 0].all():
        return None, "0 separates the validation logits: no temperature is too low"
    # In units of their spread, so that one tolerance fits cosines and sums of log-probabilities alike.
    centre, unit = (z.mean(), z.std()) if method == "platt" else (0.0, np.sqrt(np.mean(z**2)))
    features = np.column_stack([(z - centre) / unit, np.ones(len(z))])[:, : 2 if method == "platt" else 1]

    def loss(w: Floats) -> tuple[float, Floats]:
        """Mean negative log-likelihood, and its gradient."""
        a = features @ w
        return float(np.mean(np.logaddexp(0, a) - target * a)), features.T @ (expit(a) - target) / len(a)

    # Convex: the minimum is the only one, and a slope of 0 or less is the data's answer, not the search's.
    found = minimize(loss, np.zeros(features.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-9})
    if np.abs(found.jac).max() > 1e-6:
        return None, f"the fit did not converge ({found.message})"
    slope, offset = found.x[0] / unit, 0.0
    if method == "platt":
        offset = found.x[1] - slope * centre
    if slope <= 0:
        return None, "higher validation logits do not mean more positives: the slope would not be above 0"
    return (float(slope), float(offset)), None

"""Tests of paired differences, and what they could have found: McNemar, Holm, detectable difference, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtr, ndtri

from medvlm_harness.metrics.bootstrap import Z_975

__all__ = [
    "LEVEL",
    "Verdict",
    "detectable_difference",
    "direction",
    "holm",
    "interval_p",
    "mcnemar",
    "non_inferiority",
    "normal_p",
]

LEVEL = 0.05

Verdict = Literal["better", "no difference shown", "worse", "not worse", "undecided"]


def mcnemar(first: ArrayLike, second: ArrayLike, *, clusters: ArrayLike | None = None) -> float:
    """Two-sided p of McNemar's test that two ways of answering are right equally often.

    The mid-p of the exact binomial test where no study has two items that only one way got right; else the clustered
    chi-square of the studies' differences. 1 where the two are right on the same items.

    Args:
        first: whether each item was answered rightly, shape (n,).
        second: likewise, of the other way.
        clusters: the study of each item, shape (n,); None if each item is its own.

    Raises:
        ValueError: if the shapes differ.

    Source: Fagerland et al. 2013, BMC Med. Res. Methodol. 13:91 (mid-p); Durkalski et al. 2003, Stat. Med. 22(15)
    (clustered).
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    ids = np.arange(a.size) if clusters is None else np.asarray(clusters)
    if not a.shape == b.shape == ids.shape or a.ndim != 1:
        raise ValueError(f"Expected three arrays of one shape (n,), but got {a.shape}, {b.shape} and {ids.shape}.")
    _, study = np.unique(ids, return_inverse=True)
    differ = a.astype(np.int64) - b
    discordant = np.bincount(study, weights=differ != 0, minlength=1)
    if not discordant.any():
        return 1.0
    if discordant.max() == 1:
        fewer, n = min(int((differ > 0).sum()), int((differ < 0).sum())), int(discordant.sum())
        tail = float(bdtr(fewer, n, 0.5))
        point = tail - (float(bdtr(fewer - 1, n, 0.5)) if fewer else 0.0)
        return min(2 * tail - point, 1.0)
    of_studies = np.bincount(study, weights=differ)
    squares = float(of_studies @ of_studies)
    return 1.0 if squares == 0 else normal_p(float(of_studies.sum()), float(np.sqrt(squares)))


def normal_p(difference: float, stderr: float) -> float:
    """Two-sided p of a difference by its standard error; 1 where both are 0, NaN where there is no standard error."""
    if difference == 0 and stderr == 0:
        return 1.0
    return float(2 * ndtr(-abs(difference) / stderr)) if stderr > 0 else float("nan")


def interval_p(low: float, high: float) -> float:
    """Two-sided p of a difference by its 95% interval: below 0.05 just where the interval does not hold 0.

    That of a normal distribution with this interval. 1 where both ends are 0; NaN where the interval is unknown, or has
    no width elsewhere than at 0: resamples that all agree say nothing of how certain the difference is.

    Source: Altman and Bland 2011, BMJ 343:d2304.
    """
    return normal_p((low + high) / 2, (high - low) / (2 * Z_975))


def holm(p: Sequence[float]) -> NDArray[np.float64]:
    """Adjusted p of several tests, by which the chance of any false one stays below the level; NaN stays NaN.

    Source: Holm 1979, Scand. J. Stat. 6(2).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=np.float64)
    tests = int((~np.isnan(values)).sum())
    order = np.argsort(values, kind="stable")[:tests]  # NaN sorts last
    adjusted = np.full(values.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(tests, 0, -1)), 1.0)
    return adjusted


def detectable_difference(stderr: float, *, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference that a two-sided test finds with this power, on items like these.

    Args:
        stderr: of the paired difference.
        power: in (0, 1).
        level: of the test, in (0, 1).

    Source: the normal approximation, for example Chow et al. 2008, Sample Size Calculations in Clinical Research, 3.2.
    """
    return float(stderr * (ndtri(1 - level / 2) + ndtri(power)))


def direction(difference: float, p: float, *, level: float = LEVEL, lower_is_better: bool = False) -> Verdict:
    """Whether a test shows the run to be better or worse than the reference.

    Args:
        difference: the run less the reference.
        p: of the test, two-sided; NaN where there is none, which leaves it undecided.
        level: below which p counts.
        lower_is_better: turns the scale.
    """
    if np.isnan(difference) or np.isnan(p):
        return "undecided"
    if p >= level or difference == 0:
        return "no difference shown"
    return "better" if (difference > 0) != lower_is_better else "worse"


def non_inferiority(low: float, high: float, margin: float, *, lower_is_better: bool = False) -> Verdict:
    """Whether the run loses more than a margin: `not worse` if the whole interval lies above -margin, `worse` if below.

    Args:
        low: of the 95% interval of the run less the reference; NaN where unknown, which leaves it undecided.
        high: likewise.
        margin: the loss that does not matter, above 0.
        lower_is_better: turns the scale.

    Raises:
        ValueError: if the margin is not above 0.

    Source: the confidence-interval approach, CONSORT extension, Piaggio et al. 2012, JAMA 308(24).
    """
    if not margin > 0:
        raise ValueError(f"Expected a margin above 0, but got {margin}.")
    if lower_is_better:
        low, high = -high, -low
    return "not worse" if low > -margin else "worse" if high < -margin else "undecided"

"""Subgroups of patients or images: whether a model ranks, over-calls and misses alike in all of them.

Every subgroup is judged at one global threshold, as it would be in use. A subgroup needs 20 positives and 20 negatives,
else it is "insufficient"; one with a count from 1 to 9 shows no counts. (Where one alone does, a total published
elsewhere gives it away by subtraction: do not print totals beside.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics.auroc_interval import auroc_estimate
from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.per_label import PerLabel, checked_labels
from medvlm_harness.metrics.ranking import WeightedRanking

__all__ = ["GAPS", "MINIMUM_SUPPORT", "SMALLEST_SHOWN", "Subgroup", "Subgroups", "subgroup_estimates", "underdiagnosis"]

MINIMUM_SUPPORT = 20  # positives, and negatives, that a subgroup needs
SMALLEST_SHOWN = 10  # counts from 1 to below this could point at a person
RATES = ("auroc", "fpr", "fnr")
GAPS = ("auroc_gap", "fpr_gap", "fnr_gap", "equalized_odds_difference")


@dataclass(frozen=True)
class Subgroup:
    """One subgroup; counts are None where one of them is too small to show.

    Attributes:
        name: the value of the attribute.
        n: labelled items.
        positives: of these.
        negatives: of these.
        auroc: undefined where the subgroup is insufficient, as are the rates.
        fpr: share of the negatives that are called positive.
        fnr: share of the positives that are missed.
    """

    name: str
    n: int | None
    positives: int | None
    negatives: int | None
    auroc: Estimate
    fpr: Estimate
    fnr: Estimate


class Subgroups(NamedTuple):
    """All subgroups of one attribute, by name, and the gaps between those that are sufficient, by `GAPS`."""

    groups: tuple[Subgroup, ...]
    gaps: dict[str, Estimate]


def subgroup_estimates(
    y_true: ArrayLike,
    score: ArrayLike,
    groups: Sequence[str | None],
    studies: ArrayLike,
    *,
    threshold: float,
    resamples: int = 1000,
    seed: int = 0,
) -> Subgroups:
    """AUROC, false positive and false negative rate per subgroup, and how far apart the subgroups are.

    A gap is the highest value less the lowest; `between` in its `extra` names the two. In the resamples these two stay
    the same, so that an interval of a gap that is noise reaches below 0. With more than two subgroups it does not know
    that they were picked as the furthest apart. The equalised odds difference is the greater of the gaps of true and of
    false positive rates.

    Args:
        y_true: 1, 0, or NaN where unlabelled, shape (n,).
        score: any real scale, higher means more likely 1, shape (n,).
        groups: the value of the attribute, None where it is unknown; these items are left out, (n,).
        studies: the study of each item, (n,).
        threshold: score from which on an item is called positive, the same for all subgroups, chosen on validation.
        resamples: number of resamples.
        seed: the same for all that is to be compared.

    Source: Hardt et al. 2016, arXiv 1610.02413; the difference is defined as in fairlearn's equalized_odds_difference.
    """
    names, y, s = _by_group(y_true, score, groups, studies)
    ids = np.asarray(studies)
    if np.isnan(threshold):
        raise ValueError("Expected a threshold, but got NaN.")
    negative, positive = y == 0, y == 1
    called = (s >= threshold)[:, None]
    parts = [part.astype(np.float64) for part in (negative & called, negative, positive & ~called, positive)]
    rankings = [WeightedRanking(y[:, j], s, known=~np.isnan(y[:, j])) for j in range(len(names))]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        false_alarms, negatives, missed, positives = (weights @ part for part in parts)
        areas = np.stack([ranking(weights).auroc for ranking in rankings], axis=1)
        return np.stack([areas, ratio_or_nan(false_alarms, negatives), ratio_or_nan(missed, positives)], axis=1)

    fixed = "threshold held fixed"
    table = PerLabel(statistic, y, studies, names, RATES, fixed=fixed, resamples=resamples, seed=seed)
    enough = np.minimum(table.positives, table.negatives) >= MINIMUM_SUPPORT
    rows = []
    for j, name in enumerate(names):
        counts = int(table.positives[j]), int(table.negatives[j])
        if not enough[j]:
            rows.append(_insufficient(name, *counts))
            continue
        inside = ~np.isnan(y[:, j])
        auroc = auroc_estimate(y[inside, j], s[inside], ids[inside])
        fpr = table.single("fpr", j, trials=len(np.unique(ids[negative[:, j]])))
        fnr = table.single("fnr", j, trials=len(np.unique(ids[positive[:, j]])))
        rows.append(Subgroup(name, sum(counts), *counts, auroc, fpr, fnr))
    return Subgroups(tuple(rows), _gaps(table, np.flatnonzero(enough)))


def underdiagnosis(
    no_finding: ArrayLike,
    score: ArrayLike,
    groups: Sequence[str | None],
    studies: ArrayLike,
    *,
    threshold: float,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Share of those with a finding whom the model calls free of any: by subgroup, and as `gap`, the furthest two.

    Args:
        no_finding: 1 where there is no finding, 0 where there is one, NaN where it is unknown, shape (n,).
        score: of No Finding, shape (n,).
        groups: see `subgroup_estimates`, as all others.
        studies: the study of each item, (n,).
        threshold: of No Finding.
        resamples: number of resamples.
        seed: the same for all that is to be compared.

    Source: Seyyed-Kalantari et al. 2021, Nat. Med. 27: the false positive rate of No Finding.
    """
    found = subgroup_estimates(no_finding, score, groups, studies, threshold=threshold, resamples=resamples, seed=seed)
    rates = {f"underdiagnosis_{group.name}": group.fpr for group in found.groups}
    return {**rates, "underdiagnosis_gap": found.gaps["fpr_gap"]}


def _gaps(table: PerLabel, enough: NDArray[np.intp]) -> dict[str, Estimate]:
    if len(enough) < 2:
        support = f"{MINIMUM_SUPPORT} positives and {MINIMUM_SUPPORT} negatives"
        nothing = Estimate.undefined(f"insufficient: {len(enough)} subgroup(s) with {support}, 2 are needed", n=0)
        return dict.fromkeys(GAPS, nothing)
    gaps = {}
    for row, rate in enumerate(RATES):
        values = table.values[row, enough]
        high, low = int(enough[np.argmax(values)]), int(enough[np.argmin(values)])
        gaps[f"{rate}_gap"] = table.difference(
            rate, high, low, extra={"between": [table.keys[high], table.keys[low]], "subgroups": len(enough)}
        )
    # The gap of true positive rates is that of false negative rates.
    larger = max(("fpr_gap", "fnr_gap"), key=lambda name: gaps[name].value)
    return {**gaps, "equalized_odds_difference": gaps[larger]}


def _insufficient(name: str, positives: int, negatives: int) -> Subgroup:
    """A subgroup without rates, and without counts where one of them is too small to show."""
    small = any(0 < count < SMALLEST_SHOWN for count in (positives, negatives))
    reason = f"insufficient: fewer than {MINIMUM_SUPPORT} positives or negatives"
    if small:
        nothing = Estimate.undefined(f"{reason}, one count below {SMALLEST_SHOWN} and therefore none shown", n=0)
        return Subgroup(name, None, None, None, nothing, nothing, nothing)
    nothing = Estimate.undefined(reason, n=positives + negatives, positives=positives)
    return Subgroup(name, positives + negatives, positives, negatives, nothing, nothing, nothing)


def _by_group(
    y_true: ArrayLike, score: ArrayLike, groups: Sequence[str | None], studies: ArrayLike
) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Names of the subgroups, truth per subgroup with NaN outside of it (n, subgroups), and scores (n,)."""
    y, s = (one[:, 0] for one in checked_labels(_column(y_true), studies, ["label"], _column(score)))
    if len(groups) != len(y):
        raise ValueError(f"Expected a subgroup or None for each of {len(y)} items, but got {len(groups)}.")
    if np.isnan(s[~np.isnan(y)]).any():
        raise ValueError("Expected scores that are numbers, but got NaN for a labelled item.")
    names = sorted({group for group in groups if group is not None})
    if not names:
        raise ValueError("Expected a subgroup for some item, but all are None.")
    member = np.array([[group == name for name in names] for group in groups])
    return names, np.where(member, y[:, None], np.nan), s


def _column(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).reshape(-1, 1)

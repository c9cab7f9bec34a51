"""Subgroups of patients or images: whether a model ranks, over-calls and misses alike in all of them.

Every subgroup is judged at one global threshold, as it would be in use. A subgroup needs 20 positives and 20 negatives,
else it is "insufficient"; one with a count from 1 to 9 shows no counts. (Where one alone does, a total published
elsewhere gives it away by subtraction: do not print totals beside.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

__all__ = [
    "GAPS",
    "MINIMUM_SUPPORT",
    "SMALLEST_SHOWN",
    "LabelSubgroups",
    "Subgroup",
    "Subgroups",
    "label_subgroup_estimates",
    "subgroup_estimates",
    "underdiagnosis",
]

Floats = NDArray[np.float64]
Pair = tuple[str, int, int]  # a rate, and the columns of its highest and lowest value
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


class LabelSubgroups(NamedTuple):
    """The subgroups of one attribute for each label, and the means of the gaps over labels, by `GAPS`."""

    labels: dict[str, Subgroups]
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
    """`label_subgroup_estimates` of one label: truth and scores of shape (n,), and its threshold."""
    if np.isnan(threshold):
        raise ValueError("Expected a threshold, but got NaN.")
    y, s = (np.asarray(one, dtype=np.float64).reshape(-1, 1) for one in (y_true, score))
    found = label_subgroup_estimates(
        y, s, groups, studies, keys=["label"], thresholds=[threshold], resamples=resamples, seed=seed
    )
    return found.labels["label"]


def label_subgroup_estimates(
    y_true: ArrayLike,
    score: ArrayLike,
    groups: Sequence[str | None],
    studies: ArrayLike,
    *,
    keys: Sequence[str],
    thresholds: Sequence[float],
    reasons: Sequence[str | None] | None = None,
    averaged: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> LabelSubgroups:
    """AUROC, false positive and false negative rate per label and subgroup, and how far apart the subgroups are.

    A gap is the highest value less the lowest; `between` in its `extra` names the two. In the resamples these two stay
    the same, so that an interval of a gap that is noise reaches below 0. With more than two subgroups it does not know
    that they were picked as the furthest apart. The equalised odds difference is the greater of the gaps of true and of
    false positive rates. Means are over the labels that have the gap.

    Args:
        y_true: 1, 0, or NaN where unlabelled, shape (n, labels).
        score: any real scale, higher means more likely 1, shape (n, labels).
        groups: the value of the attribute, None where it is unknown; these items are left out, (n,).
        studies: the study of each item, (n,).
        keys: the labels' names, (labels,).
        thresholds: score from which on an item is called positive, the same for all subgroups, chosen on validation,
            (labels,); NaN: none, and then no rates.
        reasons: why a label has no threshold, (labels,).
        averaged: the labels that the means are over; None: all.
        resamples: number of resamples.
        seed: the same for all that is to be compared.

    Source: Hardt et al. 2016, arXiv 1610.02413; the difference is defined as in fairlearn's equalized_odds_difference.
    """
    y, s = checked_labels(y_true, studies, keys, score)
    if np.isnan(s[~np.isnan(y)]).any():
        raise ValueError("Expected scores that are numbers, but got NaN for a labelled item.")
    names, member = _members(groups, len(y))
    cells = [_Cell(j, g, np.where(member[:, g], y[:, j], np.nan)) for j in range(len(keys)) for g in range(len(names))]
    enough = [cell for cell in cells if min(cell.counts) >= MINIMUM_SUPPORT]
    cuts = np.asarray(thresholds, dtype=np.float64)
    # What is insufficient is not resampled.
    table = _table(enough, s, cuts, studies, resamples, seed) if enough else None
    ids = np.asarray(studies)
    labels: dict[str, Subgroups] = {}
    pairs: dict[str, dict[str, Pair]] = {}
    for j, key in enumerate(keys):
        why = reasons[j] if reasons else None
        columns = {names[cell.group]: place for place, cell in enumerate(enough) if cell.label == j}
        rows = []
        for cell in cells[j * len(names) : (j + 1) * len(names)]:
            name = names[cell.group]
            if table is not None and name in columns:
                rows.append(_sufficient(table, columns[name], name, cell, s[:, j], ids, why))
            else:
                rows.append(_insufficient(name, *cell.counts))
        pairs[key] = {} if table is None or len(columns) < 2 else _pairs(table, list(columns.values()))
        labels[key] = Subgroups(tuple(rows), _gaps(table, pairs[key], columns, why))
    return LabelSubgroups(labels, _mean_gaps(table, {key: pairs[key] for key in averaged or keys}, len(y)))


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
        groups: see `label_subgroup_estimates`, as all others.
        studies: the study of each item, (n,).
        threshold: of No Finding.
        resamples: number of resamples.
        seed: the same for all that is to be compared.

    Source: Seyyed-Kalantari et al. 2021, Nat. Med. 27: the false positive rate of No Finding.
    """
    found = subgroup_estimates(no_finding, score, groups, studies, threshold=threshold, resamples=resamples, seed=seed)
    rates = {f"underdiagnosis_{group.name}": group.fpr for group in found.groups}
    return {**rates, "underdiagnosis_gap": found.gaps["fpr_gap"]}


@dataclass(frozen=True)
class _Cell:
    """One label in one subgroup; truth is NaN outside of it, (n,)."""

    label: int
    group: int
    truth: Floats

    @property
    def counts(self) -> tuple[int, int]:
        """Positives and negatives."""
        return int((self.truth == 1).sum()), int((self.truth == 0).sum())


def _table(cells: Sequence[_Cell], s: Floats, cuts: Floats, studies: ArrayLike, resamples: int, seed: int) -> PerLabel:
    """The rates of each cell."""
    truth = np.stack([cell.truth for cell in cells], axis=1)
    of_label = [cell.label for cell in cells]
    called, usable = s[:, of_label] >= cuts[of_label], ~np.isnan(cuts[of_label])
    negative, positive = (truth == 0) & usable, (truth == 1) & usable
    parts = [part.astype(np.float64) for part in (negative & called, negative, positive & ~called, positive)]
    rankings = [WeightedRanking(cell.truth, s[:, cell.label], known=~np.isnan(cell.truth)) for cell in cells]

    def statistic(weights: Weights) -> Floats:
        false_alarms, negatives, missed, positives = (weights @ part for part in parts)
        areas = np.stack([ranking(weights).auroc for ranking in rankings], axis=1)
        return np.stack([areas, ratio_or_nan(false_alarms, negatives), ratio_or_nan(missed, positives)], axis=1)

    names = [f"{cell.label} {cell.group}" for cell in cells]
    fixed = "threshold held fixed"
    return PerLabel(statistic, truth, studies, names, RATES, fixed=fixed, resamples=resamples, seed=seed)


def _sufficient(
    table: PerLabel, column: int, name: str, cell: _Cell, s: Floats, ids: NDArray[np.generic], why: str | None
) -> Subgroup:
    positives, negatives = cell.counts
    inside = ~np.isnan(cell.truth)
    auroc = auroc_estimate(cell.truth[inside], s[inside], ids[inside])
    fpr = table.single("fpr", column, why=why, trials=len(np.unique(ids[cell.truth == 0])))
    fnr = table.single("fnr", column, why=why, trials=len(np.unique(ids[cell.truth == 1])))
    return Subgroup(name, positives + negatives, positives, negatives, auroc, fpr, fnr)


def _pairs(table: PerLabel, columns: Sequence[int]) -> dict[str, Pair]:
    """Gap -> the rate, and the columns with its highest and its lowest value; without those that have no rates."""
    pairs: dict[str, Pair] = {}
    for row, rate in enumerate(RATES):
        values = table.values[row, columns]
        if not np.isnan(values).any():
            pairs[f"{rate}_gap"] = rate, columns[int(np.argmax(values))], columns[int(np.argmin(values))]
    if "fpr_gap" in pairs:
        # The gap of true positive rates is that of false negative rates.
        pairs["equalized_odds_difference"] = max(
            (pairs["fpr_gap"], pairs["fnr_gap"]),
            key=lambda pair: table.values[RATES.index(pair[0]), pair[1]] - table.values[RATES.index(pair[0]), pair[2]],
        )
    return pairs


def _gaps(
    table: PerLabel | None, pairs: Mapping[str, Pair], columns: Mapping[str, int], why: str | None
) -> dict[str, Estimate]:
    """The gaps of one label, between its sufficient subgroups."""
    if table is None or len(columns) < 2:
        support = f"{MINIMUM_SUPPORT} positives and {MINIMUM_SUPPORT} negatives"
        nothing = Estimate.undefined(f"insufficient: {len(columns)} subgroup(s) with {support}, 2 are needed", n=0)
        return dict.fromkeys(GAPS, nothing)
    names = {column: name for name, column in columns.items()}
    gaps = dict.fromkeys(GAPS, Estimate.undefined(why or "no threshold", n=0))
    for gap, (rate, high, low) in pairs.items():
        extra = {"between": [names[high], names[low]], "subgroups": len(columns)}
        gaps[gap] = table.difference(rate, high, low, extra=extra)
    return gaps


def _mean_gaps(table: PerLabel | None, pairs: Mapping[str, Mapping[str, Pair]], n: int) -> dict[str, Estimate]:
    """The means over labels; `labels` in `extra` names them."""
    means = {}
    for gap in GAPS:
        having = {key: its[gap] for key, its in pairs.items() if gap in its}
        if table is None or not having:
            support = f"{MINIMUM_SUPPORT} positives and {MINIMUM_SUPPORT} negatives"
            what = "" if gap == "auroc_gap" else " and a threshold"
            means[gap] = Estimate.undefined(f"no label has two subgroups of {support}{what}", n=n)
        else:
            means[gap] = table.mean_difference(list(having.values()), extra={"labels": list(having)})
    return means


def _insufficient(name: str, positives: int, negatives: int) -> Subgroup:
    """A subgroup without rates, and without counts where one of them is too small to show."""
    small = any(0 < count < SMALLEST_SHOWN for count in (positives, negatives))
    reason = f"insufficient: fewer than {MINIMUM_SUPPORT} positives or negatives"
    if small:
        nothing = Estimate.undefined(f"{reason}, one count below {SMALLEST_SHOWN} and therefore none shown", n=0)
        return Subgroup(name, None, None, None, nothing, nothing, nothing)
    nothing = Estimate.undefined(reason, n=positives + negatives, positives=positives)
    return Subgroup(name, positives + negatives, positives, negatives, nothing, nothing, nothing)


def _members(groups: Sequence[str | None], n: int) -> tuple[list[str], NDArray[np.bool_]]:
    """Names of the subgroups, and which items are in which, (n, subgroups)."""
    if len(groups) != n:
        raise ValueError(f"Expected a subgroup or None for each of {n} items, but got {len(groups)}.")
    names = sorted({group for group in groups if group is not None})
    if not names:
        raise ValueError("Expected a subgroup for some item, but all are None.")
    return names, np.array([[group == name for name in names] for group in groups])

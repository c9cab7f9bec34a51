"""Consistency of decisions when inputs are perturbed, and whether they depend on the image at all.

A model that never looks at the image never changes its mind: few flips are worth something only beside the reliance on
the image. So both come together, and as the four quadrants of consistent x reliant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from medvlm_harness.metrics._arrays import ratio_or_nan, row_means
from medvlm_harness.metrics.bootstrap import Weights, resample, sampled_estimate
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.robustness import CLEAN

__all__ = [
    "QUADRANTS",
    "UNKNOWN",
    "consistency_estimates",
    "consistency_names",
    "decide",
    "score_change_estimates",
    "score_change_names",
]

Floats = NDArray[np.float64]
UNKNOWN = -1
LEAST_VARIANCE = 1e-6  # of ranks that differ it is at least 1 / (4n); less is rounding
QUADRANTS = ("consistent_reliant", "consistent_unreliant", "inconsistent_reliant", "inconsistent_unreliant")
"""The second is the dangerous one: always the same answer, whoever's image it is."""


def decide(scores: ArrayLike, thresholds: ArrayLike) -> NDArray[np.int8]:
    """Decisions as below: 1 from the label's threshold on, else 0; -1 where a label has none (NaN).

    Args:
        scores: shape (n, labels).
        thresholds: chosen on validation, (labels,).

    >>> decide([[0.2, 0.2], [0.7, 0.7]], [0.7, float("nan")]).tolist()
    [[0, -1], [1, -1]]
    """
    s, cuts = np.asarray(scores, dtype=np.float64), np.asarray(thresholds, dtype=np.float64)
    return np.where(np.isnan(cuts), UNKNOWN, s >= cuts).astype(np.int8)


def consistency_names(variants: Sequence[str], substitutes: Sequence[str] = ()) -> tuple[str, ...]:
    """The keys of `consistency_estimates`, in its order.

    >>> consistency_names(["blur"], ["other"])[:5]
    ('flip_rate', 'flip_rate_any', 'pairwise_consistency', 'flip_rate_blur', 'reliance_other')
    """
    flips = ("flip_rate", "flip_rate_any", "pairwise_consistency", *(f"flip_rate_{one}" for one in variants))
    return (*flips, *(f"reliance_{one}" for one in substitutes), *(QUADRANTS if substitutes else ()))


def consistency_estimates(
    decisions: Mapping[str, ArrayLike],
    study_ids: ArrayLike,
    *,
    keys: Sequence[str],
    substitutes: Sequence[str] = (),
    gates: Sequence[str] = ("other",),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Flip rates, reliance on the image and the quadrants; by `consistency_names`.

    All are shares of decisions, per label and then the mean over labels. A decision that is unknown under one of the
    conditions that a share compares is left out of it. Shares of 0 and 1 have Wilson's interval over studies.

    Names:
        flip_rate_{variant}: differs from clean; flip_rate: mean over variants; flip_rate_any: under one or more.
        pairwise_consistency: share of pairs of conditions, clean and variants, that agree.
        reliance_{substitute}: differs from clean when that takes the image's place. Floor 0: the image is not looked
            at. Ceiling 2p(1-p), with p the share of positive decisions on clean images: what an independent image
            would change. It is no strict bound: a blank image may change all.
        {consistent, inconsistent}_{reliant, unreliant}: consistent: no variant flips it; reliant: a gate changes it.
            They sum to 1. Few decisions change where few are positive, even for a model that decides by the image
            alone, so read them beside floor and ceiling: what a model that ignores the image has, and what one has
            whose decisions are independent from image to image and never flip.

    Args:
        decisions: condition -> 1, 0, or -1 where unknown, shape (n, labels); `clean` first, then variants and
            substitutes.
        study_ids: the study of each row, (n,).
        keys: the labels' names, (labels,).
        substitutes: which of the conditions put something in the image's place; the others are variants.
        gates: which of these decide what is reliant, any of them; usually another patient's image alone.
        resamples: number of resamples.
        seed: the same for all that is to be compared.

    Source: of the quadrants, arXiv 2603.20985; defined here for decisions at a threshold.
    """
    table = _checked(decisions, study_ids, keys)
    if not all(np.isin(one, (0, 1, UNKNOWN)).all() for one in table.values()):
        raise ValueError("Expected decisions that are 1, 0 or -1, but got others.")
    if substitutes and not (gates and set(gates) <= set(substitutes) <= set(list(table)[1:])):
        raise ValueError(
            f"Expected gates among the substitutes, and these among the conditions {list(table)[1:]}, but got gates "
            f"{list(gates)} and substitutes {list(substitutes)}."
        )
    variants = [name for name in list(table)[1:] if name not in substitutes]
    if not variants:
        raise ValueError(f"Expected a variant to compare with {CLEAN}, but got {list(table)} alone.")
    ids, names = np.asarray(study_ids), consistency_names(variants, substitutes)
    if len(set(names)) < len(names):
        raise ValueError(f"Expected no variant that is called any, for that is a name of a mean, but got {variants}.")
    if not len(ids):
        return dict.fromkeys(names, Estimate.undefined("no item", n=0))
    shares = _shares(table, variants, substitutes, gates)
    part, whole = (np.hstack(its).astype(np.float64) for its in zip(*shares.values(), strict=True))

    def statistic(weights: Weights) -> Floats:
        of_labels = ratio_or_nan(weights @ part, weights @ whole).reshape(-1, len(keys))
        means = row_means(of_labels).reshape(len(weights), len(shares))
        flips = means[:, [list(shares).index(f"flip_rate_{one}") for one in variants]]
        return np.column_stack([flips.mean(axis=1), means])

    value = statistic(np.ones((1, len(ids))))[0]
    samples = resample(statistic, ids, resamples=resamples, seed=seed)
    known = {name: its for name, (_, its) in shares.items()}
    known["flip_rate"] = np.logical_or.reduce([known[f"flip_rate_{one}"] for one in variants])
    ends = _ends(table[CLEAN], substitutes)
    estimates = {}
    for column, name in enumerate(["flip_rate", *shares]):
        floor, ceiling = ends.get(name, (None, None))
        estimates[name] = sampled_estimate(
            float(value[column]),
            samples[:, column],
            n=int(known[name].any(axis=1).sum()),
            seed=seed,
            floor=floor,
            ceiling=ceiling,
            trials=len(np.unique(ids[known[name].any(axis=1)])),
            why="no decision is known under all conditions that are compared",
            extra={
                "labels": [key for key, its in zip(keys, known[name].T, strict=True) if its.any()],
                "known_decisions": float(known[name].mean()),
            },
        )
    return {name: estimates[name] for name in names}


def score_change_names(conditions: Sequence[str]) -> tuple[str, ...]:
    """The keys of `score_change_estimates` for conditions other than clean, in its order.

    >>> score_change_names(["blur"])
    ('score_change_blur', 'rank_correlation_blur')
    """
    return tuple(f"{metric}_{one}" for metric in ("score_change", "rank_correlation") for one in conditions)


def score_change_estimates(
    scores: Mapping[str, ArrayLike],
    study_ids: ArrayLike,
    *,
    keys: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """How far scores move from clean, under each other condition; by `score_change_names`.

    `score_change` is the mean absolute change, on the scale of the scores. `rank_correlation` is Spearman's of clean
    scores and those under the condition, with mean ranks for ties; a label whose scores are all equal has none. Both
    are means over labels. The resamples hold the ranks fixed; at 300 normal items the standard error is right to 1% up
    to a correlation of 0.5, and 8% too small at 0.95.

    Args:
        scores: condition -> numbers, shape (n, labels); `clean` first.
        study_ids: the study of each row, (n,).
        keys: the labels' names, (labels,).
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    table = _checked(scores, study_ids, keys)
    if not all(np.isfinite(one).all() for one in table.values()):
        raise ValueError("Expected scores that are finite numbers, but got NaN or infinite ones.")
    others = list(table)[1:]
    names = score_change_names(others)
    n, labels = len(table[CLEAN]), len(keys)
    if not n:
        return dict.fromkeys(names, Estimate.undefined("no item", n=0))
    change = np.column_stack([np.abs(table[one] - table[CLEAN]).mean(axis=1) for one in others])
    # Ranks of the sample in every resample: ranked anew, repeated items would be ties, which lower the correlation.
    ranks = np.hstack([rankdata(one, axis=0) - (n + 1) / 2 for one in table.values()])
    squares, products = ranks**2, np.tile(ranks[:, :labels], len(others)) * ranks[:, labels:]

    def statistic(weights: Weights) -> Floats:
        total = weights.sum(axis=1, keepdims=True)
        mean = weights @ ranks / total
        variance = weights @ squares / total - mean**2
        variance[variance < LEAST_VARIANCE] = 0
        clean_mean, clean_variance = (np.tile(one[:, :labels], len(others)) for one in (mean, variance))
        covariance = weights @ products / total - clean_mean * mean[:, labels:]
        correlation = ratio_or_nan(covariance, np.sqrt(clean_variance * variance[:, labels:]))
        of_conditions = row_means(correlation.reshape(-1, labels)).reshape(len(weights), len(others))
        return np.hstack([weights @ change / total, of_conditions])

    value = statistic(np.ones((1, n)))[0]
    samples = resample(statistic, study_ids, resamples=resamples, seed=seed)
    return {
        name: sampled_estimate(
            float(value[column]), samples[:, column], n=n, seed=seed, why="each label's scores are all equal"
        )
        for column, name in enumerate(names)
    }


def _shares(
    table: Mapping[str, Floats], variants: Sequence[str], substitutes: Sequence[str], gates: Sequence[str]
) -> dict[str, tuple[Floats | NDArray[np.bool_], NDArray[np.bool_]]]:
    """Name -> what each decision (n, labels) adds to the share, and whether it counts."""

    def known(names: Sequence[str]) -> NDArray[np.bool_]:
        return np.asarray(np.logical_and.reduce([table[name] != UNKNOWN for name in names]))

    changed = {name: (table[name] != table[CLEAN]) & known([CLEAN, name]) for name in (*variants, *substitutes)}
    in_all = known([CLEAN, *variants])
    flipped = np.logical_or.reduce([changed[name] for name in variants])
    positive = np.sum([table[name] == 1 for name in (CLEAN, *variants)], axis=0)
    conditions = 1 + len(variants)
    # Of m answers k positive: pairs of equal ones over all pairs.
    agreeing = (positive * (positive - 1) + (conditions - positive) * (conditions - positive - 1)) / (
        conditions * (conditions - 1)
    )
    shares: dict[str, tuple[Floats | NDArray[np.bool_], NDArray[np.bool_]]] = {
        "flip_rate_any": (flipped & in_all, in_all),
        "pairwise_consistency": (agreeing * in_all, in_all),
        **{f"flip_rate_{one}": (changed[one], known([CLEAN, one])) for one in variants},
        **{f"reliance_{one}": (changed[one], known([CLEAN, one])) for one in substitutes},
    }
    if substitutes:
        here = in_all & known(gates)
        reliant = np.logical_or.reduce([changed[name] for name in gates])
        cells = (~flipped & reliant, ~flipped & ~reliant, flipped & reliant, flipped & ~reliant)
        shares |= {name: (cell & here, here) for name, cell in zip(QUADRANTS, cells, strict=True)}
    return shares


def _ends(clean: Floats, substitutes: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Name -> floor and ceiling: of a model that ignores the image, and of one that answers by the image alone."""
    rates = [float((column == 1).sum() / (column != UNKNOWN).sum()) for column in clean.T if (column != UNKNOWN).any()]
    if not rates or not substitutes:
        return {}
    independent = float(np.mean([2 * p * (1 - p) for p in rates]))
    return {
        **{f"reliance_{one}": (0.0, independent) for one in substitutes},
        "consistent_reliant": (0.0, independent),
        "consistent_unreliant": (1.0, 1 - independent),
    }


def _checked(table: Mapping[str, ArrayLike], study_ids: ArrayLike, keys: Sequence[str]) -> dict[str, Floats]:
    if len(table) < 2 or next(iter(table)) != CLEAN:
        raise ValueError(f"Expected {CLEAN} first and other conditions after it, but got {list(table)}.")
    arrays = {name: np.asarray(one, dtype=np.float64) for name, one in table.items()}
    shape = len(np.asarray(study_ids)), len(keys)
    if wrong := {name: one.shape for name, one in arrays.items() if one.shape != shape}:
        raise ValueError(f"Expected arrays of shape (n, labels) = {shape}, but got {wrong}.")
    return arrays

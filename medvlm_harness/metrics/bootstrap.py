"""Bootstrap over studies: integer weights per item, shared by all labels and metrics of a task, so differences pair.

A metric takes part by accepting a block of weights, shape (resamples, n), and answering one value per row.
Weights instead of resampled items: everything that is sorted or counted once stays valid for all resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import checked_weights, ratio_or_nan, running_sum
from medvlm_harness.metrics.estimate import Estimate

__all__ = [
    "PercentileInterval",
    "bootstrap_columns",
    "bootstrap_estimate",
    "bootstrap_means",
    "percentile_interval",
    "resample",
    "sampled_estimate",
    "standard_error",
    "study_weights",
    "weight_blocks",
    "weighted_mean",
    "weighted_median",
    "wilson_at_end",
]

# Large enough for few steps in Python, small enough for memory that does not grow with the number of items.
_BLOCK_BYTES = 16 * 2**20
_KEPT_BYTES = 64 * 2**20
Z_975 = 1.959964

Weights = NDArray[np.float64]
"""How often each item is in each resample: whole numbers, shape (resamples, n)."""


class PercentileInterval(NamedTuple):
    """Percentiles of the resampled values that are defined."""

    low: float
    high: float
    undefined: float  # share of resamples without a value, in [0, 1]


def study_weights(study_ids: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Weights:
    """How often each item is in each resample; studies are drawn with replacement, all items of a study together.

    The weights of a study depend on nothing but the set of study ids, the seed and the number of the resample: items
    may come in any order, and more resamples leave the earlier ones as they were. Ids are compared as strings.

    Args:
        study_ids: the study of each item, shape (n,).
        resamples: number of rows.
        seed: at least 0.

    Returns:
        Shape (resamples, n); a row's weights sum to the number of studies if each has one item. Many items: use
        `weight_blocks`.

    Source: cluster bootstrap, Field and Welsh 2007, J. R. Stat. Soc. B 69(3).
    """
    return np.concatenate(list(weight_blocks(study_ids, resamples=resamples, seed=seed)))


def weight_blocks(study_ids: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Iterator[Weights]:
    """The rows of `study_weights` in order, in blocks of at most 16 MB."""
    studies, item = _studies(study_ids)
    if resamples < 1 or seed < 0:
        raise ValueError(f"Expected resamples >= 1 and seed >= 0, but got {resamples} and {seed}.")
    return _blocks(studies, item, resamples, seed)


def resample(
    statistic: Callable[[Weights], NDArray[np.float64]],
    study_ids: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """A statistic on every resample: it maps weights (b, n) to values (b, ...); the result is (resamples, ...)."""
    return np.concatenate([statistic(block) for block in weight_blocks(study_ids, resamples=resamples, seed=seed)])


def bootstrap_estimate(
    statistic: Callable[[Weights], NDArray[np.float64]],
    study_ids: ArrayLike,
    *,
    positives: int | None = None,
    floor: float | None = None,
    ceiling: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """The statistic on the items as they are, with standard error and percentile interval over studies.

    Args:
        statistic: maps integer weights (b, n) to one value per row, (b,); NaN where undefined.
        study_ids: the study of each item, shape (n,).
        positives: passed on, as are floor and ceiling.
        floor: see `Estimate`.
        ceiling: see `Estimate`.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    n = len(np.asarray(study_ids))
    if n == 0:
        return Estimate.undefined("no item", n=0, positives=positives)
    value = float(statistic(np.ones((1, n)))[0])
    if np.isnan(value):
        return Estimate.undefined("undefined on these items", n=n, positives=positives)
    samples = resample(statistic, study_ids, resamples=resamples, seed=seed)
    return sampled_estimate(value, samples, n=n, positives=positives, floor=floor, ceiling=ceiling, seed=seed)


def bootstrap_columns(
    statistic: Callable[[Weights], NDArray[np.float64]],
    study_ids: ArrayLike,
    *,
    positives: Sequence[int | None],
    floors: Sequence[float | None] | None = None,
    extras: Sequence[Mapping[str, Any]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Estimate]:
    """`bootstrap_estimate` of several statistics that share their counts: it maps weights (b, n) to (b, columns).

    Args:
        statistic: as there, with NaN where a column is undefined.
        study_ids: the study of each item, shape (n,).
        positives: see `Estimate`, one per column.
        floors: see `Estimate`, one per column.
        extras: added to each estimate's `extra`, one per column.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    n = len(np.asarray(study_ids))
    values = statistic(np.ones((1, n)))[0] if n else np.full(len(positives), np.nan)
    samples = resample(statistic, study_ids, resamples=resamples, seed=seed) if n else np.empty((0, len(positives)))
    return [
        sampled_estimate(
            value,
            samples[:, column],
            n=n,
            seed=seed,
            positives=support,
            floor=floors[column] if floors else None,
            why="undefined on these items" if n else "no item",
            extra=extras[column] if extras else None,
        )
        for column, (value, support) in enumerate(zip(values.tolist(), positives, strict=True))
    ]


def bootstrap_means(
    values: ArrayLike,
    study_ids: ArrayLike,
    *,
    floors: Sequence[float],
    ceilings: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
) -> list[Estimate]:
    """`bootstrap_estimate` of the means of several columns at once, with one product per block.

    Args:
        values: no NaN, shape (n, columns).
        study_ids: the study of each item, shape (n,).
        floors: see `Estimate`, one per column.
        ceilings: see `Estimate`, one per column.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    v = np.asarray(values, dtype=np.float64)
    if len(v) == 0:
        return [Estimate.undefined("no item", n=0) for _ in floors]
    samples = resample(lambda w: w @ v / w.sum(axis=1, keepdims=True), study_ids, resamples=resamples, seed=seed)
    return [
        sampled_estimate(float(mean), column, n=len(v), floor=floor, ceiling=ceiling, seed=seed)
        for mean, column, floor, ceiling in zip(v.mean(axis=0), samples.T, floors, ceilings, strict=True)
    ]


def sampled_estimate(
    value: float,
    samples: NDArray[np.float64],
    *,
    n: int,
    seed: int,
    positives: int | None = None,
    floor: float | None = None,
    ceiling: float | None = None,
    trials: int | None = None,
    why: str = "undefined on these items",
    extra: Mapping[str, Any] | None = None,
) -> Estimate:
    """A value with standard error and percentile interval from its resampled values.

    Args:
        value: NaN where it is undefined.
        samples: the same on each resample, (resamples,).
        n: see `Estimate`, as positives, floor, ceiling and extra.
        seed: what the resamples were drawn with.
        positives: see `Estimate`.
        floor: see `Estimate`.
        ceiling: see `Estimate`.
        trials: for a share, of how many studies: at 0 and 1 the interval is Wilson's, see `wilson_at_end`.
        why: the reason if it is undefined.
        extra: see `Estimate`.
    """
    if np.isnan(value):
        return replace(Estimate.undefined(why, n=n, positives=positives), extra=dict(extra or {}))
    if trials and value in (0, 1):
        stderr, ends = wilson_at_end(value, trials)
        method = f"Wilson over {trials} studies, since all resamples agree"
        return Estimate(value, stderr, ends, n, positives, floor, ceiling, method, extra=dict(extra or {}))
    low, high, undefined = percentile_interval(samples)
    return Estimate(
        value=value,
        stderr=standard_error(samples),
        ci95=(low, high),
        n=n,
        positives=positives,
        floor=floor,
        ceiling=ceiling,
        method=f"bootstrap over studies, {len(samples)} resamples, seed {seed}, percentile",
        reason=f"undefined on {undefined:.1%} of the resamples" if undefined else None,
        extra={**(extra or {}), "undefined_resamples": undefined},
    )


def wilson_at_end(value: float, trials: int) -> tuple[float, tuple[float, float]]:
    """Standard error and Wilson's 95% interval of a share of none or all of the trials, `value` 0 or 1.

    There all resamples agree, and an interval without width would claim certainty.
    """
    reach = Z_975**2 / (trials + Z_975**2)
    return reach / (2 * Z_975), ((0.0, reach) if value == 0 else (1 - reach, 1.0))


def percentile_interval(samples: ArrayLike, level: float = 0.95) -> PercentileInterval:
    """The middle `level` of the defined resampled values, and the share of undefined (NaN) ones.

    Args:
        samples: one value per resample, shape (resamples,).
        level: in (0, 1).

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"Expected samples of shape (resamples,) with at least one, but got {values.shape}.")
    if not 0 < level < 1:
        raise ValueError(f"Expected level in (0, 1), but got {level}.")
    defined = values[~np.isnan(values)]
    undefined = 1 - defined.size / values.size
    if defined.size == 0:
        return PercentileInterval(np.nan, np.nan, undefined)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return PercentileInterval(float(low), float(high), undefined)


def standard_error(samples: ArrayLike) -> float:
    """Standard deviation of the defined resampled values; NaN if fewer than two are defined."""
    values = np.asarray(samples, dtype=np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.std(ddof=1)) if defined.size > 1 else float("nan")


def weighted_mean(values: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """Mean of the defined (not NaN) values, one per row of weights; NaN where these have no weight.

    Args:
        values: shape (n,).
        weights: at least 0, shape (resamples, n).
    """
    v, w = _values_and_weights(values, weights)
    known = ~np.isnan(v)
    return ratio_or_nan(w @ np.where(known, v, 0), w @ known.astype(np.float64))


def weighted_median(values: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """Median of the defined values, each repeated as often as its weight says; one per row of weights.

    As `np.median`: of an even number of values the mean of the middle two. NaN where the defined values have no weight.

    Args:
        values: shape (n,).
        weights: integers, at least 0, shape (resamples, n).
    """
    v, w = _values_and_weights(values, weights)
    order = np.argsort(v, kind="stable")[: np.count_nonzero(~np.isnan(v))]  # NaN sorts last
    if order.size == 0:
        return np.full(len(w), np.nan)
    upto = running_sum(w.T[order])[1:]
    half = upto[-1] / 2
    middle = v[order[np.argmax(upto >= half, axis=0)]] + v[order[np.argmax(upto > half, axis=0)]]
    return np.where(half > 0, middle / 2, np.nan)


def _blocks(studies: int, item: NDArray[np.intp], resamples: int, seed: int) -> Iterator[Weights]:
    rows = max(1, _BLOCK_BYTES // (8 * item.size))
    kept = _times_drawn(studies, 0, resamples, seed) if 2 * studies * resamples <= _KEPT_BYTES else None
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = _draw(studies, start, count, seed) if kept is None else kept[:, start : start + count]
        # The items of a resample lie apart in memory: what takes items in another order copies whole rows.
        yield drawn[item].astype(np.float64).T


def _draw(studies: int, start: int, rows: int, seed: int) -> NDArray[np.int16]:
    """How often each study is in each resample from `start` on, shape (studies, rows)."""
    times = np.empty((studies, rows), dtype=np.int16)
    for row in range(rows):
        # One generator per resample: neither the size of a block nor the number of resamples changes a draw.
        drawn = np.random.default_rng((seed, start + row)).integers(studies, size=studies)
        times[:, row] = np.bincount(drawn, minlength=studies)
    times.setflags(write=False)
    return times


_times_drawn = lru_cache(maxsize=2)(_draw)  # the metrics of a task ask for the same ones, one after the other


def _studies(study_ids: ArrayLike) -> tuple[int, NDArray[np.intp]]:
    ids = np.asarray(study_ids)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"Expected study_ids of shape (n,) with n > 0, but got {ids.shape}.")
    if any(one is None or one != one for one in ids.tolist()):
        raise ValueError("Expected a study id for each item, but got None or NaN.")
    names, item = np.unique(ids.astype(np.str_), return_inverse=True)
    return len(names), item


def _values_and_weights(values: ArrayLike, weights: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1:
        raise ValueError(f"Expected values of shape (n,), but got {v.shape}.")
    return v, checked_weights(weights, v.size)

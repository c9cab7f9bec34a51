"""Several metrics of several labels, each with its interval, from one set of resamples; and their means over labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import row_means
from medvlm_harness.metrics.bootstrap import Weights, percentile_interval, resample, standard_error, wilson_at_end
from medvlm_harness.metrics.estimate import Estimate

__all__ = ["PerLabel", "checked_labels"]

Floats = NDArray[np.float64]


def checked_labels(y_true: ArrayLike, studies: ArrayLike, keys: Sequence[str], *others: ArrayLike) -> list[Floats]:
    """Truth and further arrays of its shape (n, labels) as float64, or ValueError.

    Args:
        y_true: 1, 0, or NaN where unlabelled.
        studies: the study of each row, (n,).
        keys: the labels' names, (labels,).
        others: scores, probabilities and the like; what they hold is for the caller to check.
    """
    y = np.asarray(y_true, dtype=np.float64)
    rest = [np.asarray(one, dtype=np.float64) for one in others]
    if y.ndim != 2 or y.shape != (len(np.asarray(studies)), len(keys)) or any(one.shape != y.shape for one in rest):
        shapes = ", ".join(str(one.shape) for one in (y, *rest))
        raise ValueError(
            f"Expected arrays of shape (n, labels) for {len(np.asarray(studies))} studies and {len(keys)} keys, "
            f"but got {shapes}."
        )
    if not np.isin(y[~np.isnan(y)], (0, 1)).all():
        raise ValueError(f"Expected y_true to hold only 0, 1 and NaN, but got {np.unique(y)[:5]}.")
    return [y, *rest]


class PerLabel:
    """Each metric of each label on the items as they are and on every resample.

    Args:
        statistic: weights (b, n) to values (b, metrics, labels); NaN where undefined.
        y_true: 1, 0, or NaN where unlabelled, shape (n, labels); counts come from here.
        studies: the study of each row, (n,).
        keys: the labels' names, (labels,).
        metrics: the metrics' names, in the order of the statistic.
        fixed: what the resamples hold fixed, for `method`.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """

    def __init__(
        self,
        statistic: Callable[[Weights], Floats],
        y_true: Floats,
        studies: ArrayLike,
        keys: Sequence[str],
        metrics: Sequence[str],
        *,
        fixed: str = "",
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        self.keys, self.metrics = tuple(keys), tuple(metrics)
        self.positives, self.negatives = (y_true == 1).sum(axis=0), (y_true == 0).sum(axis=0)
        self.prevalence = self.positives / np.maximum(self.positives + self.negatives, 1)
        self.rows = len(y_true)
        if self.rows:
            self.values = statistic(np.ones((1, self.rows)))[0]
            self.samples = resample(statistic, studies, resamples=resamples, seed=seed)
        else:
            self.values = np.full((len(metrics), len(keys)), np.nan)
            self.samples = np.full((1, len(metrics), len(keys)), np.nan)
        self.method, self.fixed = f"bootstrap over studies, {resamples} resamples, seed {seed}", fixed and f"; {fixed}"

    def single(
        self,
        metric: str,
        label: int,
        *,
        floor: float | None = None,
        ceiling: float | None = None,
        why: str | None = None,
        minimum: int = 0,
        recentred: bool = False,
        trials: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Estimate:
        """One metric of one label.

        Args:
            metric: its name.
            label: its column.
            floor: see `Estimate`.
            ceiling: see `Estimate`.
            why: the reason if it is undefined, where that is more than what the counts say.
            minimum: positives, and negatives, below which the reason says that macros leave it out.
            recentred: for distances, see `_estimate`.
            trials: for a share, of how many studies: at 0 and 1 all resamples agree, and the interval is
                Wilson's, because one without width would claim certainty.
            extra: see `Estimate`.
        """
        row = self.metrics.index(metric)
        value = float(self.values[row, label])
        positives, negatives = int(self.positives[label]), int(self.negatives[label])
        n = positives + negatives
        if np.isnan(value):
            reason = why or f"undefined with {positives} positives and {negatives} negatives"
            return Estimate.undefined(reason, n=n, positives=positives)
        few = min(positives, negatives) < minimum
        note = f"fewer than {minimum} positives or negatives: left out of macros" if few else None
        if trials and value in (0, 1):
            stderr, ends = wilson_at_end(value, trials)
            method = f"Wilson over {trials} studies, since all resamples agree{self.fixed}"
            return Estimate(value, stderr, ends, n, positives, floor, ceiling, method, note, dict(extra or {}))
        samples = self.samples[:, row, label]
        return self._estimate(value, samples, n, positives, floor, ceiling, note, recentred, extra or {})

    def macro(
        self,
        metric: str,
        labels: Sequence[int],
        *,
        minimum: int,
        floors: ArrayLike | None = None,
        ceiling: float | None = None,
        recentred: bool = False,
    ) -> Estimate:
        """The mean over those of the labels that have a value and at least `minimum` positives and negatives.

        Args:
            metric: its name.
            labels: their columns.
            minimum: positives, and negatives, that a label needs.
            floors: one per label of the set, (all labels,); their mean is the floor.
            ceiling: see `Estimate`.
            recentred: for distances, see `_estimate`.
        """
        row = self.metrics.index(metric)
        supported = np.minimum(self.positives, self.negatives) >= minimum
        enough = supported & ~np.isnan(self.values[row])
        used = [j for j in labels if enough[j]]
        left_out = {self.keys[j]: int(self.positives[j]) for j in labels if not enough[j]}
        named = {"labels": [self.keys[j] for j in used], "left_out_positives": left_out}
        if not used:
            any_support = supported[list(labels)].any()
            reason = f"no label {'with' if any_support else 'has'} {minimum} positives and negatives"
            reason += " has a value" if any_support else ""
            return Estimate(np.nan, np.nan, (np.nan, np.nan), self.rows, reason=reason, extra=named)
        floor = None if floors is None else float(np.asarray(floors)[used].mean())
        value, samples = float(self.values[row, used].mean()), row_means(self.samples[:, row, used])
        return self._estimate(value, samples, self.rows, None, floor, ceiling, None, recentred, named)

    def difference(self, metric: str, label: int, other: int, *, extra: Mapping[str, Any]) -> Estimate:
        """A metric of one label less that of another, paired in every resample."""
        row = self.metrics.index(metric)
        value = float(self.values[row, label] - self.values[row, other])
        n = int((self.positives + self.negatives)[[label, other]].sum())
        samples = self.samples[:, row, label] - self.samples[:, row, other]
        return self._estimate(value, samples, n, None, 0.0, None, None, False, extra)

    def mean_difference(self, pairs: Sequence[tuple[str, int, int]], *, extra: Mapping[str, Any]) -> Estimate:
        """The mean of several such differences, each a metric, a label and another; undefined ones take no part."""
        places = [(self.metrics.index(metric), label, other) for metric, label, other in pairs]
        value = float(np.mean([self.values[row, label] - self.values[row, other] for row, label, other in places]))
        samples = np.stack([self.samples[:, row, a] - self.samples[:, row, b] for row, a, b in places], axis=1)
        return self._estimate(value, row_means(samples), self.rows, None, 0.0, None, None, False, extra)

    def _estimate(
        self,
        value: float,
        samples: Floats,
        n: int,
        positives: int | None,
        floor: float | None,
        ceiling: float | None,
        reason: str | None,
        recentred: bool,
        extra: Mapping[str, Any],
    ) -> Estimate:
        undefined = float(np.isnan(samples).mean())
        if recentred:
            # A distance grows when the sample's noise is resampled on top of it, by about what the sample itself is
            # too far already; its spread is right. So the interval is for what a sample of this size scores on average.
            samples = np.maximum(samples - (np.nanmean(samples) - value), 0)
        low, high, _ = percentile_interval(samples)
        how = "percentile, recentred at the value" if recentred else "percentile"
        if undefined and reason is None:
            reason = f"undefined on {undefined:.1%} of the resamples"
        return Estimate(
            value,
            standard_error(samples),
            (low, high),
            n,
            positives,
            floor,
            ceiling,
            method=f"{self.method}, {how}{self.fixed}",
            reason=reason,
            extra={**extra, "undefined_resamples": undefined},
        )

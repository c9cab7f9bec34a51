"""Robustness: how far scores fall when the inputs are perturbed, each condition on the same items and resamples.

Absolute drops come first. Retention and errors relative to a reference divide by something that may be near 0; where it
is, they are undefined and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics.bootstrap import Weights, resample, sampled_estimate
from medvlm_harness.metrics.estimate import Estimate

__all__ = ["CLEAN", "MINIMUM_REFERENCE", "Conditions", "Measure", "Reference", "robustness_estimates"]

Floats = NDArray[np.float64]
CLEAN = "clean"
MINIMUM_REFERENCE = 0.01
"""Mean error of a reference, or its mean rise over the clean error, below which nothing is divided by it."""


@dataclass(frozen=True)
class Conditions:
    """What is compared with `clean`, and over what means are taken.

    Attributes:
        groups: corruption -> its conditions, usually `{corruption}_{severity}` by severity. A corruption without
            severities is the one condition of its own name.
        others: conditions that are shown and go into no mean, such as a blank image.

    Raises:
        ValueError: if names repeat, or a corruption has no condition.
    """

    groups: Mapping[str, Sequence[str]]
    others: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the names."""
        if not self.groups or not all(self.groups.values()):
            raise ValueError(f"Expected groups of at least one condition each, but got {dict(self.groups)}.")
        alone = {group for group, members in self.groups.items() if tuple(members) == (group,)}
        every = [*self.names, *(group for group in self.groups if group not in alone)]
        if len(set(every)) < len(every):
            repeated = sorted({name for name in every if every.count(name) > 1})
            raise ValueError(f"Expected names of conditions and groups that differ, but got {repeated} again.")

    @property
    def cases(self) -> tuple[str, ...]:
        """The conditions of all groups."""
        return tuple(case for members in self.groups.values() for case in members)

    @property
    def names(self) -> tuple[str, ...]:
        """All conditions, `clean` first."""
        return (CLEAN, *self.cases, *self.others)

    def metric_names(self, metric: str, *, referenced: bool = False) -> tuple[str, ...]:
        """The keys of `robustness_estimates` for one metric, in its order; `referenced`: with mCE.

        >>> Conditions({"blur": ["blur_1", "blur_5"]}).metric_names("auroc")[:4]
        ('auroc_clean', 'auroc_drop', 'auroc_retention', 'auroc_corruption_error')
        """
        kinds = ["clean", "drop", "retention", "corruption_error", "worst"]
        kinds += ["mce", "relative_mce"] if referenced else []
        for group, members in self.groups.items():
            if group not in members:
                kinds += [f"drop_{group}", f"retention_{group}"]
        for name in self.names[1:]:
            kinds += [name, f"drop_{name}", f"retention_{name}"]
        if len(set(kinds)) < len(kinds):
            repeated = sorted({kind for kind in kinds if kinds.count(kind) > 1})
            raise ValueError(f"Expected conditions that give each metric a name of its own, but {repeated} repeat.")
        return tuple(f"{metric}_{kind}" for kind in kinds)

    def lower_is_better(self, metric: str) -> frozenset[str]:
        """Which of the keys for one metric that is better when higher are better when lower."""
        drops = {"drop", *(f"drop_{name}" for name in (*self.groups, *self.names[1:]))}
        return frozenset(f"{metric}_{kind}" for kind in {*drops, "corruption_error", "mce", "relative_mce"})


@dataclass(frozen=True)
class Reference:
    """What another model scored on the same conditions; numbers from its results.

    Attributes:
        name: of the model or run.
        clean_error: 1 - score on clean inputs.
        errors: condition -> 1 - score.
    """

    name: str
    clean_error: float
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Measure:
    """A metric in [0, 1], higher is better, that is taken under every condition.

    Attributes:
        name: as in the names of the estimates.
        floor: what chance scores; retention is what is left above it.
        least_clean: what the lower end of the clean score's 95% interval must exceed for retention to be defined,
            at least the floor; for AUROC 0.55.
        reference: adds mCE against it.

    Raises:
        ValueError: if `least_clean` is below the floor.
    """

    name: str
    floor: float
    least_clean: float
    reference: Reference | None = None

    def __post_init__(self) -> None:
        """Check the bound."""
        if not self.least_clean >= self.floor:
            raise ValueError(
                f"Expected least_clean of {self.name} to be at least its floor {self.floor}, but got "
                f"{self.least_clean}."
            )


def robustness_estimates(
    statistics: Mapping[str, Callable[[Weights], Floats]],
    study_ids: ArrayLike,
    measures: Sequence[Measure],
    conditions: Conditions,
    *,
    extras: Mapping[str, Mapping[str, object]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Levels, drops, retention and errors of every measure, by `Conditions.metric_names`, from one set of resamples.

    Names, each after the measure's and an underscore:
        clean and {condition}: the score there.
        drop_{condition}: clean - score; drop_{corruption}: its mean over severities; drop: over all cases.
        retention_{...}: (score - floor) / (clean - floor), and its means likewise; 1 where nothing is lost.
        corruption_error: mean of 1 - score over all cases. It has no reference: a weak model's is high however robust.
        worst: the score of the case that is lowest on these items, named in `extra` and held fixed in the resamples;
            the lowest of many is lower than what that case would score on other items.
        mce: mean over corruptions of the sum of errors over severities, divided by the same sum of the reference.
        relative_mce: the same of what errors rise above the clean error. Undefined, with the corruption named, where
            the reference's errors hardly rise. The reference's own uncertainty is in neither interval.

    A mean is undefined where one of its cases is: it would be of another set of cases.

    Args:
        statistics: condition -> weights (b, n) to scores (b, measures), NaN where undefined; those of `conditions`.
        study_ids: the study of each item, shape (n,).
        measures: in the order of the columns.
        conditions: what is compared.
        extras: measure -> what is added to `extra` of its estimates.
        resamples: number of resamples.
        seed: the same for all that is to be compared.

    Source: Hendrycks and Dietterich 2019, arXiv 1903.12261, section 4.1.
    """
    if tuple(statistics) != conditions.names:
        raise ValueError(f"Expected statistics of {list(conditions.names)}, in this order, but got {list(statistics)}.")
    n = len(np.asarray(study_ids))
    if not n:
        nothing = Estimate.undefined("no item", n=0)
        return {
            name: nothing
            for measure in measures
            for name in conditions.metric_names(measure.name, referenced=measure.reference is not None)
        }

    def statistic(weights: Weights) -> Floats:
        return np.stack([one(weights) for one in statistics.values()], axis=2)  # (b, measures, conditions)

    value = statistic(np.ones((1, n)))
    levels = np.concatenate([value, resample(statistic, study_ids, resamples=resamples, seed=seed)])
    estimates: dict[str, Estimate] = {}
    for column, measure in enumerate(measures):
        extra = (extras or {}).get(measure.name, {})
        found = _Measured(measure, conditions, levels[:, column], n=n, seed=seed, extra=extra).estimates()
        names = conditions.metric_names(measure.name, referenced=measure.reference is not None)
        estimates |= {name: found[name] for name in names}
    return estimates


class _Measured:
    """One measure on the items as they are (row 0) and on every resample, under every condition (columns)."""

    def __init__(
        self,
        measure: Measure,
        conditions: Conditions,
        levels: Floats,
        *,
        n: int,
        seed: int,
        extra: Mapping[str, object],
    ) -> None:
        self.measure, self.conditions = measure, conditions
        self.n, self.seed, self.extra = n, seed, extra
        self.levels = dict(zip(conditions.names, levels.T, strict=True))
        self.clean = self.levels[CLEAN]

    def estimates(self) -> dict[str, Estimate]:
        """All, by name."""
        groups, cases, name = self.conditions.groups, self.conditions.cases, self.measure.name
        floor = self.measure.floor
        means = {"": cases, **{f"_{group}": tuple(members) for group, members in groups.items()}}
        means |= {f"_{condition}": (condition,) for condition in self.conditions.names[1:]}
        found = {condition: self._estimate(its, (condition,), floor=floor) for condition, its in self.levels.items()}
        unretained = self._why_not_retained(found[CLEAN])
        for suffix, members in means.items():
            level = np.mean([self.levels[one] for one in members], axis=0)
            # Not clean - level: a mean of equal numbers may round to another, and no drop is exactly none.
            drop = np.mean([self.clean - self.levels[one] for one in members], axis=0)
            found[f"drop{suffix}"] = self._estimate(drop, members)
            above = self.clean - floor
            kept = np.divide(level - floor, above, out=np.full_like(above, np.nan), where=above > 0)
            found[f"retention{suffix}"] = self._estimate(kept, members, floor=0.0, why=unretained)
        errors = 1 - np.mean([self.levels[one] for one in cases], axis=0)
        found["corruption_error"] = self._estimate(errors, cases, floor=1 - floor)
        found["worst"] = self._worst()
        if self.measure.reference is not None:
            found |= self._against(self.measure.reference)
        return {f"{name}_{kind}": estimate for kind, estimate in found.items()}

    def _worst(self) -> Estimate:
        cases = self.conditions.cases
        if why := self._undefined_under(cases):  # the lowest of the rest need not be the lowest
            return self._estimate(self.clean, cases, why=why)
        worst = min(cases, key=lambda case: float(self.levels[case][0]))
        named = {"condition": worst, "of": len(cases)}
        return self._estimate(self.levels[worst], (worst,), floor=self.measure.floor, extra=named)

    def _against(self, reference: Reference) -> dict[str, Estimate]:
        """MCE and relative mCE."""
        ratios, relative, small, hardly = {}, {}, [], []
        for group, members in self.conditions.groups.items():
            error = np.mean([1 - self.levels[case] for case in members], axis=0)
            of_reference = float(np.mean([reference.errors.get(case, np.nan) for case in members]))
            rise = of_reference - reference.clean_error
            if of_reference >= MINIMUM_REFERENCE:
                ratios[group] = error / of_reference
            else:
                small.append(group)
            if rise >= MINIMUM_REFERENCE:
                relative[group] = (error - (1 - self.clean)) / rise
            else:
                hardly.append(group)
        least = MINIMUM_REFERENCE
        missing = [case for case in self.conditions.cases if not np.isfinite(reference.errors.get(case, np.nan))]
        why = why_relative = f"{reference.name} has no error for {', '.join(missing)}" if missing else None
        if not missing and small:
            why = f"error of {reference.name} is below {least} under {', '.join(small)}"
        if not missing and hardly:
            why_relative = f"error of {reference.name} rises by less than {least} under {', '.join(hardly)}"
        if not np.isfinite(reference.clean_error):
            why_relative = f"{reference.name} has no clean error"
        return {
            "mce": self._mean_ratio(ratios, reference, why),
            "relative_mce": self._mean_ratio(relative, reference, why_relative),
        }

    def _mean_ratio(self, ratios: Mapping[str, Floats], reference: Reference, why: str | None) -> Estimate:
        by_corruption = {group: float(its[0]) for group, its in ratios.items()}
        named = {"reference_run": reference.name, "by_corruption": by_corruption}
        column = self.clean if why else np.mean(list(ratios.values()), axis=0)
        return self._estimate(column, self.conditions.cases, why=why, extra=named)

    def _why_not_retained(self, clean: Estimate) -> str | None:
        if clean.ci95[0] > self.measure.least_clean or np.isnan(clean.value):
            return None
        return (
            f"{self.measure.name}_clean's lower bound {clean.ci95[0]:.3f} is not above {self.measure.least_clean:.3f}"
        )

    def _undefined_under(self, members: Sequence[str]) -> str | None:
        undefined = [one for one in (CLEAN, *members) if np.isnan(self.levels[one][0])]
        return f"{self.measure.name} is undefined under {', '.join(undefined)}" if undefined else None

    def _estimate(
        self,
        column: Floats,
        members: Sequence[str],
        *,
        floor: float | None = None,
        why: str | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> Estimate:
        """An estimate from its values, that stands on these conditions; `why` makes it undefined."""
        return sampled_estimate(
            float("nan") if why else float(column[0]),
            column[1:],
            n=self.n,
            seed=self.seed,
            floor=floor,
            why=why or self._undefined_under(members) or "undefined on these items",
            extra={**self.extra, **(extra or {})},
        )

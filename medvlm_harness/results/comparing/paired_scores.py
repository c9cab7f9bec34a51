"""Several runs of one task on the same items: what each scores, how far they are apart, how often they disagree.

A difference is computed in every resample of studies, the same ones for all runs, so that its interval knows how far
runs rise and fall together: two precisions of one model differ by far less than either is uncertain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.data.chexpert import label_key
from medvlm_harness.errors import UserError
from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics.agreement import changed_share
from medvlm_harness.metrics.bootstrap import Weights, resample, sampled_estimate
from medvlm_harness.metrics.consistency import consistency_estimates, decide, score_change_estimates
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.robustness import CLEAN
from medvlm_harness.results.comparing.paired_image_use import measure_image_use
from medvlm_harness.results.comparing.paired_measures import (
    RECENTRED,
    K,
    Measured,
    measure_labels,
    measure_options,
    measure_search,
    measure_values,
    scored_labels,
)
from medvlm_harness.results.comparing.paired_robustness import measure_robustness
from medvlm_harness.results.primary import score_of
from medvlm_harness.results.score_table import ScoreTable
from medvlm_harness.tracks.image_use import TRUE
from medvlm_harness.tracks.search import KS

__all__ = ["Paired", "first_condition", "own_thresholds", "pair_scores"]

Floats = NDArray[np.float64]
Tables = Mapping[str, ScoreTable]
Details = Mapping[str, Mapping[str, Any]]
OTHER = "run"


@dataclass(frozen=True)
class Paired:
    """Runs of one task compared with a reference run.

    Attributes:
        kind: see `Measured`.
        primary: the metrics that a table shows.
        levels: metric -> run -> estimate.
        differences: metric -> run -> the run less the reference.
        ratios: metric -> run -> the run by the reference, for retention.
        agreement: run -> name -> how far its answers are those of the reference.
    """

    kind: str
    primary: tuple[str, ...]
    levels: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Mapping[str, Estimate]]
    ratios: Mapping[str, Mapping[str, Estimate]]
    agreement: Mapping[str, Mapping[str, Estimate]]


def pair_scores(tables: Tables, details: Details, *, reference: str, resamples: int = 1000, seed: int = 0) -> Paired:
    """Compare the runs of a task with one of them.

    Args:
        tables: run -> its answers, the reference among them, on the same documents and truth.
        details: run -> what its results file says of the task.
        reference: the run that the others are compared with.
        resamples: number of resamples.
        seed: the task's own is 0.

    Raises:
        UserError: if the answers are of no kind that is known, or a run lacks some.
    """
    tables = {reference: tables[reference], **tables}
    labels = first_condition(tables[reference], details[reference])
    clean = {name: table.select(labels) for name, table in tables.items()}
    cuts = {name: own_thresholds(labels, details[name]) for name in tables}
    first = clean[reference]
    if "robustness" in details[reference]:
        measured = measure_robustness(tables, clean, {name: details[name] for name in tables}, cuts)
    elif details[reference].get("conditions", ("",))[0] == TRUE:
        measured = measure_image_use(tables, clean, details[reference])
    elif not np.isnan(first.margin).all():
        multiclass = "balanced_accuracy" in details[reference]["metrics"]
        measured = measure_options(clean) if multiclass else measure_labels(clean)
    elif not np.isnan(first.rank).all():
        measured = measure_search(clean)
    elif not np.isnan(first.value).all():
        measured = measure_values(clean, details[reference]["metrics"])
    else:
        raise UserError("its scores hold no answers")
    levels, differences, ratios = _estimates(measured, first.studies, reference, resamples, seed)
    agreement = {}
    for name, other in clean.items():
        if name != reference:
            pair = _Pair(measured, first, other, cuts[reference], cuts[name], resamples, seed)
            agreement[name] = pair.agreement()
    return Paired(measured.kind, measured.primary, levels, differences, ratios, agreement)


def _estimates(
    measured: Measured, studies: Sequence[str], reference: str, resamples: int, seed: int
) -> tuple[dict[str, dict[str, Estimate]], ...]:
    """Levels, differences and ratios: metric -> run -> estimate."""
    names = list(measured.statistics)
    base = names.index(reference)

    def statistic(weights: Weights) -> Floats:
        return np.stack([one(weights) for one in measured.statistics.values()], axis=2)  # (b, metrics, runs)

    n = len(studies)
    every = np.concatenate([statistic(np.ones((1, n))), resample(statistic, studies, resamples=resamples, seed=seed)])

    def estimate(metric: str, column: Floats, runs: Sequence[str], *, level: bool) -> Estimate:
        value, samples = float(column[0]), column[1:]
        reasons = {run: measured.reasons[metric, run] for run in runs if (metric, run) in measured.reasons}
        if metric in RECENTRED and not np.isnan(value):
            samples = samples - (np.nanmean(samples) - value)
            samples = np.maximum(samples, 0) if level else samples
        return sampled_estimate(
            float("nan") if reasons else value,
            samples,
            n=n,
            seed=seed,
            why="; ".join(f"{run}: {why}" for run, why in reasons.items()) or "undefined on these items",
            extra=measured.extra,
        )

    levels: dict[str, dict[str, Estimate]] = {}
    differences: dict[str, dict[str, Estimate]] = {}
    ratios: dict[str, dict[str, Estimate]] = {}
    for j, metric in enumerate(measured.metrics):
        its = every[:, j]
        levels[metric] = {run: estimate(metric, its[:, k], [run], level=True) for k, run in enumerate(names)}
        others = {run: k for k, run in enumerate(names) if run != reference}
        differences[metric] = {
            run: estimate(metric, its[:, k] - its[:, base], [run, reference], level=False) for run, k in others.items()
        }
        if metric in measured.ratios:
            ratios[metric] = {
                run: estimate(metric, ratio_or_nan(its[:, k], its[:, base]), [run, reference], level=False)
                for run, k in others.items()
            }
    return levels, differences, ratios


class _Pair:
    """How far the answers of two runs are the same, and their scores in the same order."""

    def __init__(
        self,
        measured: Measured,
        first: ScoreTable,
        other: ScoreTable,
        own: Floats,
        others: Floats,
        resamples: int,
        seed: int,
    ) -> None:
        self.measured, self.first, self.other = measured, first, other
        self.own, self.others, self.resamples, self.seed = own, others, resamples, seed

    def agreement(self) -> dict[str, Estimate]:
        """By what is compared: decisions, chosen options, places of a search, texts."""
        if self.measured.kind == "search":
            return self._searches()
        if self.measured.kind == "options":
            first, other = ([str(k) for k in one.probability.argmax(axis=1)] for one in (self.first, self.other))
            return {"flip_rate": self._changed(first, other, by="the most probable option"), **self._order("margin")}
        if not np.isnan(self.first.margin).all():
            return {**self._decisions(), **self._order("margin")}
        if (measure := score_of(self.measured.primary[0])).endswith(f"_recall@{K}"):
            found, now = (one.value >= 0.5 for one in (self.first, self.other))
            return {"flip_rate": self._flips(found, now, self.first.labels, by=f"found among the first {K}")}
        label = measure if measure in self.first.labels else self.first.labels[0]
        at = self.first.labels.index(label)
        answers = self.first.answer[:, at].tolist(), self.other.answer[:, at].tolist()
        by = "the chosen option" if label.startswith("acc") else "the text"
        return {"flip_rate": self._changed(*answers, by=by), **self._order("value", [label])}

    def _decisions(self) -> dict[str, Estimate]:
        """Labels called present by one run and not by the other."""
        scored = scored_labels({"": self.first, OTHER: self.other})
        first, other = self.first.margin[:, scored], self.other.margin[:, scored]
        names = [self.first.labels[j] for j in scored]
        own, others = self.own[scored], self.others[scored]
        if np.isnan(own + others).all():
            said, now = (one.probability[:, scored] >= 0.5 for one in (self.first, self.other))
            return {"flip_rate": self._flips(said, now, names, by="probability 0.5: no thresholds were fitted")}
        both = np.isnan(own + others)
        own, others = np.where(both, np.nan, own), np.where(both, np.nan, others)
        return {
            "flip_rate": self._flips(decide(first, own), decide(other, own), names, by="the reference's thresholds"),
            "flip_rate_refitted": self._flips(
                decide(first, own), decide(other, others), names, by="thresholds fitted for each run"
            ),
        }

    def _searches(self) -> dict[str, Estimate]:
        """Queries that find their counterpart among the first k in one run and not in the other."""
        known = ~np.isnan(self.first.rank + self.other.rank)
        flips = {}
        for k in KS:
            first, other = (np.where(known, one.rank <= k, -1) for one in (self.first, self.other))
            flips[f"flip_rate@{k}"] = self._flips(first, other, self.first.labels, by=f"found among the first {k}")
        return {**flips, **self._order("rank")}

    def _flips(self, first: ArrayLike, other: ArrayLike, names: Sequence[str], *, by: str) -> Estimate:
        found = consistency_estimates(
            {CLEAN: first, OTHER: other},
            self.first.studies,
            keys=names,
            resamples=self.resamples,
            seed=self.seed,
        )[f"flip_rate_{OTHER}"]
        return replace(found, extra={**found.extra, "by": by})

    def _changed(self, first: Sequence[str | None], other: Sequence[str | None], *, by: str) -> Estimate:
        found = changed_share(first, other, self.first.studies, resamples=self.resamples, seed=self.seed)
        return replace(found, extra={**found.extra, "by": by})

    def _order(self, what: str, labels: Sequence[str] | None = None) -> dict[str, Estimate]:
        """Rank correlation and mean absolute change of scores, means over the labels that all documents have."""
        labels = labels or self.first.labels
        first, other = (getattr(one.select(labels), what) for one in (self.first, self.other))
        known = ~np.isnan(first + other).any(axis=0)
        if what == "rank":  # a query without a counterpart has none, in either run
            rows = ~np.isnan(first + other).any(axis=1)
            known = np.ones(len(labels), dtype=bool)
        else:
            rows = np.ones(len(first), dtype=bool)
        if not known.any() or not rows.any():
            nothing = Estimate.undefined("no score is known of both on every document", n=0)
            return {"rank_correlation": nothing, "score_change": nothing}
        studies = [study for study, row in zip(self.first.studies, rows, strict=True) if row]
        keys = [label for label, one in zip(labels, known, strict=True) if one]
        scores = {CLEAN: first[rows][:, known], OTHER: other[rows][:, known]}
        found = score_change_estimates(scores, studies, keys=keys, resamples=self.resamples, seed=self.seed)
        return {name: found[f"{name}_{OTHER}"] for name in ("rank_correlation", "score_change")}


def first_condition(table: ScoreTable, details: Mapping[str, Any]) -> list[str]:
    """The labels under the first condition; those under others are called `label@condition`."""
    others = tuple(f"@{one}" for one in details.get("conditions", ())[1:])
    return [label for label in table.labels if not (others and label.endswith(others))]


def own_thresholds(labels: Sequence[str], details: Mapping[str, Any]) -> Floats:
    """The margin from which on a run calls each label present, fitted on validation; NaN where there is none."""
    fitted = details.get("thresholds", {}).get("labels") or {
        key: one.get("threshold", {}) for key, one in details.get("operating_points", {}).get("youden", {}).items()
    }
    values = [fitted.get(label_key(label), {}).get("value") for label in labels]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

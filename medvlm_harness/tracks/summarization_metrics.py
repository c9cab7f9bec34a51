"""The metrics of report summarisation: overlap, labels, entities and factuality, beside what no model wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import CHEXPERT_5, CHEXPERT_14
from medvlm_harness.metrics.bootstrap import bootstrap_means
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.factuality import (
    CHECKS,
    RECALLS,
    PairChecks,
    Reading,
    check_pair,
    factuality_rates,
)
from medvlm_harness.metrics.label_f1 import UncertainPolicy, label_f1, label_f1_estimates, label_matrix
from medvlm_harness.metrics.radgraph import radgraph_f1_complete, radgraph_f1_partial, radgraph_f1_simple
from medvlm_harness.metrics.rouge import rouge_scores, rouge_settings
from medvlm_harness.tracks.report_reading import ReportReader

__all__ = ["LOWER_IS_BETTER", "PER_STUDY", "SummaryItems", "SummaryScorer", "metric_names"]

OVERLAP = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ENTITIES = {
    "entity_f1_simple": radgraph_f1_simple,
    "entity_f1_partial": radgraph_f1_partial,
    "entity_f1_complete": radgraph_f1_complete,
}
PER_STUDY = (*OVERLAP, *ENTITIES)
LABELS = ("label_f1_micro_14", "label_f1_macro_14", "label_f1_micro_5", "label_f1_macro_5")
PARTS = ("", "_abnormal")
UNCERTAIN: UncertainPolicy = "ones"
LOWER_IS_BETTER = frozenset(name for check in CHECKS for name in (check, f"{check}_lift"))


def metric_names() -> tuple[str, ...]:
    """Overlap, entity and label scores overall and on abnormal studies; each check's rate and its lift."""
    scores = [f"{name}{part}" for part in PARTS for name in (*PER_STUDY, *LABELS)]
    return (*scores, *(f"{check}{what}" for check in (*CHECKS, *RECALLS) for what in ("", "_lift")))


@dataclass(frozen=True, slots=True)
class SummaryItems:
    """What summaries are held against, one entry per study in each."""

    study_ids: Sequence[str]
    sources: Sequence[str]  # what is summarised
    references: Sequence[str]
    comparisons: Sequence[str]  # the comparison field
    abnormal: Sequence[bool]
    floors: Mapping[str, Sequence[str]]  # kind -> what it writes


class SummaryScorer:
    """Scores sets of summaries of the same studies, such as those of several filter pipelines; no text twice."""

    def __init__(self, items: SummaryItems, reader: ReportReader) -> None:
        self.items, self.reader = items, reader
        self._scored: dict[tuple[int, str], NDArray[np.float64]] = {}
        self._parts = dict(
            zip(PARTS, (np.ones(len(items.study_ids), bool), np.array(items.abnormal, bool)), strict=True)
        )
        self._reference_labels = self._labels_of(items.references)
        self._floors: dict[str, dict[str, float]] | None = None

    def per_study(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The scores of `PER_STUDY` of one text per study, (n, scores)."""
        new = [place for place, text in enumerate(texts) if (place, text) not in self._scored]
        written, wanted = [texts[k] for k in new], [self.items.references[k] for k in new]
        ours, theirs = ([self.reader.entities(text) for text in side] for side in (written, wanted))
        columns = [*rouge_scores(written, wanted), *(score(ours, theirs) for score in ENTITIES.values())]
        self._scored.update(zip(((k, texts[k]) for k in new), np.stack(columns, axis=1), strict=True))
        return np.array([self._scored[place, text] for place, text in enumerate(texts)]).reshape(-1, len(PER_STUDY))

    def estimates(self, texts: Sequence[str], finished: Sequence[bool | None]) -> dict[str, Estimate]:
        """Every metric of one text per study.

        Args:
            texts: in the order of the items.
            finished: False where the length limit ended a text, None where nobody knows.
        """
        found: dict[str, Estimate] = {}
        scores, labels = self.per_study(texts), self._labels_of(texts)
        for part, chosen in self._parts.items():
            found |= self._score_estimates(part, chosen, scores) | self._label_estimates(part, chosen, labels)
        found |= self._factuality(texts, finished)
        return {name: found[name] for name in metric_names()}

    def label_estimates(self, texts: Sequence[str]) -> dict[str, Estimate]:
        """Label F1 of each label by itself, over all studies."""
        estimates = label_f1_estimates(
            self._reference_labels, self._labels_of(texts), self.items.study_ids, uncertain=UNCERTAIN
        )
        return {
            name: estimate for name, estimate in estimates.items() if name.partition("_")[0] not in ("micro", "macro")
        }

    def _score_estimates(
        self, part: str, chosen: NDArray[np.bool_], scores: NDArray[np.float64]
    ) -> dict[str, Estimate]:
        names = [f"{name}{part}" for name in PER_STUDY]
        if not chosen.any():
            return {name: self._none_abnormal() for name in names}
        floors = [self._floor(name) for name in names]
        settings = [rouge_settings()] * len(OVERLAP) + [self.reader.versions()["entities"]] * len(ENTITIES)
        estimates = bootstrap_means(
            scores[chosen],
            np.array(self.items.study_ids)[chosen],
            floors=[max(values.values()) for values in floors],
            ceilings=[1.0] * len(names),
        )
        return {
            name: replace(estimate, extra={**estimate.extra, "floors": values, "computed_by": how})
            for name, estimate, values, how in zip(names, estimates, floors, settings, strict=True)
        }

    def _label_estimates(
        self, part: str, chosen: NDArray[np.bool_], labels: NDArray[np.float64]
    ) -> dict[str, Estimate]:
        names = [f"{name}{part}" for name in LABELS]
        if not chosen.any():
            return {name: self._none_abnormal() for name in names}
        floors = {name: self._floor(name) for name in names}
        keys = {name: name.removeprefix("label_f1_").removesuffix(part) for name in names}
        estimates = label_f1_estimates(
            self._reference_labels[chosen],
            labels[chosen],
            np.array(self.items.study_ids)[chosen],
            uncertain=UNCERTAIN,
            floors={keys[name]: max(values.values()) for name, values in floors.items()},
        )
        more = {"computed_by": self.reader.versions()["labeler"]}
        return {
            name: replace(estimates[key], extra={**estimates[key].extra, "floors": floors[name], **more})
            for name, key in keys.items()
        }

    def _none_abnormal(self) -> Estimate:
        return Estimate.undefined("no abnormal study", n=0)

    def _floor(self, name: str) -> dict[str, float]:
        """What each kind of floor scores in a metric."""
        if self._floors is None:
            self._floors = {kind: self._values(texts) for kind, texts in self.items.floors.items()}
        return {kind: values[name] for kind, values in self._floors.items()}

    def _values(self, texts: Sequence[str]) -> dict[str, float]:
        """Scores without intervals."""
        scores, labels = self.per_study(texts), self._labels_of(texts)
        five = [CHEXPERT_14.index(name) for name in CHEXPERT_5]
        values: dict[str, float] = {}
        for part, chosen in self._parts.items():
            if not chosen.any():
                continue
            means = zip(PER_STUDY, scores[chosen].mean(axis=0).tolist(), strict=True)
            values |= {f"{name}{part}": mean for name, mean in means}
            for average in ("micro", "macro"):
                for size, columns in (("14", slice(None)), ("5", five)):
                    values[f"label_f1_{average}_{size}{part}"] = label_f1(
                        self._reference_labels[chosen][:, columns],
                        labels[chosen][:, columns],
                        average=average,
                        uncertain=UNCERTAIN,
                    )
        return values

    def _labels_of(self, texts: Sequence[str]) -> NDArray[np.float64]:
        return label_matrix([self.reader.labels(text) for text in texts])

    # --- factuality

    def _factuality(self, texts: Sequence[str], finished: Sequence[bool | None]) -> dict[str, Estimate]:
        cut = [None if one is None else not one for one in finished]
        model = self._checks(texts, cut)
        reference = self._checks(self.items.references, [False] * len(texts))
        found: dict[str, Estimate] = {}
        for name, rates in factuality_rates(model, reference, self.items.study_ids).items():
            human: dict[str, Any] = {"reference": rates.reference.value, "reference_ci95": list(rates.reference.ci95)}
            found[name] = replace(rates.model, extra={**rates.model.extra, **human, "lift": rates.lift.value})
            found[f"{name}_lift"] = rates.lift
        return found

    def _checks(self, texts: Sequence[str], cut: Sequence[bool | None]) -> list[PairChecks]:
        items = self.items
        return [
            check_pair(self._reading(source), self._reading(text), comparison=comparison, hit_limit=limit)
            for source, text, comparison, limit in zip(items.sources, texts, items.comparisons, cut, strict=True)
        ]

    def _reading(self, text: str) -> Reading:
        return Reading(text, self.reader.labels(text))

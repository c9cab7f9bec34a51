"""The scores of generated texts against human ones: overlap, labels, entities, factuality, with floors beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import CHEXPERT_5, CHEXPERT_14
from medvlm_harness.metrics.bootstrap import Weights, bootstrap_columns, bootstrap_means
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.factuality import (
    CHECKS,
    RECALLS,
    PairChecks,
    Reading,
    check_pair,
    factuality_rates,
)
from medvlm_harness.metrics.label_f1 import (
    Average,
    UncertainPolicy,
    label_f1_estimates,
    label_matrix,
    weighted_label_f1,
)
from medvlm_harness.metrics.radgraph import radgraph_f1_complete, radgraph_f1_partial, radgraph_f1_simple
from medvlm_harness.metrics.rouge import rouge_scores, rouge_settings
from medvlm_harness.tracks.report_reading import ReportReader

__all__ = ["LABELS", "UNCERTAIN", "TextItems", "TextScorer"]

OVERLAP = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ENTITIES = {
    "entity_f1_simple": radgraph_f1_simple,
    "entity_f1_partial": radgraph_f1_partial,
    "entity_f1_complete": radgraph_f1_complete,
}
_FIVE = [CHEXPERT_14.index(name) for name in CHEXPERT_5]
# Metric -> how labels are put together, and which.
LABELS: Mapping[str, tuple[Average, Sequence[int]]] = {
    f"label_f1_{average}_{len(columns)}": (average, columns)
    for columns in (range(len(CHEXPERT_14)), _FIVE)
    for average in ("micro", "macro")
}
PARTS = ("", "_abnormal")
UNCERTAIN: UncertainPolicy = "ones"


@dataclass(frozen=True, slots=True)
class TextItems:
    """What generated texts are held against, one entry per study in each."""

    study_ids: Sequence[str]
    sources: Sequence[str]  # what the texts must be true to
    references: Sequence[str]
    comparisons: Sequence[str]  # the comparison field
    abnormal: Sequence[bool]
    floors: Mapping[str, Sequence[str]]  # kind -> what it writes


class TextScorer:
    """Scores sets of texts of the same studies, such as those of several filter pipelines; no text twice.

    A subclass may add scores: columns per study, and statistics of a whole set of texts.
    """

    PER_STUDY: ClassVar[tuple[str, ...]] = (*OVERLAP, *ENTITIES)
    CORPUS: ClassVar[tuple[str, ...]] = ()  # of a whole set, such as BLEU
    LOWER_IS_BETTER: ClassVar[frozenset[str]] = frozenset(n for check in CHECKS for n in (check, f"{check}_lift"))

    def __init__(self, items: TextItems, reader: ReportReader) -> None:
        self.items, self.reader = items, reader
        self._scored: dict[tuple[int, str], NDArray[np.float64]] = {}
        self._parts = dict(
            zip(PARTS, (np.ones(len(items.study_ids), bool), np.array(items.abnormal, bool)), strict=True)
        )
        self.reference_labels = self.labels(items.references)
        self._floors: dict[str, dict[str, float]] | None = None

    @classmethod
    def metric_names(cls) -> tuple[str, ...]:
        """Scores overall and on abnormal studies; each check's rate and its lift."""
        scores = [f"{name}{part}" for part in PARTS for name in (*cls.PER_STUDY, *cls.CORPUS, *LABELS)]
        return (*scores, *(f"{check}{what}" for check in (*CHECKS, *RECALLS) for what in ("", "_lift")))

    # --- for subclasses

    def columns(self, written: Sequence[str], wanted: Sequence[str]) -> list[NDArray[np.float64]]:
        """The scores of `PER_STUDY`, (n,) each."""
        ours, theirs = ([self.reader.entities(text) for text in side] for side in (written, wanted))
        return [*rouge_scores(written, wanted), *(score(ours, theirs) for score in ENTITIES.values())]

    def computed_by(self) -> dict[str, str]:
        """What computes each score of `PER_STUDY` and `CORPUS`, to stand beside it."""
        entities = self.reader.versions()["entities"]
        return dict.fromkeys(OVERLAP, rouge_settings()) | dict.fromkeys(ENTITIES, entities)

    def corpus(self, texts: Sequence[str], chosen: NDArray[np.bool_]) -> Callable[[Weights], NDArray[np.float64]]:
        """The statistics of `CORPUS` of the chosen texts: weights (b, chosen) to values (b, len(CORPUS))."""
        return lambda weights: np.empty((len(weights), 0))

    # --- scores

    def per_study(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The scores of `PER_STUDY` of one text per study, (n, scores)."""
        new = [place for place, text in enumerate(texts) if (place, text) not in self._scored]
        written, wanted = [texts[k] for k in new], [self.items.references[k] for k in new]
        scores = np.stack(self.columns(written, wanted), axis=1)
        self._scored.update(zip(((k, texts[k]) for k in new), scores, strict=True))
        found = np.array([self._scored[place, text] for place, text in enumerate(texts)])
        return found.reshape(-1, len(self.PER_STUDY))

    def labels(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """CheXpert's fourteen labels of each text, as `label_matrix` has them."""
        return label_matrix([self.reader.labels(text) for text in texts])

    def label_f1(
        self, labels: NDArray[np.float64], chosen: NDArray[np.bool_] | slice = slice(None)
    ) -> Callable[[Weights], NDArray[np.float64]]:
        """Label F1 of texts with these labels (n, 14): weights (b, chosen) to values (b, len(LABELS))."""
        true, found = self.reference_labels[chosen], labels[chosen]
        return lambda weights: np.column_stack(
            [
                weighted_label_f1(true[:, columns], found[:, columns], weights, average=average, uncertain=UNCERTAIN)
                for average, columns in LABELS.values()
            ]
        )

    def statistic(self, texts: Sequence[str], names: Sequence[str]) -> Callable[[Weights], NDArray[np.float64]]:
        """Metrics of `PER_STUDY` and `LABELS` of one text per study: weights (b, n) to values (b, names)."""
        scores, label_f1 = self.per_study(texts), self.label_f1(self.labels(texts))
        known = (*self.PER_STUDY, *LABELS)
        columns = [known.index(name) for name in names]

        def values(weights: Weights) -> NDArray[np.float64]:
            means = weights @ scores / weights.sum(axis=1, keepdims=True)
            return np.column_stack([means, label_f1(weights)])[:, columns]

        return values

    def estimates(self, texts: Sequence[str], finished: Sequence[bool | None]) -> dict[str, Estimate]:
        """Every metric of one text per study.

        Args:
            texts: in the order of the items.
            finished: False where the length limit ended a text, None where nobody knows.
        """
        found: dict[str, Estimate] = {}
        scores, labels = self.per_study(texts), self.labels(texts)
        for part, chosen in self._parts.items():
            found |= self._score_estimates(part, chosen, scores) | self._corpus_estimates(part, chosen, texts)
            found |= self._label_estimates(part, chosen, labels)
        found |= self._factuality(texts, finished)
        return {name: found[name] for name in self.metric_names()}

    def label_estimates(self, texts: Sequence[str]) -> dict[str, Estimate]:
        """Label F1 of each label by itself, over all studies."""
        estimates = label_f1_estimates(
            self.reference_labels, self.labels(texts), self.items.study_ids, uncertain=UNCERTAIN
        )
        return {
            name: estimate for name, estimate in estimates.items() if name.partition("_")[0] not in ("micro", "macro")
        }

    def _score_estimates(
        self, part: str, chosen: NDArray[np.bool_], scores: NDArray[np.float64]
    ) -> dict[str, Estimate]:
        names = [f"{name}{part}" for name in self.PER_STUDY]
        if not chosen.any():
            return {name: self._none_abnormal() for name in names}
        estimates = bootstrap_means(
            scores[chosen],
            np.array(self.items.study_ids)[chosen],
            floors=[max(self.floor(name).values()) for name in names],
            ceilings=[1.0] * len(names),
        )
        return self._with_floors(names, estimates)

    def _corpus_estimates(self, part: str, chosen: NDArray[np.bool_], texts: Sequence[str]) -> dict[str, Estimate]:
        names = [f"{name}{part}" for name in self.CORPUS]
        if not chosen.any():
            return {name: self._none_abnormal() for name in names}
        estimates = bootstrap_columns(
            self.corpus(texts, chosen),
            np.array(self.items.study_ids)[chosen],
            positives=[None] * len(names),
            floors=[max(self.floor(name).values()) for name in names],
        )
        return self._with_floors(names, estimates)

    def _with_floors(self, names: Sequence[str], estimates: Sequence[Estimate]) -> dict[str, Estimate]:
        """With each kind of floor, and what computed the score."""
        how = self.computed_by()
        found = {}
        for name, estimate in zip(names, estimates, strict=True):
            more = {"floors": self.floor(name), "computed_by": how[name.removesuffix("_abnormal")]}
            found[name] = replace(estimate, extra={**estimate.extra, **more})
        return found

    def _label_estimates(
        self, part: str, chosen: NDArray[np.bool_], labels: NDArray[np.float64]
    ) -> dict[str, Estimate]:
        names = [f"{name}{part}" for name in LABELS]
        if not chosen.any():
            return {name: self._none_abnormal() for name in names}
        floors = {name: self.floor(name) for name in names}
        keys = {name: name.removeprefix("label_f1_").removesuffix(part) for name in names}
        estimates = label_f1_estimates(
            self.reference_labels[chosen],
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

    def floor(self, name: str) -> dict[str, float]:
        """What each kind of floor scores in a metric."""
        if self._floors is None:
            self._floors = {kind: self._values(texts) for kind, texts in self.items.floors.items()}
        return {kind: values[name] for kind, values in self._floors.items()}

    def _values(self, texts: Sequence[str]) -> dict[str, float]:
        """Scores without intervals."""
        scores, labels = self.per_study(texts), self.labels(texts)
        names = (*self.PER_STUDY, *self.CORPUS, *LABELS)
        values: dict[str, float] = {}
        for part, chosen in self._parts.items():
            if chosen.any():
                once = np.ones((1, int(chosen.sum())))
                whole = [self.corpus(texts, chosen)(once)[0], self.label_f1(labels, chosen)(once)[0]]
                found = np.concatenate([scores[chosen].mean(axis=0), *whole])
                values |= {f"{name}{part}": one for name, one in zip(names, found.tolist(), strict=True)}
        return values

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

"""The metrics of listed findings: against the codes of human indexers, or against annotations in RadGraph's form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics.bootstrap import bootstrap_estimate, bootstrap_means
from medvlm_harness.metrics.entity_lists import Listed, WordScores, observed_words_list, score_lists
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.matches import count_matches
from medvlm_harness.metrics.mesh import (
    coded_findings,
    described_findings,
    entity_phrases,
    mesh_f1_estimates,
)
from medvlm_harness.metrics.radgraph import Entities
from medvlm_harness.tracks.entity_answers import EntityAnswer
from medvlm_harness.tracks.report_reading import ReportReader

__all__ = ["PARSING", "AnnotationScorer", "ListScorer", "MeshScorer", "best_constant_findings", "parsing_estimates"]

PARSING = ("answers_parsed", "items_unparsed")
RULES = "rules"  # beside the floors: what the entity extractor of this package scores, which has read the report
MESH = ("mesh_f1", "mesh_precision", "mesh_recall")
ANNOTATION = ("entity_f1", "entity_words_f1", "status_agreement")


class ListScorer(Protocol):
    """Scores lists of findings, one per study in a fixed order."""

    def estimates(self, listed: Sequence[Listed]) -> dict[str, Estimate]:
        """Every metric, with interval and floors."""

    def per_study(self, listed: Sequence[Listed]) -> Mapping[str, NDArray[np.float64]]:
        """Scores of each study by name, (n,); NaN where undefined."""


def parsing_estimates(answers: Sequence[EntityAnswer], study_ids: Sequence[str]) -> dict[str, Estimate]:
    """`answers_parsed`, the share of answers that a list could be read from, and `items_unparsed` per answer."""
    values = np.array([(one.parsed, one.unparsed) for one in answers], dtype=np.float64).reshape(-1, 2)
    found = bootstrap_means(values, study_ids, floors=[0.0, 0.0], ceilings=[1.0, 0.0])
    # Neither has a floor: an answer may say nothing at all and still be a list.
    parsed, unparsed = (replace(one, floor=None, ceiling=None) for one in found)
    forms = {form: sum(one.form == form for one in answers) for form in ("json", "list", "none")}
    more = {"forms": forms, "findings_listed": sum(len(one.findings) for one in answers)}
    return dict(zip(PARSING, (replace(parsed, extra={**parsed.extra, **more}), unparsed), strict=True))


# --- against the coders of Open-i


def best_constant_findings(coded: Sequence[frozenset[str]]) -> tuple[str, ...]:
    """The findings, most frequent first, that score the best micro F1 when they are listed for every study.

    Args:
        coded: per study, see `coded_findings`.

    Raises:
        ValueError: if there is no study.
    """
    if not coded:
        raise ValueError("Expected coded studies, but got none.")
    counts: dict[str, int] = {}
    for study in coded:
        for finding in study:
            counts[finding] = counts.get(finding, 0) + 1
    ranked = sorted(counts, key=lambda finding: (-counts[finding], finding))
    total = sum(counts.values())
    best: tuple[float, int] = (0.0, 0)
    matched = predicted = 0
    for k, finding in enumerate(ranked, start=1):
        # A finding's name may describe another one too ("calcified aorta"): count what the scorer will see.
        said = described_findings(ranked[:k])
        matched = sum(counts.get(name, 0) for name in said)
        predicted = len(said) * len(coded)
        f1 = 2 * matched / (predicted + total)
        if finding in said and f1 > best[0]:
            best = f1, k
    return tuple(ranked[: best[1]])


class MeshScorer:
    """Lists against the codes that human indexers gave each study.

    CheXpert's labels of a list are not compared: a labeler reads them as well from a copied report, whatever a model
    made of it.

    Args:
        study_ids: of the studies, all of them coded.
        terms: their MeSH terms.
        reports: their texts, which the rules read.
        floors: kind -> a list per study.
        reader: reads the reports.
    """

    def __init__(
        self,
        study_ids: Sequence[str],
        terms: Sequence[Sequence[str]],
        reports: Sequence[str],
        floors: Mapping[str, Sequence[Listed]],
        reader: ReportReader,
    ) -> None:
        self.study_ids, self.terms, self.reader = study_ids, terms, reader
        self._floors = {kind: self._values(_found(lists)) for kind, lists in floors.items()}
        self._rules = self._values([entity_phrases(reader.entities(report)) for report in reports])

    def estimates(self, listed: Sequence[Listed]) -> dict[str, Estimate]:
        """Micro F1, precision and recall of findings."""
        found = mesh_f1_estimates(_found(listed), self.terms, self.study_ids)
        return {name: self._beside(name, estimate) for name, estimate in found.items()}

    def per_study(self, listed: Sequence[Listed]) -> Mapping[str, NDArray[np.float64]]:
        """F1 of each study; NaN where nothing is coded and nothing listed."""
        known = [coded_findings(terms) or frozenset() for terms in self.terms]
        counts = count_matches(zip(map(described_findings, _found(listed)), known, strict=True))
        either = (counts.predicted + counts.annotated).astype(np.float64)
        return {"mesh_f1": ratio_or_nan(2.0 * counts.matched.astype(np.float64), either)}

    def _beside(self, name: str, estimate: Estimate) -> Estimate:
        floors = {kind: values[name] for kind, values in self._floors.items()}
        extra = {"floors": {**floors, RULES: self._rules[name]}, RULES: self.reader.entities_version}
        return replace(estimate, floor=_best(floors.values()), extra={**estimate.extra, **extra})

    def _values(self, phrases: Sequence[Sequence[str]]) -> dict[str, float]:
        found = mesh_f1_estimates(phrases, self.terms, self.study_ids, resamples=1)
        return {name: estimate.value for name, estimate in found.items()}


def _found(listed: Sequence[Listed]) -> list[list[str]]:
    """What is listed as present or uncertain; coders index what may be there as well."""
    return [[phrase for phrase, status in one if status != "absent"] for one in listed]


# --- against annotations


@dataclass(frozen=True, slots=True)
class _Scored:
    scores: WordScores

    def values(self) -> dict[str, float]:
        s = self.scores
        shared = float(s.shared.sum())
        agreement = float(s.same_status.sum()) / shared if shared else float("nan")
        return dict(zip(ANNOTATION, (float(s.f1.mean()), float(s.words_f1.mean()), agreement), strict=True))


class AnnotationScorer:
    """Lists against the observations that annotators marked in each report; see metrics/entity_lists.py.

    Args:
        study_ids: of the reports.
        annotators: entities per report, once per annotator; None where one did not read it.
        reports: their texts, which the rules read.
        floors: kind -> a list per report.
        reader: reads the reports.
    """

    def __init__(
        self,
        study_ids: Sequence[str],
        annotators: Sequence[Sequence[Entities | None]],
        reports: Sequence[str],
        floors: Mapping[str, Sequence[Listed]],
        reader: ReportReader,
    ) -> None:
        self.study_ids, self.annotators, self.reader = study_ids, annotators, reader
        self._floors = {kind: self._scored(lists).values() for kind, lists in floors.items()}
        self._rules = self._scored([observed_words_list(reader.entities(report)) for report in reports]).values()
        self._ceilings = self._human()

    def estimates(self, listed: Sequence[Listed]) -> dict[str, Estimate]:
        """Mean F1 of (word, status) and of words, and the share of shared words with the same status."""
        scores = self._scored(listed).scores
        means = bootstrap_means(
            np.stack([scores.f1, scores.words_f1], axis=1), self.study_ids, floors=[0.0, 0.0], ceilings=[1.0, 1.0]
        )
        agreement = bootstrap_estimate(
            lambda weights: ratio_or_nan(weights @ scores.same_status, weights @ scores.shared), self.study_ids
        )
        return {name: self._beside(name, one) for name, one in zip(ANNOTATION, (*means, agreement), strict=True)}

    def per_study(self, listed: Sequence[Listed]) -> Mapping[str, NDArray[np.float64]]:
        """F1 of each report."""
        scores = self._scored(listed).scores
        return {"entity_f1": scores.f1, "entity_words_f1": scores.words_f1}

    def _beside(self, name: str, estimate: Estimate) -> Estimate:
        floors = {kind: values[name] for kind, values in self._floors.items()}
        extra = {"floors": {**floors, RULES: self._rules[name]}, RULES: self.reader.entities_version}
        if self._ceilings is not None:
            extra["ceiling_is"] = "the second annotator's observations, scored as a list against the first's"
        return replace(
            estimate,
            floor=_best(floors.values()),
            ceiling=None if self._ceilings is None else _best([self._ceilings[name]]),
            extra={**estimate.extra, **extra},
        )

    def _scored(self, listed: Sequence[Listed]) -> _Scored:
        return _Scored(score_lists(listed, *self.annotators))

    def _human(self) -> dict[str, float] | None:
        """What one annotator scores against the other, on the reports that two have read."""
        if len(self.annotators) < 2:
            return None
        pairs = [(a, b) for a, b in zip(*self.annotators[:2], strict=True) if a is not None and b is not None]
        if not pairs:
            return None
        return _Scored(score_lists([observed_words_list(b) for _, b in pairs], [a for a, _ in pairs])).values()


def _best(values: Iterable[float]) -> float | None:
    """The highest defined value; None where there is none."""
    return max((value for value in values if not np.isnan(value)), default=None)

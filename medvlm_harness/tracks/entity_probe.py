"""Entity extraction by encoders: a linear probe on token vectors, learnt on RadGraph's training split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.data.records import Dataset, Study
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.entities import EntityExtractor
from medvlm_harness.metrics.bootstrap import bootstrap_columns
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.matches import (
    MatchCounts,
    weighted_micro_f1,
    weighted_micro_precision,
    weighted_micro_recall,
)
from medvlm_harness.metrics.radgraph import entity_span_counts
from medvlm_harness.requests import Capability, TextRef, TokenVectors
from medvlm_harness.tracks.base import COMMON_KEYS, MedicalTask
from medvlm_harness.tracks.entities import annotators, first_annotation
from medvlm_harness.tracks.entity_metrics import RULES
from medvlm_harness.tracks.radgraph_set import RadGraphSet, find_radgraph
from medvlm_harness.tracks.rows import Row
from medvlm_harness.training.token_probe import OUTSIDE, TokenProbe, bio_tags, entities_of, word_vectors

__all__ = ["EntityProbe", "ProbeRow"]

LEARNT_ON = "train"
Report = Mapping[str, Any]
"""`text` and `entities` of one report, as in RadGraph's JSON."""
# Metric suffix -> the labels that count; all of them in the first.
LABELS: Mapping[str, str | None] = {
    "": None,
    "_anatomy": "Anatomy::definitely present",
    "_present": "Observation::definitely present",
    "_absent": "Observation::definitely absent",
    "_uncertain": "Observation::uncertain",
}
METRICS = tuple(f"entity_span_f1{suffix}" for suffix in LABELS)
SIDES = ("entity_span_precision", "entity_span_recall")


@dataclass(frozen=True, slots=True)
class ProbeRow(Row):
    """The token vectors of one report."""

    tokens: TokenVectors

    __str__ = Row.__str__


class EntityProbe(MedicalTask):
    """`embed_tokens` requests: the reports of the training split to learn from, and those of the test split.

    A linear probe (training/token_probe.py) learns begin, inside and outside tags per word from frozen vectors, each
    word the mean of its pieces; its penalty is chosen by folds of the training reports. Spans and labels must be exact.
    --limit and --samples choose among the test reports; the training reports are always asked for.

    The annotations are the user's own: --metadata radgraph=PATH, or the environment variable MEDVLM_RADGRAPH. The floor
    tags each word as the training split mostly does, and knows nothing of context; beside it stands what the rules of
    labelers/entities.py score, which learn nothing.
    """

    OUTPUT_TYPE: ClassVar[str] = "embed_tokens"
    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"embed_tokens"})
    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS
    # The files are the data set: no other place is looked at.
    RUNTIME_KEYS: ClassVar[frozenset[str]] = (MedicalTask.RUNTIME_KEYS | {"radgraph"}) - {
        "data_dir", "hub_id", "revision", "label_source"
    }  # fmt: skip

    def read_declaration(self) -> None:
        """Nothing beyond what all tracks read.

        Raises:
            UserError: if the training split is to be scored.
        """
        if LEARNT_ON in self.splits:
            raise UserError(f"{self.task_name}: the probe learns on split {LEARNT_ON}; choose another one to score.")
        self._probe: dict[str, Any] = {}

    # --- data

    @cached_property
    def annotated(self) -> RadGraphSet:
        """The user's annotations."""
        return find_radgraph(self.runtime.get("radgraph"))

    @cached_property
    def data(self) -> Dataset:
        """The annotated texts as studies."""
        return self.annotated.dataset

    @cached_property
    def train_studies(self) -> tuple[Study, ...]:
        """What the probe learns from.

        Raises:
            UserError: if there are fewer than two.
        """
        train = tuple(study for study in self.data.studies if study.split == LEARNT_ON)
        if len(train) < 2:
            raise UserError(
                f"{self.task_name}: expected a training file beside the one to score (train.json and test.json in one "
                f"folder), to learn the probe from, but the annotations have {len(train)} reports in split {LEARNT_ON}."
            )
        return train

    # --- documents and requests

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per report to score."""
        return map(self._document, self.studies)

    def make_fitting_documents(self) -> Iterator[dict[str, Any]]:
        """One document per report to learn from."""
        return map(self._document, self.train_studies)

    def chosen_fitting_documents(self, *, limit: int | None, samples: Sequence[int] | None) -> list[dict[str, Any]]:
        """All of them: fewer would make another probe."""
        return self.fitting_documents

    def _document(self, study: Study) -> dict[str, Any]:
        return {**self.document_ids(study), "text": str(TextRef(study.findings)), "target": study.split}

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """The text."""
        text = TextRef(self.annotated.reports[doc["study_id"]].text)
        return Instance("embed_tokens", doc, (text,), 0, metadata=kwargs["metadata"])

    def make_row(self, doc: Mapping[str, Any], results: Sequence[TokenVectors]) -> ProbeRow:
        """The vectors of one report."""
        return ProbeRow(doc["study_id"], doc["patient_id"], doc["split"], "", results[0])

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Span F1 of all entities and of each label; precision and recall of all."""
        return (*METRICS, *SIDES)

    def estimate(self, rows: Sequence[ProbeRow]) -> Mapping[str, Estimate]:
        """Learns the probe and scores it; intervals are over the reports scored, with the probe as it is."""
        train = [row for row in rows if row.split == LEARNT_ON]
        scored = [row for row in rows if row.split != LEARNT_ON]
        if not scored:
            return dict.fromkeys(self.metric_names(), Estimate.undefined("no report", n=0))
        learnt = [self._report(row.study_id) for row in train]
        tags = [bio_tags(report) for report in learnt]
        probe = TokenProbe().fit([self._vectors(row) for row in train], tags)
        texts = [self.annotated.reports[row.study_id].text for row in scored]
        found = _reports(texts, probe.predict([self._vectors(row) for row in scored]))
        self._probe = {
            "penalty": probe.penalty,
            "train_reports": len(train),
            "train_words": sum(map(len, tags)),
            "words_cut": sum(self._cut(row) for row in rows),
            "vector_length": int(scored[0].tokens.vectors.shape[1]),
        }
        self._found = dict(zip((row.study_id for row in scored), found, strict=True))
        self._lookup = most_frequent_tags(learnt, tags)
        return self._estimates([row.study_id for row in scored], texts, found)

    def _estimates(self, ids: Sequence[str], texts: Sequence[str], found: Sequence[Report]) -> dict[str, Estimate]:
        gold = self._gold(ids)
        counts, names = self._counts(found, gold), self.metric_names()
        floors = _values(self._counts(_reports(texts, [self._lookup(text) for text in texts]), gold))
        ceilings = self._human(ids)
        extractor = EntityExtractor()
        rules = _values(self._counts([extractor.extract_tokens(text.split(" ")) for text in texts], gold))
        estimates = bootstrap_columns(
            lambda weights: _statistic(counts, weights),
            np.array(ids),
            positives=[int(np.mean([one.annotated.sum() for one in counts[name]])) for name in names],
            floors=[_defined(floors[name]) for name in names],
            extras=[
                {
                    "floor_is": "the most frequent tag of each word in the training split",
                    "floors": {"most_frequent_tag": _defined(floors[name]), RULES: _defined(rules[name])},
                    RULES: f"{extractor.name} {extractor.version}",
                }
                for name in names
            ],
        )
        return {name: replace(one, ceiling=ceilings.get(name)) for name, one in zip(names, estimates, strict=True)}

    def _gold(self, ids: Sequence[str]) -> list[list[Report]]:
        """Annotated reports, once per annotator; one that only one read stands for both."""
        reports = [self.annotated.reports[one] for one in ids]
        return [
            [
                {"text": report.text, "entities": own if own is not None else first_annotation(report)}
                for report, own in zip(reports, annotator, strict=True)
            ]
            for annotator in annotators(reports)
        ]

    def _counts(self, found: Sequence[Report], gold: Sequence[Sequence[Report]]) -> dict[str, list[MatchCounts]]:
        """Metric -> counts per report, once per annotator."""
        by_label = {
            f"entity_span_f1{suffix}": [
                entity_span_counts([_only(r, label) for r in found], [_only(r, label) for r in own]) for own in gold
            ]
            for suffix, label in LABELS.items()
        }
        return by_label | dict.fromkeys(SIDES, by_label[METRICS[0]])

    def _human(self, ids: Sequence[str]) -> dict[str, float]:
        """What the second annotator scores against the first, on the reports that both read."""
        twice = [one for one in ids if len(self.annotated.reports[one].annotations) > 1]
        if not twice:
            return {}
        first, second, *_ = self._gold(twice)
        values = _values(self._counts(second, [first]))
        return {name: value for name, value in values.items() if not np.isnan(value)}

    def _report(self, study_id: str) -> Report:
        report = self.annotated.reports[study_id]
        return {"text": report.text, "entities": first_annotation(report)}

    def _vectors(self, row: ProbeRow) -> NDArray[np.float64]:
        return word_vectors(self.annotated.reports[row.study_id].text, row.tokens.vectors, row.tokens.offsets)

    def _cut(self, row: ProbeRow) -> int:
        """Words of a text that no token reaches."""
        text = self.annotated.reports[row.study_id].text
        reached = max((start for start, end in row.tokens.offsets if end > start), default=-1)
        return len(text[reached:].split(" ")) - 1 if reached >= 0 else len(text.split(" "))

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds the probe, and how many reports two annotators read."""
        twice = sum(len(self.annotated.reports[doc["study_id"]].annotations) > 1 for doc in self.documents)
        return {
            **super().details(),
            "compared": "spans and labels of entities, exact; relations are not predicted",
            "probe": self._probe,
            "counts": {
                "reports": len(self.documents),
                "reports_read_by_two": twice,
                "reports_learnt_from": len(self.train_studies),
                "words_cut_by_the_tokenizer": self._probe.get("words_cut", 0),
            },
        }

    def score_records(self, rows: Sequence[ProbeRow]) -> Iterator[dict[str, Any]]:
        """One record per report: its own span F1."""
        ids = [row.study_id for row in rows]
        counts = self._counts([self._found[one] for one in ids], self._gold(ids)) if ids else {}
        for k, row in enumerate(rows):
            one = [MatchCounts(*(part[k : k + 1] for part in own)) for own in counts[METRICS[0]]]
            value = float(np.mean([weighted_micro_f1(own, np.ones((1, 1)))[0] for own in one]))
            yield self.score_record(row, METRICS[0], value=None if np.isnan(value) else value)


def most_frequent_tags(reports: Sequence[Report], tags: Sequence[Sequence[str]]) -> Callable[[str], list[str]]:
    """A tagger that gives each word, in any case, the tag it mostly has; of equally frequent ones the first by name.

    Words that are not there are outside.
    """
    counts: dict[str, Counter[str]] = {}
    for report, own in zip(reports, tags, strict=True):
        for word, tag in zip(report["text"].lower().split(" "), own, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    best = {word: min(one, key=lambda tag: (-one[tag], tag)) for word, one in counts.items()}
    return lambda text: [best.get(word, OUTSIDE) for word in text.lower().split(" ")]


def _reports(texts: Sequence[str], tags: Sequence[Sequence[str]]) -> list[Report]:
    return [{"text": text, "entities": entities_of(text, own)} for text, own in zip(texts, tags, strict=True)]


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _only(report: Report, label: str | None) -> Report:
    """The entities of one label, without relations: their ends may be of another."""
    kept = {
        key: {**entity, "relations": []}
        for key, entity in report["entities"].items()
        if label is None or entity["label"] == label
    }
    return {"text": report["text"], "entities": kept}


def _statistic(counts: Mapping[str, Sequence[MatchCounts]], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each metric's mean over annotators, (resamples, metrics)."""
    ways = dict(zip(SIDES, (weighted_micro_precision, weighted_micro_recall), strict=True))
    columns = [
        np.mean([ways.get(name, weighted_micro_f1)(one, weights) for one in own], axis=0)
        for name, own in counts.items()
    ]
    return np.column_stack(columns)


def _values(counts: Mapping[str, Sequence[MatchCounts]]) -> dict[str, float]:
    """Each metric on the reports as they are."""
    n = len(counts[METRICS[0]][0].matched)
    return dict(zip(counts, _statistic(counts, np.ones((1, n)))[0].tolist(), strict=True))

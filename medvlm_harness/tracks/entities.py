"""Entity extraction by models that write: a report in, a list of findings with their status out."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.radgraph_json import AnnotatedReport, read_radgraph
from medvlm_harness.metrics.entity_lists import best_constant_list
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.mesh import coded_findings, mesh_findings_version
from medvlm_harness.metrics.radgraph import Entities as RadGraphEntities
from medvlm_harness.metrics.sentences import split_sentences
from medvlm_harness.tracks.entity_answers import parse_entities
from medvlm_harness.tracks.entity_metrics import (
    ANNOTATION,
    MESH,
    PARSING,
    AnnotationScorer,
    ListScorer,
    MeshScorer,
    best_constant_findings,
    parsing_estimates,
)
from medvlm_harness.tracks.generation import GenerationTask, TextRow
from medvlm_harness.tracks.report_reading import ReportReader
from medvlm_harness.tracks.retrieval import study_texts

__all__ = ["Entities", "EntityListing"]

AGAINST_CODES = (
    "findings listed as present or uncertain, by their words, against the findings that the indexers of Open-i coded "
    "(metrics/mesh_findings.yaml)"
)
AGAINST_ANNOTATIONS = (
    "words of observations with their status, as sets per report; places and relations are not compared, and words "
    "that are anatomy to the annotators count on neither side (metrics/entity_lists.py)"
)


class EntityListing(GenerationTask):
    """`generate_until` requests: what the report speaks of, each finding with `present`, `absent` or `uncertain`.

    The answer may be JSON or any common form of list (tracks/entity_answers.py); what cannot be read of it is a metric.
    Floors are `constant`, the list that scores best on the train split when it is given for every study, where that
    split has the truth; and `copy`, the sentences of the report as a list. Beside them stands what the rules of
    labelers/entities.py score, which is no floor.
    """

    FLOORS: ClassVar[frozenset[str]] = frozenset({"constant", "copy"})
    SCORES: ClassVar[tuple[str, ...]]

    def read_declaration(self) -> None:
        """Adds what reads reports by rules."""
        super().read_declaration()
        self.reader = ReportReader()
        self._scorer: tuple[Sequence[str], ListScorer] | None = None

    # --- for subclasses

    @abstractmethod
    def constant_list(self) -> Sequence[tuple[str, str]] | None:
        """The best list for every study, learned on the train split; None where that has no truth."""

    @abstractmethod
    def scorer(self, ids: Sequence[str], reports: Sequence[str], floors: Mapping[str, Any]) -> ListScorer:
        """What scores the lists of these studies."""

    # --- floors

    @cached_property
    def _constant(self) -> str | None:
        listed = self.constant_list()
        return None if listed is None else as_json(listed)

    def floors_of(self, doc: Mapping[str, Any]) -> Mapping[str, str]:
        """The constant list where there is one, and the sentences of the report as it is given, one to a line."""
        constant = {} if self._constant is None else {"constant": self._constant}
        report = study_texts(self.as_asked(self.by_id[doc["study_id"]]))["report"]
        return {**constant, "copy": "\n".join(f"- {one}" for one in split_sentences(report))}

    # --- metrics

    def scores(self) -> tuple[str, ...]:
        """The names of the scores; those of parsing come on top."""
        return self.SCORES

    def metric_names(self) -> tuple[str, ...]:
        """Scores, and how much of the answers could be read."""
        return (*self.scores(), *PARSING)

    def lower_is_better(self) -> frozenset[str]:
        """What could not be read."""
        return frozenset({"items_unparsed"})

    def estimate(self, rows: Sequence[TextRow]) -> Mapping[str, Estimate]:
        """All metrics of one filter pipeline's answers."""
        if not rows:
            return dict.fromkeys(self.metric_names(), Estimate.undefined("no study", n=0))
        answers = [parse_entities(row.text) for row in rows]
        found = self._scorer_of(rows).estimates([answer.findings for answer in answers])
        return found | parsing_estimates(answers, [row.study_id for row in rows])

    def _scorer_of(self, rows: Sequence[TextRow]) -> ListScorer:
        ids = [row.study_id for row in rows]
        if self._scorer is None or self._scorer[0] != ids:
            by_id = {doc["study_id"]: doc for doc in self.documents}
            docs = [by_id[study_id] for study_id in ids]
            written = [self.floors_of(doc) for doc in docs]
            floors = {kind: [parse_entities(texts[kind]).findings for texts in written] for kind in written[0]}
            self._scorer = ids, self.scorer(ids, [doc["source"] for doc in docs], floors)
        return self._scorer[1]

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds what is compared, what read the texts, and how the answers were cut."""
        finished = [row.finished for row in self.rows if row.finished is not None]
        return {
            **super().details(),
            "read_by": {"entities": self.reader.entities_version},
            "constant_floor": self._constant,
            "answers_cut": sum(not one for one in finished) if finished else None,
        }

    def score_records(self, rows: Sequence[TextRow]) -> Iterator[dict[str, Any]]:
        """One record per study and score, and the items that were read and not read; of the first filter pipeline."""
        if not rows:
            return
        answers = [parse_entities(row.text) for row in rows]
        scores = self._scorer_of(rows).per_study([answer.findings for answer in answers])
        for k, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            for name, values in scores.items():
                value = None if np.isnan(values[k]) else float(values[k])
                yield self.score_record(row, name, value=value, answer=row.text_id)
            for name, count in (("items_listed", len(answer.findings)), ("items_unparsed", answer.unparsed)):
                yield self.score_record(row, name, value=float(count), answer=row.text_id)


class Entities(EntityListing):
    """Findings of each report, against what human indexers coded of it (MeSH), or against annotations the user has.

    Studies that nobody indexed are left out and counted: they are unlabelled, not normal. --metadata gold=PATH names a
    file in RadGraph's form whose keys are study ids and whose texts are findings and impression; then the studies that
    it holds are scored against it instead.

    YAML: as for `GenerationTask`.
    """

    RUNTIME_KEYS: ClassVar[frozenset[str]] = EntityListing.RUNTIME_KEYS | {"gold"}

    def scores(self) -> tuple[str, ...]:
        """Those of the truth that the run has."""
        return ANNOTATION if "gold" in self.runtime else MESH

    @cached_property
    def gold(self) -> Mapping[str, AnnotatedReport] | None:
        """Annotations by study; None where the run names none.

        Raises:
            UserError: if the file is none, or holds no study of this data set.
        """
        if "gold" not in self.runtime:
            return None
        path = Path(str(self.runtime["gold"])).expanduser()
        reports = read_radgraph(path)
        if not any(study.study_id in reports for study in self.data.studies):
            raise UserError(
                f"{self.task_name}: expected gold to have study ids of {self.data.manifest.name} as keys, such as "
                f"{self.data.studies[0].study_id!r}, but {path.name} has {next(iter(reports))!r}, ..."
            )
        return reports

    # --- documents

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study with a report and a truth."""
        for study in self.studies:
            report = study_texts(study).get("report")
            if report and self._has_truth(study):
                coded = coded_findings(study.mesh) if self.gold is None else None
                yield self.document(study, source=report, target="; ".join(sorted(coded or ())))

    def _has_truth(self, study: Study) -> bool:
        return coded_findings(study.mesh) is not None if self.gold is None else study.study_id in self.gold

    def what_studies_have(self) -> str:
        """Counts of reports and of studies with a truth."""
        reports = sum(bool(study_texts(study)) for study in self.studies)
        truth = "codes of an indexer" if self.gold is None else "annotations"
        return f"a report in {reports} and {truth} in {sum(map(self._has_truth, self.studies))}, never both"

    # --- floors and scores

    def constant_list(self) -> Sequence[tuple[str, str]] | None:
        """From the codes or annotations of the train split."""
        train = [study for study in self.data.studies if study.split == "train"]
        if self.gold is not None:
            known = [first_annotation(self.gold[s.study_id]) for s in train if s.study_id in self.gold]
            return best_constant_list(known).listed if known else None
        coded = [found for study in train if (found := coded_findings(study.mesh)) is not None]
        return [(finding, "present") for finding in best_constant_findings(coded)] if coded else None

    def scorer(self, ids: Sequence[str], reports: Sequence[str], floors: Mapping[str, Any]) -> ListScorer:
        """Against annotations where the run has them, else against codes."""
        if self.gold is not None:
            return AnnotationScorer(ids, annotators([self.gold[one] for one in ids]), reports, floors, self.reader)
        mesh = {study.study_id: study.mesh for study in self.studies}
        return MeshScorer(ids, [mesh[one] for one in ids], reports, floors, self.reader)

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds the truth, and what was left out."""
        no_report = sum(not study_texts(study) for study in self.studies)
        no_truth = sum(bool(study_texts(study)) and not self._has_truth(study) for study in self.studies)
        without = "studies_not_indexed" if self.gold is None else "studies_without_annotation"
        counts = {"studies": len(self.documents), "studies_without_report": no_report, without: no_truth}
        if self.gold is not None:
            counts["studies_annotated_on_another_text"] = self._other_texts(self.gold)
        codes = f"MeSH codes, mesh_findings.yaml {mesh_findings_version()}"
        return {
            **super().details(),
            "truth": codes if self.gold is None else "annotations",
            "compared": AGAINST_CODES if self.gold is None else AGAINST_ANNOTATIONS,
            "counts": counts,
        }

    def _other_texts(self, gold: Mapping[str, AnnotatedReport]) -> int:
        """Studies whose annotated text has other letters and digits than the report that the model is given."""
        return sum(_letters(doc["source"]) != _letters(gold[doc["study_id"]].text) for doc in self.documents)


def as_json(listed: Sequence[tuple[str, str]]) -> str:
    """A list as the prompt asks for it.

    >>> as_json([("effusion", "absent")])
    '[{"finding": "effusion", "status": "absent"}]'
    """
    return json.dumps([{"finding": phrase, "status": status} for phrase, status in listed], ensure_ascii=False)


def first_annotation(report: AnnotatedReport) -> RadGraphEntities:
    """The entities of a report by its only or first annotator."""
    return next(iter(report.annotations.values()))


def annotators(reports: Sequence[AnnotatedReport]) -> list[list[RadGraphEntities | None]]:
    """Entities per report, once per annotator; None where one did not read it."""
    readings = [list(report.annotations.values()) for report in reports]
    most = max(map(len, readings), default=1)
    return [[own[k] if k < len(own) else None for own in readings] for k in range(most)]


def _letters(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())

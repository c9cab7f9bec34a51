"""What tracks share in which a generated text is scored against a human one: from documents and rows to a scorer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.tracks.generation import GenerationTask, TextRow
from medvlm_harness.tracks.report_reading import ReadReports
from medvlm_harness.tracks.text_scorer import TextItems, TextScorer

__all__ = ["ScoredTexts"]


class ScoredTexts(ReadReports, GenerationTask):
    """`generate_until` requests whose answers a `TextScorer` holds against the reference texts of the studies.

    --metadata labeler=... is the labeler (`rules` by default) that reads generated and reference texts for label F1 and
    factuality, and says which studies are abnormal where a set was prepared without labels (see `ReadReports`).

    YAML: as for `GenerationTask`.
    """

    RUNTIME_KEYS: ClassVar[frozenset[str]] = GenerationTask.RUNTIME_KEYS | {"labeler"}
    SCORER: ClassVar[type[TextScorer]] = TextScorer

    def read_declaration(self) -> None:
        """As for `GenerationTask`."""
        super().read_declaration()
        self._scorer: TextScorer | None = None

    # --- for subclasses

    @abstractmethod
    def floor_texts(self) -> Mapping[str, Sequence[str]]:
        """Kind of floor -> what it writes, one text per document; kinds that learn do so on the train split.

        Raises:
            UserError: if that has nothing to learn from.
        """

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """What was left out."""

    def fact_source(self, doc: Mapping[str, Any]) -> str:
        """What a text must be true to."""
        return str(doc["source"])

    # --- floors

    @cached_property
    def floors(self) -> dict[str, dict[str, str]]:
        """Kind -> text per study id."""
        ids = [doc["study_id"] for doc in self.documents]
        return {kind: dict(zip(ids, texts, strict=True)) for kind, texts in self.floor_texts().items()}

    def floors_of(self, doc: Mapping[str, Any]) -> Mapping[str, str]:
        """What each kind of floor writes."""
        return {kind: texts[doc["study_id"]] for kind, texts in self.floors.items()}

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Those of the scorer."""
        return self.SCORER.metric_names()

    def lower_is_better(self) -> frozenset[str]:
        """Those of the scorer, such as the rates of what is wrong with a text, and their lifts."""
        return self.SCORER.LOWER_IS_BETTER

    def estimate(self, rows: Sequence[TextRow]) -> Mapping[str, Estimate]:
        """All metrics of one filter pipeline's texts."""
        if not rows:
            return dict.fromkeys(self.metric_names(), Estimate.undefined("no study", n=0))
        return self.scorer_of(rows).estimates([row.text for row in rows], [row.finished for row in rows])

    def scorer_of(self, rows: Sequence[Any]) -> TextScorer:
        """The scorer of these rows' studies."""
        ids = [row.study_id for row in rows]
        if self._scorer is None or self._scorer.items.study_ids != ids:
            docs = {doc["study_id"]: doc for doc in self.documents}
            chosen = [docs[study_id] for study_id in ids]
            comparisons = {study.study_id: study.comparison for study in self.studies}
            items = TextItems(
                study_ids=ids,
                sources=[self.fact_source(doc) for doc in chosen],
                references=[doc["target"] for doc in chosen],
                comparisons=[comparisons[study_id] for study_id in ids],
                abnormal=[doc["abnormal"] for doc in chosen],
                floors={kind: [texts[study_id] for study_id in ids] for kind, texts in self.floors.items()},
            )
            self._scorer = self.SCORER(items, self.reader)
        return self._scorer

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds what was left out, what read the texts, and label F1 of each label."""
        return {
            **super().details(),
            "abnormal_by": self.abnormal_by,
            "read_by": self.reader.versions(),
            "counts": {
                "studies": len(self.documents),
                "abnormal_studies": sum(doc["abnormal"] for doc in self.documents),
                **self.counts(),
            },
            **self.label_details(),
        }

    def label_details(self) -> dict[str, Any]:
        """Label F1 of each label."""
        per_label = self.scorer_of(self.rows).label_estimates([row.text for row in self.rows]) if self.rows else {}
        return {"label_f1": {name: estimate.to_dict() for name, estimate in per_label.items()}}

    def score_records(self, rows: Sequence[TextRow]) -> Iterator[dict[str, Any]]:
        """One record per study and score; of the first filter pipeline."""
        if not rows:
            return
        scores = self.scorer_of(rows).per_study([row.text for row in rows])
        for row, values in zip(rows, scores.tolist(), strict=True):
            for name, value in zip(self.SCORER.PER_STUDY, values, strict=True):
                yield self.score_record(row, name, value=value, answer=row.text_id)

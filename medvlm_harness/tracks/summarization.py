"""Report summarisation: the impression, written from the findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.summary_floors import copies, leads, most_frequent_summary, nearest_summaries
from medvlm_harness.tracks.generation import GenerationTask, TextRow
from medvlm_harness.tracks.report_pairs import ReportPairs
from medvlm_harness.tracks.summarization_metrics import (
    LOWER_IS_BETTER,
    PER_STUDY,
    SummaryItems,
    SummaryScorer,
    metric_names,
)

__all__ = ["Summarization"]

FLOORS = ("constant", "lead", "copy", "tfidf")


class Summarization(ReportPairs, GenerationTask):
    """`generate_until` requests: findings in, impression out, over the studies that have both, with an image or not.

    --metadata labeler=... is the labeler (`rules` by default) that reads generated and reference texts for label F1 and
    factuality, and says which studies are abnormal where a set was prepared without labels (see `ReportPairs`).

    YAML: as for `GenerationTask`.
    """

    RUNTIME_KEYS: ClassVar[frozenset[str]] = GenerationTask.RUNTIME_KEYS | {"labeler"}

    def read_declaration(self) -> None:
        """As for `GenerationTask`."""
        super().read_declaration()
        self._scorer: SummaryScorer | None = None

    # --- documents

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study with findings and impression."""
        for study, findings, impression in self.pairs:
            yield self.document(study, source=findings, target=impression, abnormal=self.is_abnormal(study))

    # --- floors

    @cached_property
    def _floors(self) -> dict[str, dict[str, str]]:
        """Kind -> text per study id; constant and nearest neighbour learn from the train split.

        Raises:
            UserError: if that has nothing to learn from.
        """
        self.require_train_pairs()
        known, written = zip(*((findings, impression) for _, findings, impression in self.train_pairs), strict=True)
        sources = [doc["source"] for doc in self.documents]
        texts = {
            "constant": [most_frequent_summary(written)] * len(sources),
            "lead": leads(sources),
            "copy": copies(sources),
            "tfidf": nearest_summaries(known, written, sources),
        }
        ids = [doc["study_id"] for doc in self.documents]
        return {kind: dict(zip(ids, texts[kind], strict=True)) for kind in FLOORS}

    def floors_of(self, doc: Mapping[str, Any]) -> Mapping[str, str]:
        """What each kind of floor writes."""
        return {kind: texts[doc["study_id"]] for kind, texts in self._floors.items()}

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """See `summarization_metrics.metric_names`."""
        return metric_names()

    def lower_is_better(self) -> frozenset[str]:
        """The rates of what is wrong with a text, and their lifts."""
        return LOWER_IS_BETTER

    def estimate(self, rows: Sequence[TextRow]) -> Mapping[str, Estimate]:
        """All metrics of one filter pipeline's texts."""
        if not rows:
            return dict.fromkeys(metric_names(), Estimate.undefined("no study", n=0))
        return self._scorer_of(rows).estimates([row.text for row in rows], [row.finished for row in rows])

    def _scorer_of(self, rows: Sequence[TextRow]) -> SummaryScorer:
        ids = [row.study_id for row in rows]
        if self._scorer is None or self._scorer.items.study_ids != ids:
            docs = {doc["study_id"]: doc for doc in self.documents}
            chosen = [docs[study_id] for study_id in ids]
            comparisons = {study.study_id: study.comparison for study in self.studies}
            items = SummaryItems(
                study_ids=ids,
                sources=[doc["source"] for doc in chosen],
                references=[doc["target"] for doc in chosen],
                comparisons=[comparisons[study_id] for study_id in ids],
                abnormal=[doc["abnormal"] for doc in chosen],
                floors={kind: [texts[study_id] for study_id in ids] for kind, texts in self._floors.items()},
            )
            self._scorer = SummaryScorer(items, self.reader)
        return self._scorer

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds what was left out, what read the texts, and label F1 of each label."""
        per_label = self._scorer_of(self.rows).label_estimates([row.text for row in self.rows]) if self.rows else {}
        return {
            **super().details(),
            "abnormal_by": self.abnormal_by,
            "read_by": self.reader.versions(),
            "counts": {
                "studies": len(self.documents),
                "abnormal_studies": sum(doc["abnormal"] for doc in self.documents),
                **self.left_out(),
            },
            "label_f1": {name: estimate.to_dict() for name, estimate in per_label.items()},
        }

    def score_records(self, rows: Sequence[TextRow]) -> Iterator[dict[str, Any]]:
        """One record per study and score; of the first filter pipeline."""
        if not rows:
            return
        scores = self._scorer_of(rows).per_study([row.text for row in rows])
        for row, values in zip(rows, scores.tolist(), strict=True):
            for name, value in zip(PER_STUDY, values, strict=True):
                yield self.score_record(row, name, value=value)

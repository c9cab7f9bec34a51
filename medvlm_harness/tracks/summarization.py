"""Report summarisation: the impression, written from the findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from medvlm_harness.metrics.summary_floors import copies, leads, most_frequent_summary, nearest_summaries
from medvlm_harness.tracks.report_pairs import ReportPairs
from medvlm_harness.tracks.scored_texts import ScoredTexts

__all__ = ["Summarization"]


class Summarization(ReportPairs, ScoredTexts):
    """`generate_until` requests: findings in, impression out, over the studies that have both, with an image or not.

    --metadata and YAML: as for `ScoredTexts`.
    """

    FLOORS: ClassVar[frozenset[str]] = frozenset({"constant", "lead", "copy", "tfidf"})

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study with findings and impression."""
        for study, findings, impression in self.pairs:
            yield self.document(study, source=findings, target=impression, abnormal=self.is_abnormal(study))

    def floor_texts(self) -> Mapping[str, Sequence[str]]:
        """Constant and nearest neighbour learn from the train split; all read the findings as a model is given them.

        Raises:
            UserError: if that has nothing to learn from.
        """
        self.require_train_pairs()
        known, written = zip(*((findings, impression) for _, findings, impression in self.train_pairs), strict=True)
        sources = [self.as_asked(self.by_id[doc["study_id"]]).findings.strip() for doc in self.documents]
        return {
            "constant": [most_frequent_summary(written)] * len(sources),
            "lead": leads(sources),
            "copy": copies(sources),
            "tfidf": nearest_summaries(known, written, sources),
        }

    def counts(self) -> dict[str, int]:
        """The studies that lack a section."""
        return self.left_out()

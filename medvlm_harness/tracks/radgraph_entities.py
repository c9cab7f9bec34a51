"""Entity extraction by models that write, on a user's RadGraph annotations with their own texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from medvlm_harness.data.records import Dataset
from medvlm_harness.metrics.entity_lists import best_constant_list
from medvlm_harness.tracks.entities import AGAINST_ANNOTATIONS, EntityListing, annotators, first_annotation
from medvlm_harness.tracks.entity_metrics import ANNOTATION, AnnotationScorer, ListScorer
from medvlm_harness.tracks.radgraph_set import RadGraphSet, find_radgraph

__all__ = ["RadGraphEntities"]


class RadGraphEntities(EntityListing):
    """What each report of RadGraph speaks of, against its annotators; where two read a report, the mean of both.

    The annotations are the user's own: --metadata radgraph=PATH, or the environment variable MEDVLM_RADGRAPH. Their
    text, tokens joined by blanks, is the report.

    YAML: as for `GenerationTask`; the text is {findings}.
    """

    SCORES = ANNOTATION
    PERTURBS = frozenset()  # what annotators marked are words of the text as it is
    # The files are the data set: no other place is looked at.
    RUNTIME_KEYS: ClassVar[frozenset[str]] = (EntityListing.RUNTIME_KEYS | {"radgraph"}) - {
        "data_dir", "hub_id", "revision", "label_source"
    }  # fmt: skip

    @cached_property
    def annotated(self) -> RadGraphSet:
        """The user's annotations."""
        return find_radgraph(self.runtime.get("radgraph"))

    @cached_property
    def data(self) -> Dataset:
        """The annotated texts as studies."""
        return self.annotated.dataset

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per annotated report."""
        for study in self.studies:
            yield self.document(study, source=study.findings, target="")

    def constant_list(self) -> Sequence[tuple[str, str]] | None:
        """From the annotations of the train split, where the user has it."""
        train = [study.study_id for study in self.data.studies if study.split == "train"]
        known = [first_annotation(self.annotated.reports[one]) for one in train]
        return best_constant_list(known).listed if known else None

    def scorer(self, ids: Sequence[str], reports: Sequence[str], floors: Mapping[str, Any]) -> ListScorer:
        """Against all annotators."""
        read = [self.annotated.reports[one] for one in ids]
        return AnnotationScorer(ids, annotators(read), reports, floors, self.reader)

    def details(self) -> dict[str, Any]:
        """Adds what is compared, and how many reports two annotators read."""
        twice = sum(len(self.annotated.reports[doc["study_id"]].annotations) > 1 for doc in self.documents)
        return {
            **super().details(),
            "truth": "annotations",
            "compared": AGAINST_ANNOTATIONS,
            "counts": {"reports": len(self.documents), "reports_read_by_two": twice},
        }

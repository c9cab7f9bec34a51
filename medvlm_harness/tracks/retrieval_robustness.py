"""Robustness of retrieval: images corrupted, or reports said otherwise, searched both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.consistency import consistency_estimates
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.retrieval import chance, rank_queries_by, recall_at
from medvlm_harness.metrics.robustness import CLEAN, Measure, robustness_estimates
from medvlm_harness.requests import Embedding, TextRef
from medvlm_harness.tracks.retrieval import Retrieval, study_texts
from medvlm_harness.tracks.robustness import GATE, IMAGES, REPORTS, RobustnessTask
from medvlm_harness.tracks.rows import Row

__all__ = ["RetrievalRobustness"]

K = 10
TIMES_CHANCE = 2  # what the lower end of the clean recall must exceed for retention


@dataclass(frozen=True, slots=True)
class PairRow(Row):
    """The vectors of one study under each condition: of its image, and of its report."""

    images: tuple[Embedding, ...]
    reports: tuple[Embedding, ...]
    report_id: str

    __str__ = Row.__str__

    @property
    def texts(self) -> Mapping[str, Embedding]:
        """As of a row of `Retrieval`: the clean report."""
        return {"report": self.reports[0]}


class RetrievalRobustness(RobustnessTask, Retrieval):
    """`embed` requests: recall at 10 both ways, with one side of every study perturbed and the other as it is.

    Of images: corrupted ones search among clean reports, and clean reports among corrupted images. Of reports: the same
    the other way round. With a substitute, each image's place is taken by it: an image of another patient finds the
    report no more often than by chance. A flip is another report on the first place for the image (equal reports count
    as one); reliance, that a substitute finds another.

    YAML: as for `RobustnessTask`, of images or reports, and for `Retrieval`.
    """

    KEYS: ClassVar[frozenset[str]] = RobustnessTask.KEYS | Retrieval.KEYS
    RUNTIME_KEYS: ClassVar[frozenset[str]] = RobustnessTask.RUNTIME_KEYS | Retrieval.RUNTIME_KEYS
    OF: ClassVar[tuple[str, ...]] = (IMAGES, REPORTS)
    MEASURES: ClassVar[tuple[str, ...]] = tuple(f"{direction}_recall@{K}" for direction in Retrieval.DIRECTIONS)

    def read_declaration(self) -> None:
        """As for both."""
        super().read_declaration()
        self.read_suite()

    # --- requests

    def _both_sides(self, doc: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """The image, and the report, under each condition; the other side's is the clean one again."""
        image, report = self.image_ref(doc), TextRef(self._texts[doc["study_id"]]["report"])
        stand_ins = self.stand_ins(self.images_by_file[doc["file"]])
        if self.of == IMAGES:
            images, reports = [image, *map(image.perturbed, self.cases)], [report] * (1 + len(self.cases))
        else:
            images = [image] * (1 + len(self.cases))
            reports = [report, *(TextRef(study_texts(said)["report"]) for said in self.said_otherwise(doc))]
        return [*images, *stand_ins], [*reports, *([report] * len(stand_ins))]

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Both sides under each condition, each distinct one once."""
        images, reports = self._both_sides(doc)
        distinct = dict.fromkeys((*images, *reports))
        return [
            Instance("embed", doc, (argument,), index, metadata=kwargs["metadata"])
            for index, argument in enumerate(distinct)
        ]

    def make_row(self, doc: Mapping[str, Any], results: Sequence[Embedding]) -> PairRow:  # type: ignore[override]
        """Vectors of one study."""
        images, reports = self._both_sides(doc)
        found = dict(zip(dict.fromkeys((*images, *reports)), results, strict=True))
        ids = doc["study_id"], doc["patient_id"], doc["split"], doc["file"]
        return PairRow(*ids, tuple(found[one] for one in images), tuple(found[one] for one in reports), str(reports[0]))

    # --- metrics

    def estimate(self, rows: Sequence[PairRow]) -> Mapping[str, Estimate]:
        """Each condition on the same studies and resamples; queries are resampled, the gallery stays."""
        studies = [row.study_id for row in rows]
        own = np.arange(len(rows))
        floor = float(recall_at(chance(own, own), K).mean()) if rows else 0.0
        self._recalls: dict[str, NDArray[np.float64]] = {}
        first = {}
        for k, condition in enumerate(self.conditions if rows else ()):
            images = np.stack([row.images[k].vector for row in rows])
            reports = np.stack([row.reports[k].vector for row in rows])
            ranked = [
                rank_queries_by(queries, gallery, [(own, own)])[0]
                for queries, gallery in ((images, reports), (reports, images))
            ]
            self._recalls[condition] = np.column_stack([recall_at(one, K) for one in ranked])
            first[condition] = _first(images, reports, [row.report_id for row in rows])
        found = robustness_estimates(
            {name: _mean(self._recalls.get(name)) for name in self.conditions},
            studies,
            [
                Measure(one, floor=floor, least_clean=min(TIMES_CHANCE * floor, 1.0), reference=self.reference.get(one))
                for one in self.MEASURES
            ],
            self.compared,
        )
        return self.keep({**found, **self._consistency(first, studies)})

    def _consistency(self, first: Mapping[str, NDArray[np.str_]], studies: Sequence[str]) -> dict[str, Estimate]:
        """Of the report on the first place: 1 where it is the one that the clean image finds."""
        none = np.empty((0, 1))
        same = {
            name: (first[name] == first[CLEAN])[:, None].astype(np.float64) if first else none
            for name in self.conditions
        }
        found = consistency_estimates(same, studies, keys=["first"], substitutes=self.stood_in, gates=[GATE])
        # The ceiling of decisions between yes and no is not one of searches.
        return {name: replace(estimate, ceiling=None) for name, estimate in found.items()}

    # --- results

    def score_records(self, rows: Sequence[PairRow]) -> Iterator[dict[str, Any]]:
        """One record per study, direction and condition: the recall; `direction@condition`."""
        for condition, recalls in self._recalls.items():
            for row, values in zip(rows, recalls.tolist(), strict=True):
                for direction, value in zip(self.DIRECTIONS, values, strict=True):
                    yield self.score_record(row, self.label_under(direction, condition), value=value)


def _first(images: NDArray[np.float32], reports: NDArray[np.float32], report_ids: Sequence[str]) -> NDArray[np.str_]:
    """The report that each image finds first, by its text."""
    found: NDArray[np.str_] = np.asarray(report_ids)[(images @ reports.T).argmax(axis=1)]
    return found


def _mean(values: NDArray[np.float64] | None) -> Callable[[Weights], NDArray[np.float64]]:
    """The weighted mean of each column, as a statistic."""
    columns = np.empty((0, len(RetrievalRobustness.MEASURES))) if values is None else values
    return lambda weights: weights @ columns / weights.sum(axis=1, keepdims=True)

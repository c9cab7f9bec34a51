"""Retrieval between images and reports: one item per study, searched both ways over the whole split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.data.labels import resolve
from medvlm_harness.data.records import Image, Study
from medvlm_harness.metrics.bootstrap import bootstrap_estimate, bootstrap_means, weighted_median
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.retrieval import (
    RankedQueries,
    chance,
    duplicate_ceiling,
    expected_rank,
    rank_queries_by,
    recall_at,
    reciprocal_rank,
)
from medvlm_harness.requests import Capability, Embedding, TextRef
from medvlm_harness.tracks.base import COMMON_KEYS, MedicalTask, Row

__all__ = ["Retrieval", "RetrievalRow"]

KS = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")
TEXTS = ("report", "findings", "impression")
# Metric suffix -> (text searched, what counts as a hit). A strict hit is the study's own; text class: an identical
# text; label overlap: the same non-empty set of positive labels.
VARIANTS = {
    "": ("report", "strict"),
    "_text_class": ("report", "text"),
    "_label_overlap": ("report", "labels"),
    "_findings": ("findings", "strict"),
    "_impression": ("impression", "strict"),
}
NO_LABELS = {"No Finding"}
PerQuery = Callable[[RankedQueries], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class RetrievalRow(Row):
    """The vectors of one study; a text that the study lacks is left out."""

    image_vector: Embedding
    texts: Mapping[str, Embedding]
    text_ids: Mapping[str, str]
    positives: tuple[str, ...] | None  # positive labels; None where the label source had nothing to read

    __str__ = Row.__str__


class Retrieval(MedicalTask):
    """`embed` requests: a study's first frontal image (by file name), its report, its findings and its impression.

    The report is the findings, then the impression. Studies without either, or without a frontal image, are left out
    and counted. YAML: `dataset`, and optionally `view` (frontal by default; null for the first image of any view).
    """

    OUTPUT_TYPE: ClassVar[str] = "embed"
    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"embed:image", "embed:text"})
    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS | {"view"}

    def read_declaration(self) -> None:
        """The view to search with."""
        self.view = self.declared.get("view", "frontal")

    # --- documents and requests

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study; texts are there as hashes."""
        for study in self.studies:
            image, texts = self._image(study), study_texts(study)
            if image is None or not texts:
                continue
            ids = {name: str(TextRef(text)) for name, text in texts.items()}
            yield {
                **self.document_ids(study, image),
                "texts": ids,
                "target": ids["report"],
                "positives": self._positives(study),
            }

    def _image(self, study: Study) -> Image | None:
        fitting = [image for image in study.images if self.view is None or image.view == self.view]
        return min(fitting, key=lambda image: image.file, default=None)

    def _positives(self, study: Study) -> list[str] | None:
        if not self.data.manifest.label_sources:
            return None
        labels = study.labels.get(self.label_source)
        if labels is None:
            return None
        return sorted(name for name in labels if name not in NO_LABELS and resolve(labels, name) == 1)

    @cached_property
    def _texts(self) -> dict[str, dict[str, str]]:
        return {study.study_id: study_texts(study) for study in self.studies}

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """The image first, then each text that the study has."""
        texts = self._texts[doc["study_id"]]
        arguments = [self.image_ref(doc), *(TextRef(text) for text in texts.values())]
        return [
            Instance("embed", doc, (argument,), index, metadata=kwargs["metadata"])
            for index, argument in enumerate(arguments)
        ]

    def make_row(self, doc: Mapping[str, Any], results: Sequence[Embedding]) -> RetrievalRow:
        """Vectors of one study."""
        texts = dict(zip(doc["texts"], results[1:], strict=True))
        positives = None if doc["positives"] is None else tuple(doc["positives"])
        return RetrievalRow(
            doc["study_id"], doc["patient_id"], doc["split"], doc["file"], results[0], texts, doc["texts"], positives
        )

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Recall at 1, 5 and 10 both ways for every variant; MRR and median rank for the strict search."""
        names = [f"{d}_recall@{k}{suffix}" for suffix in VARIANTS for d in DIRECTIONS for k in KS]
        return (*names, *(f"{d}_{what}" for d in DIRECTIONS for what in ("mrr", "median_rank")))

    def lower_is_better(self) -> frozenset[str]:
        """The median ranks."""
        return frozenset(f"{direction}_median_rank" for direction in DIRECTIONS)

    def estimate(self, rows: Sequence[RetrievalRow]) -> Mapping[str, Estimate]:
        """All metrics: queries resampled by study, the gallery as it is."""
        estimates: dict[str, Estimate] = {}
        self.ranks: dict[str, dict[str, float]] = {}
        for text in TEXTS:
            items = [row for row in rows if text in row.texts]
            variants = {suffix: hit for suffix, (searched, hit) in VARIANTS.items() if searched == text}
            if not items:
                undefined = Estimate.undefined(f"no study has any {text}", n=0)
                estimates |= {
                    f"{d}_recall@{k}{suffix}": undefined for suffix in variants for d in DIRECTIONS for k in KS
                }
                continue
            images = np.stack([row.image_vector.vector for row in items])
            texts = np.stack([row.texts[text].vector for row in items])
            classes = [_hit_classes(items, text, hit) for hit in variants.values()]
            for direction, queries, gallery in (("i2t", images, texts), ("t2i", texts, images)):
                ranked = rank_queries_by(queries, gallery, [(one, one) for one in classes])
                for suffix, one, found in zip(variants, classes, ranked, strict=True):
                    estimates |= self._variant(direction, suffix, items, one, found)
        return {name: estimates[name] for name in self.metric_names()}

    def _variant(
        self,
        direction: str,
        suffix: str,
        items: Sequence[RetrievalRow],
        classes: NDArray[np.int64],
        ranked: RankedQueries,
    ) -> dict[str, Estimate]:
        """The metrics of one direction of one variant, beside chance and what a perfect retriever reaches."""
        text, hit = VARIANTS[suffix]
        text_class = _classes([row.text_ids[text] for row in items])
        floor = chance(classes, classes)
        ceiling = duplicate_ceiling(classes, classes, text_class, text_class) if hit == "strict" else None
        asked = ranked.hits_tied > 0
        study_ids = np.array([row.study_id for row in items])[asked]
        ranked = _only(ranked, asked)
        summary = _Summary(ranked, _only(floor, asked), ceiling and _only(ceiling, asked), study_ids)
        means: dict[str, PerQuery] = {f"{direction}_recall@{k}{suffix}": partial(recall_at, k=k) for k in KS}
        if suffix:
            return summary.means(means)
        self.ranks[direction] = dict(zip(study_ids.tolist(), expected_rank(ranked), strict=True))
        means[f"{direction}_mrr"] = reciprocal_rank
        return {**summary.means(means), f"{direction}_median_rank": summary.median_rank()}

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds what was left out, and the share of texts that the tokenizer cut."""
        without_image = sum(self._image(study) is None for study in self.studies)
        without_text = sum(not study_texts(study) for study in self.studies if self._image(study) is not None)
        return {
            **super().details(),
            "label_source": self.label_source if self.data.manifest.label_sources else None,
            "counts": {
                "studies": len(self.documents),
                f"studies_without_{self.view or 'any'}_image": without_image,
                "studies_without_report": without_text,
                **{f"studies_with_{text}": sum(text in doc["texts"] for doc in self.documents) for text in TEXTS},
            },
            "truncated_share": {text: _truncated_share(self.rows, text) for text in TEXTS},
        }

    def score_records(self, rows: Sequence[RetrievalRow]) -> Iterator[dict[str, Any]]:
        """One record per study and direction: the expected rank of its own counterpart."""
        for row in rows:
            for direction, ranks in self.ranks.items():
                yield self.score_record(row, direction, rank=ranks.get(row.study_id))


class _Summary:
    """Means over queries with interval, beside what chance and a perfect retriever reach on the same queries."""

    def __init__(
        self, ranked: RankedQueries, floor: RankedQueries, ceiling: RankedQueries | None, studies: NDArray[np.str_]
    ) -> None:
        self.ranked, self.floor, self.ceiling, self.studies = ranked, floor, ceiling, studies

    def means(self, per_query: Mapping[str, PerQuery]) -> dict[str, Estimate]:
        """Means over the queries of what is computed of each."""
        if self.studies.size == 0:
            return {name: Estimate.undefined("no query has a hit", n=0) for name in per_query}
        found = bootstrap_means(
            np.stack([compute(self.ranked) for compute in per_query.values()], axis=1),
            self.studies,
            floors=[float(np.mean(compute(self.floor))) for compute in per_query.values()],
            ceilings=[1.0 if self.ceiling is None else float(np.mean(f(self.ceiling))) for f in per_query.values()],
        )
        return dict(zip(per_query, found, strict=True))

    def median_rank(self) -> Estimate:
        """Median of the expected ranks."""
        ranks = expected_rank(self.ranked)
        ceiling = 1.0 if self.ceiling is None else float(np.median(expected_rank(self.ceiling)))
        return bootstrap_estimate(
            lambda weights: weighted_median(ranks, weights),
            self.studies,
            floor=float(np.median(expected_rank(self.floor))),
            ceiling=ceiling,
        )


def study_texts(study: Study) -> dict[str, str]:
    """The texts of a study that has any: its report (findings, then impression), and the parts it has."""
    parts = {"findings": study.findings.strip(), "impression": study.impression.strip()}
    present = {name: text for name, text in parts.items() if text}
    return {"report": " ".join(present.values()), **present} if present else {}


def _hit_classes(rows: Sequence[RetrievalRow], text: str, hit: str) -> NDArray[np.int64]:
    if hit == "strict":
        return np.arange(len(rows))
    if hit == "text":
        return _classes([row.text_ids[text] for row in rows])
    return _classes(["|".join(row.positives) if row.positives else None for row in rows])


def _classes(names: Sequence[str | None]) -> NDArray[np.int64]:
    """One integer per distinct name; -1 for None."""
    numbers = {name: number for number, name in enumerate(sorted({name for name in names if name is not None}))}
    return np.array([-1 if name is None else numbers[name] for name in names], dtype=np.int64)


def _only(ranked: RankedQueries, asked: NDArray[np.bool_]) -> RankedQueries:
    return RankedQueries(ranked.greater[asked], ranked.tied[asked], ranked.hits_tied[asked], ranked.gallery)


def _truncated_share(rows: Sequence[RetrievalRow], text: str) -> float | None:
    """None where the model did not say."""
    flags = [row.texts[text].truncated for row in rows if text in row.texts]
    known = [flag for flag in flags if flag is not None]
    return sum(known) / len(known) if known else None

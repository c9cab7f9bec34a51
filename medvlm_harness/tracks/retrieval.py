"""Retrieval between images and reports: one item per study, searched both ways over the whole split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance

from medvlm_harness.data.records import Image, Study
from medvlm_harness.requests import Capability, Embedding, TextRef
from medvlm_harness.tracks.base import COMMON_KEYS
from medvlm_harness.tracks.perturbed import Perturbable
from medvlm_harness.tracks.rows import Row
from medvlm_harness.tracks.search import SearchRow, SearchTask, Side, Variant, numbered, truncated_share

__all__ = ["Retrieval", "RetrievalRow"]

TEXTS = ("report", "findings", "impression")


@dataclass(frozen=True, slots=True)
class RetrievalRow(SearchRow):
    """The vectors of one study."""

    image_vector: Embedding

    __str__ = Row.__str__


class Retrieval(SearchTask):
    """`embed` requests: a study's first frontal image (by file name), its report, its findings and its impression.

    The report is the findings, then the impression. Studies without either, or without a frontal image, are left out
    and counted. YAML: `dataset`, and optionally `view` (frontal by default; null for the first image of any view).
    """

    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"embed:image", "embed:text"})
    PERTURBS: ClassVar[frozenset[Perturbable]] = frozenset({"image", "report"})
    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS | {"view"}
    DIRECTIONS: ClassVar[tuple[str, str]] = ("i2t", "t2i")
    VARIANTS: ClassVar[Mapping[str, Variant]] = {
        "": Variant("report", "strict"),
        "_text_class": Variant("report", "text"),
        "_label_overlap": Variant("report", "labels"),
        "_findings": Variant("findings", "strict"),
        "_impression": Variant("impression", "strict"),
    }

    def read_declaration(self) -> None:
        """The view to search with."""
        self.view = self.declared.get("view", "frontal")

    # --- documents and requests

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study; texts are there as hashes."""
        for study in self.studies:
            image, texts = self._image(study), self._texts[study.study_id]
            if image is None or not texts:
                continue
            ids = {name: str(TextRef(text)) for name, text in texts.items()}
            yield {
                **self.document_ids(study, image),
                "texts": ids,
                "target": ids["report"],
                "positives": self.positives_of(study),
            }

    def _image(self, study: Study) -> Image | None:
        fitting = [image for image in study.images if self.view is None or image.view == self.view]
        return min(fitting, key=lambda image: image.file, default=None)

    @cached_property
    def _texts(self) -> dict[str, dict[str, str]]:
        return {study.study_id: study_texts(self.as_asked(study)) for study in self.studies}

    def input_sections(self) -> tuple[str, ...]:
        """Findings and impression; the report is both."""
        return "findings", "impression"

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
        ids = doc["study_id"], doc["patient_id"], doc["split"], doc["file"]
        return RetrievalRow(*ids, texts, doc["texts"], positives, results[0])

    # --- metrics and results

    def sides(self, rows: Sequence[RetrievalRow], text: str) -> tuple[Side, Side]:
        """Images, each of its own, and texts."""
        images = Side(np.stack([row.image_vector.vector for row in rows]), np.arange(len(rows)))
        known = numbered([row.text_ids[text] for row in rows])
        return images, Side(np.stack([row.texts[text].vector for row in rows]), known)

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
            "truncated_share": {text: truncated_share(self.rows, text) for text in TEXTS},
        }


def study_texts(study: Study) -> dict[str, str]:
    """The texts of a study that has any: its report (findings, then impression), and the parts it has."""
    parts = {"findings": study.findings.strip(), "impression": study.impression.strip()}
    present = {name: text for name, text in parts.items() if text}
    return {"report": " ".join(present.values()), **present} if present else {}

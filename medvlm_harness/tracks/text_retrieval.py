"""Text retrieval: each study's impression by its findings, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance

from medvlm_harness.requests import Capability, Embedding, TextRef
from medvlm_harness.tracks.perturbed import Perturbable
from medvlm_harness.tracks.report_pairs import ReportPairs
from medvlm_harness.tracks.search import SearchRow, SearchTask, Side, Variant, numbered, truncated_share

__all__ = ["TextRetrieval"]

SECTIONS = ("findings", "impression")


class TextRetrieval(ReportPairs, SearchTask):
    """`embed` requests: the findings and the impression of each study that has both, with an image or not.

    Beside the strict hit, the study's own text, there are two more: of a study whose impression is word for word the
    same (text class), or whose positive labels are (label overlap). Equal findings get equal vectors, as do equal
    impressions, so the ceilings count duplicates on both sides. YAML: `dataset`.
    """

    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"embed:text"})
    PERTURBS: ClassVar[frozenset[Perturbable]] = frozenset({"report"})
    DIRECTIONS: ClassVar[tuple[str, str]] = ("f2i", "i2f")
    VARIANTS: ClassVar[Mapping[str, Variant]] = {
        "": Variant("impression", "strict"),
        "_text_class": Variant("impression", "text"),
        "_label_overlap": Variant("impression", "labels"),
    }

    def read_declaration(self) -> None:
        """Nothing beside the data set."""

    # --- documents and requests

    @cached_property
    def _texts(self) -> dict[str, dict[str, TextRef]]:
        return {
            pair.study.study_id: {
                "findings": TextRef(self.as_asked(pair.study).findings.strip()),
                "impression": TextRef(pair.impression),
            }
            for pair in self.pairs
        }

    def input_sections(self) -> tuple[str, ...]:
        """The findings: impressions, their counterparts, stay as they are."""
        return ("findings",)

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study; texts are there as hashes.

        `counterparts` holds the impressions that its findings go with, each with the chance that this is a hit.
        """
        pairs = [tuple(map(str, texts.values())) for texts in self._texts.values()]
        times, copies = Counter(pairs), Counter(impression for _, impression in pairs)
        counterparts: dict[str, dict[str, float]] = {}
        for (findings, impression), count in sorted(times.items()):
            counterparts.setdefault(findings, {})[impression] = count / copies[impression]
        for study, *_ in self.pairs:
            ids = {section: str(text) for section, text in self._texts[study.study_id].items()}
            yield {
                **self.document_ids(study),
                "texts": ids,
                "target": ids["impression"],
                "counterparts": counterparts[ids["findings"]],
                "positives": self.positives_of(study),
            }

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """The findings, then the impression."""
        texts = self._texts[doc["study_id"]]
        return [
            Instance("embed", doc, (texts[section],), index, metadata=kwargs["metadata"])
            for index, section in enumerate(SECTIONS)
        ]

    def make_row(self, doc: Mapping[str, Any], results: Sequence[Embedding]) -> SearchRow:
        """Vectors of one study."""
        texts = dict(zip(SECTIONS, results, strict=True))
        positives = None if doc["positives"] is None else tuple(doc["positives"])
        return SearchRow(doc["study_id"], doc["patient_id"], doc["split"], "", texts, doc["texts"], positives)

    # --- metrics and results

    def sides(self, rows: Sequence[SearchRow], text: str) -> tuple[Side, Side]:
        """Findings and impressions."""
        findings, impressions = (
            Side(
                np.stack([row.texts[section].vector for row in rows]),
                numbered([row.text_ids[section] for row in rows]),
            )
            for section in SECTIONS
        )
        return findings, impressions

    def details(self) -> dict[str, Any]:
        """Adds what was left out, how many texts differ, and the share of texts that the tokenizer cut."""
        return {
            **super().details(),
            "label_source": self.label_source if self.data.manifest.label_sources else None,
            "counts": {
                "studies": len(self.documents),
                **self.left_out(),
                **{f"distinct_{name}": len({doc["texts"][name] for doc in self.documents}) for name in SECTIONS},
            },
            "truncated_share": {section: truncated_share(self.rows, section) for section in SECTIONS},
        }

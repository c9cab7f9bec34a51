"""Zero-shot classification of reports: the report-reading ceiling of zero-shot classification of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.requests import Capability, TextRef
from medvlm_harness.tracks.perturbed import Perturbable
from medvlm_harness.tracks.zero_shot import ZeroShot

__all__ = ["TextZeroShot"]


class TextZeroShot(ZeroShot):
    """One `classify` request per study with the text of its findings, and the whole label set.

    The labels were read off such texts, so this is no task about images: it is what a model reaches at most that has
    to go by the same phrases, the report-reading ceiling of `ZeroShot`. Labels, phrases, and metrics are those of
    `ZeroShot`; studies without an image take part, those without findings are left out and counted.

    YAML: as for `ZeroShot`, without `views`; `target` is a subgroup field of the study.
    """

    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"classify:text"})
    PERTURBS: ClassVar[frozenset[Perturbable]] = frozenset({"report"})
    KEYS: ClassVar[frozenset[str]] = ZeroShot.KEYS - {"views"}

    def read_declaration(self) -> None:
        """As for `ZeroShot`; a text has no view."""
        super().read_declaration()
        if self.target == "view":
            raise UserError(f"{self.task_name}: expected `target:` to name a subgroup field, but got 'view' of a text.")

    def inputs(self, study: Study) -> Iterable[Image | None]:
        """The findings, where there are any."""
        return [None] if study.findings.strip() else []

    def input_sections(self) -> tuple[str, ...]:
        """The findings."""
        return ("findings",)

    @cached_property
    def _findings(self) -> dict[str, TextRef]:
        return {study.study_id: TextRef(self.as_asked(study).findings.strip()) for study in self.data.studies}

    def input_ref(self, doc: Mapping[str, Any]) -> TextRef:
        """The findings."""
        return self._findings[doc["study_id"]]

    def what_studies_have(self) -> str:
        """How many have findings."""
        return f"findings in {sum(bool(study.findings.strip()) for study in self.studies)}"

    def counts(self) -> dict[str, int]:
        """What is scored, and what was left out."""
        without = sum(not study.findings.strip() for study in self.studies)
        return {
            "studies": len(self.documents),
            "scored_without_image": sum(not study.images for study in self.studies if study.findings.strip()),
            "studies_without_findings": without,
            "studies_without_target": len(self.studies) - without - len(self.documents),
        }

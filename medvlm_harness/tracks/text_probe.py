"""Linear probe of text encoders: what a linear classifier reads off their frozen vectors of findings."""

from __future__ import annotations

from typing import Any, ClassVar

from medvlm_harness.data.records import Image, Study
from medvlm_harness.requests import Capability
from medvlm_harness.tracks.probe import Probe
from medvlm_harness.tracks.text_zero_shot import TextZeroShot

__all__ = ["TextProbe"]


class TextProbe(Probe, TextZeroShot):
    """`Probe` of the findings. Findings repeat between train and test: hence the floor that repeats labels.

    YAML: as for `TextZeroShot`, of which phrases and questions go unused; multilabel alone.
    """

    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"embed:text"})
    KEYS: ClassVar[frozenset[str]] = TextZeroShot.KEYS - {"target"}

    @property
    def input_name(self) -> str:
        """Findings."""
        return "findings"

    def document(self, study: Study, image: Image | None, targets: dict[str, list[int | None]]) -> dict[str, Any]:
        """Adds the hash of the findings."""
        doc = super().document(study, image, targets)
        return {**doc, "texts": {"findings": str(self.input_ref(doc))}}

    def details(self) -> dict[str, Any]:
        """Adds the share of findings that the tokenizer cut."""
        cut = [row.vector.truncated for row in self.rows if row.vector.truncated is not None]
        return {**super().details(), "truncated_share": {"findings": sum(cut) / len(cut) if cut else None}}

"""The scores of generated reports: those of every generated text, the field's own, and how much the texts differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics.bleu import bleu_settings, corpus_bleu, ngram_counts, tokens_13a
from medvlm_harness.metrics.bootstrap import Weights
from medvlm_harness.metrics.coco import REFERENCE_LIMIT, coco_rouge_l, coco_settings, coco_tokens
from medvlm_harness.tracks.text_scorer import TextScorer

__all__ = ["ReportScorer", "modal_share"]


class ReportScorer(TextScorer):
    """Adds BLEU-4, BLEU-4 and ROUGE-L in the field's convention, and `modal_share`.

    `modal_share` is the share of texts that equal the most frequent one but for case and white space: 1 for a model
    that says the same of every image. Read it beside that of the human reports (`details`).
    """

    PER_STUDY: ClassVar[tuple[str, ...]] = (*TextScorer.PER_STUDY, "rougeL_coco")
    CORPUS: ClassVar[tuple[str, ...]] = ("bleu4", "bleu4_coco", "modal_share")
    LOWER_IS_BETTER: ClassVar[frozenset[str]] = TextScorer.LOWER_IS_BETTER | {"modal_share", "modal_share_abnormal"}

    def columns(self, written: Sequence[str], wanted: Sequence[str]) -> list[NDArray[np.float64]]:
        """The scores of `PER_STUDY`, (n,) each."""
        return [*super().columns(written, wanted), coco_rouge_l(written, wanted)]

    def computed_by(self) -> dict[str, str]:
        """What computes each score."""
        ours = {"bleu4": bleu_settings(), "modal_share": "case and white space do not matter"}
        return {**super().computed_by(), **ours, **dict.fromkeys(("rougeL_coco", "bleu4_coco"), coco_settings())}

    def corpus(self, texts: Sequence[str], chosen: NDArray[np.bool_]) -> Callable[[Weights], NDArray[np.float64]]:
        """BLEU-4 in both conventions, and the modal share."""
        pairs = [pair for pair, one in zip(zip(texts, self.items.references, strict=True), chosen, strict=True) if one]
        plain = ngram_counts((tokens_13a(text), tokens_13a(reference)) for text, reference in pairs)
        cleaned = ngram_counts(
            (coco_tokens(text), coco_tokens(reference, limit=REFERENCE_LIMIT)) for text, reference in pairs
        )
        modal = _is_modal([text for text, _ in pairs])

        def statistic(weights: Weights) -> NDArray[np.float64]:
            # The share of this one text: the most frequent of each resample would be too frequent.
            share = weights @ modal / weights.sum(axis=1)
            return np.column_stack([corpus_bleu(plain, weights), corpus_bleu(cleaned, weights, coco=True), share])

        return statistic


def modal_share(texts: Sequence[str]) -> float:
    """Share of the texts that equal the most frequent one, in [0, 1]."""
    return float(_is_modal(texts).mean())


def _is_modal(texts: Sequence[str]) -> NDArray[np.float64]:
    """1 for each text that equals the most frequent one, of equally frequent ones the first in the alphabet; (n,)."""
    plain = [" ".join(text.lower().split()) for text in texts]
    _, place, counts = np.unique(plain, return_inverse=True, return_counts=True)
    return np.asarray(place == counts.argmax(), dtype=np.float64)

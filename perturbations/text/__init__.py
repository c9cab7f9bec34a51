"""Text perturbations: the same said otherwise, guarded so that negation, sides and labels stay; and a control."""

from __future__ import annotations

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.perturbations.text.base import PerturbedText, TextCase, TextPerturbation, perturb_text
from medvlm_harness.perturbations.text.layout import CASE, PUNCTUATION, SECTION_ORDER, SENTENCE_ORDER, SPACING
from medvlm_harness.perturbations.text.paraphrase import PARAPHRASE, paraphrases, prompt_variants
from medvlm_harness.perturbations.text.polarity import POLARITY_FLIP, flip_label, flip_question
from medvlm_harness.perturbations.text.words import (
    ABBREVIATED_FINDINGS,
    ABBREVIATIONS,
    SYNONYMS,
    TYPOS,
    TYPOS_IN_FINDINGS,
)

__all__ = [
    "TEXT_PERTURBATIONS",
    "PerturbedText",
    "TextCase",
    "TextPerturbation",
    "find_text_perturbation",
    "flip_label",
    "flip_question",
    "paraphrases",
    "perturb_text",
    "prompt_variants",
]

TEXT_PERTURBATIONS: tuple[TextPerturbation, ...] = (
    TYPOS,
    TYPOS_IN_FINDINGS,
    ABBREVIATIONS,
    ABBREVIATED_FINDINGS,
    SYNONYMS,
    CASE,
    PUNCTUATION,
    SPACING,
    SENTENCE_ORDER,
    SECTION_ORDER,
    PARAPHRASE,
    POLARITY_FLIP,
)


def find_text_perturbation(name: str) -> TextPerturbation:
    """The perturbation of a name.

    Raises:
        UserError: if there is none.
    """
    known = {perturbation.name: perturbation for perturbation in TEXT_PERTURBATIONS}
    if name not in known:
        raise UserError(f"No text perturbation {name!r}.{near_matches(name, known)}")
    return known[name]

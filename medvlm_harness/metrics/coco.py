"""The field's convention for generated reports, so that published tables of report generation compare.

R2Gen and what follows it clean both texts, cut them at 60 tokens, and score them by COCO's caption evaluation: corpus
BLEU without smoothing, and ROUGE-L with beta 1.2, which weighs recall above precision. These values are not those of
sacrebleu and rouge-score. R2Gen also replaces words that its training texts have less than three times by one mark, in
the references too; we keep them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics._texts import checked_pairs

__all__ = ["BETA", "LIMIT", "REFERENCE_LIMIT", "clean_report", "coco_rouge_l", "coco_settings", "coco_tokens"]

BETA = 1.2
LIMIT = 60
REFERENCE_LIMIT = LIMIT - 1  # R2Gen's 60 of a reference include the mark that begins it
# What R2Gen takes out of a sentence. Its expression has the range from ":" to "[", which holds "<", "=", ">", "?" and
# "@" besides the marks that were meant, and leaves the hyphen in.
_MARKS = re.compile(r"[.,?;*!%^&_+():<=>@\[\]{}\"/\\']")


def clean_report(text: str) -> str:
    """A report as R2Gen cleans those of IU X-Ray: lower case, sentences joined and ended by " . ", no other mark.

    Numbers of lists go up to 5; decimal points go, so that "3.5 cm" is "35 cm".

    >>> clean_report("1. Heart size is normal. 2. No effusion, or pneumothorax.")
    'heart size is normal . no effusion or pneumothorax .'
    """
    for _ in range(3):
        text = text.replace("..", ".")
    text = text.replace("1. ", "")
    for lead in (". ", " "):
        for number in range(2, 6):
            text = text.replace(f"{lead}{number}. ", ". ")
    sentences = text.strip().lower().split(". ")
    return " . ".join(_MARKS.sub("", sentence.strip()) for sentence in sentences) + " ."


def coco_tokens(text: str, *, limit: int = LIMIT) -> list[str]:
    """The cleaned text's first `limit` tokens; none of an empty text."""
    return clean_report(text).split()[:limit] if text.strip() else []


def coco_rouge_l(generated: Sequence[str | None], references: Sequence[str | None]) -> NDArray[np.float64]:
    """ROUGE-L of COCO's caption evaluation over cleaned, cut tokens; in [0, 1], shape (n,), higher is better.

    F = (1 + beta^2) P R / (R + beta^2 P) with beta 1.2; 0 where no token is common.

    Raises:
        ValueError: if the lengths differ or something is no text.

    Source: Lin 2004; beta from pycocoevalcap.
    """
    scores = []
    for text, reference in checked_pairs(generated, references):
        ours, theirs = coco_tokens(text), coco_tokens(reference, limit=REFERENCE_LIMIT)
        common = _common_length(ours, theirs)
        if common == 0:
            scores.append(0.0)
            continue
        precision, recall = common / len(ours), common / len(theirs)
        scores.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision))
    return np.array(scores, dtype=np.float64)


def coco_settings() -> str:
    """What must stand beside these scores."""
    return f"R2Gen's cleaning, {LIMIT} tokens (references {REFERENCE_LIMIT}), COCO's BLEU, ROUGE-L beta {BETA}"


def _common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for place, other in enumerate(right, 1):
            diagonal, row[place] = row[place], diagonal + 1 if token == other else max(row[place], row[place - 1])
    return row[-1]

"""The positive control: a text that says or asks the opposite, so that a model that reads must answer otherwise."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from medvlm_harness.errors import UserError
from medvlm_harness.labelers.text import stretches_to_read
from medvlm_harness.perturbations.text.base import Level, TextPerturbation
from medvlm_harness.perturbations.text.guard import Edit, sentence_spans
from medvlm_harness.perturbations.text.paraphrase import as_stated, parse_question
from medvlm_harness.perturbations.text.terms import terms
from medvlm_harness.requests import Label

__all__ = ["POLARITY_FLIP", "flip_label", "flip_question"]

# What a sentence says -> what it would say of the opposite; the first that fits. The guard checks what came of it.
_FLIPS = (
    (r"(there (?:is|are)) no (?:evidence of )?(?P<x>.+)", r"\1 \g<x>"),
    (r"(there (?:is|are)) (?:an? )?(?P<x>.+)", r"\1 no \g<x>"),
    (r"no (?:evidence of )?(.+?) (is|are) (seen|present|noted|identified|demonstrated)", r"\1 \2 \3"),
    (r"no (?:evidence of )?(?P<x>.+)", r"\g<x>"),
    (r"(.+?) (is|are) not (.+)", r"\1 \2 \3"),
    (r"(.+?) (is|are) (seen|present|noted|identified|demonstrated|enlarged|widened)\b(.*)", r"\1 \2 not \3\4"),
    (r"(?:an? )?(.+)", r"no \1"),
)
_FLIP_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE | re.DOTALL), new) for pattern, new in _FLIPS)
_DENIED = re.compile(r"(?:no|not|neither|without)\b", re.IGNORECASE)
_DENYING = re.compile(r"\b(?:no|not)\b", re.IGNORECASE)
_OR = re.compile(r",? or ", re.IGNORECASE)


def flip_question(question: str) -> str | None:
    """The question of which the answer is the opposite; None where the question fits no template or denies.

    `perturb_text` inverts only what the labeler can check; this, whatever is asked about.

    >>> flip_question("Is there pneumothorax?")
    'Can pneumothorax be ruled out?'
    """
    parsed = parse_question(question)
    if parsed is None or _DENIED.match(parsed.x):
        return None
    return terms().inverted_question.format(x=re.sub(r"^any\s+", "", parsed.x))


def flip_label(label: Label) -> Label:
    """The label with positive and negative phrases in each other's place, and the inverted question.

    Raises:
        UserError: if it has no negative phrases, or its question cannot be inverted.
    """
    question = flip_question(label.question) if label.question else ""
    if not label.negative or question is None:
        lacks = "negative phrases" if not label.negative else f"a question like {terms().questions['singular'][0]!r}"
        raise UserError(f"Expected label {label.name!r} to have {lacks}: without them it cannot be inverted.")
    return replace(label, positive=label.negative, negative=label.positive, question=question)


def _flipped(text: str, level: Level, rng: np.random.Generator) -> list[Edit]:
    """Each sentence as its opposite."""
    edits = []
    for stretch in stretches_to_read(text):  # so that heads stay
        for start, end in sentence_spans(text[stretch.start : stretch.end]):
            part = text[stretch.start + start : stretch.start + end]
            sentence = part.strip()
            if sentence.strip(".!?"):
                begin = stretch.start + start + part.index(sentence)
                edits.append(Edit(begin, begin + len(sentence), _opposite(sentence)))
    return edits


def _opposite(sentence: str) -> str:
    if sentence.endswith("?"):
        return flip_question(sentence) or sentence
    body = sentence.rstrip(".!")
    pattern, new = next(flip for flip in _FLIP_PATTERNS if flip[0].fullmatch(body))  # the last fits everything
    flipped = pattern.sub(new, body, count=1)
    if not _DENYING.search(flipped):  # "no A or B" inverted is "A and B"; "A or B" would leave both uncertain
        flipped = _OR.sub(" and ", flipped)
    return flipped[0].upper() + flipped[1:] + sentence[len(body) :]


POLARITY_FLIP = TextPerturbation(
    "polarity_flip",
    of=("report", "prompt"),
    levels=("flipped",),
    apply=_flipped,
    says="the opposite: what is there is denied and the reverse; can it be ruled out?",
    control=True,
    read=as_stated,
)

"""The same words set otherwise: case, punctuation, spacing, and the order of sentences and sections."""

from __future__ import annotations

import re

import numpy as np

from medvlm_harness.labelers.text import stretches_to_read
from medvlm_harness.metrics.sentences import split_sentences
from medvlm_harness.perturbations.text.base import Level, TextPerturbation
from medvlm_harness.perturbations.text.guard import Edit, sentence_spans

__all__ = ["CASE", "PUNCTUATION", "SECTION_ORDER", "SENTENCE_ORDER", "SPACING"]

# What stays as it is: the de-identification token, and placeholders such as <image>.
_FIXED = re.compile(r"(X{2,}|<[^<>\s]+>)")
_PUNCTUATION = {
    "no last stop": (re.compile(r"\.(?=\s*(?:\n|\Z))"), ""),
    "no commas": (re.compile(r",(?=\s)"), ""),
    "semicolons": (re.compile(r"(?<=[a-z])\.(?=[ \t]+[A-Z])"), ";"),
}
_SPACING = {
    "double": (re.compile(r"(?<=\S) (?=\S)"), "  "),
    "before marks": (re.compile(r"(?<=\w)(?=[.,;](?:\s|\Z))"), " "),
    "line per sentence": (re.compile(r"(?<=[.!?])[ \t]+(?=\S)"), "\n"),
}
_LIST_ITEM = re.compile(r"\(?\d{1,2}[.)]")
_LINE = re.compile(r"[^\s][^\n]*")
_HEAD = re.compile(r"(?:final\s+)?[a-z]+[\s*_]*:\**\Z", re.IGNORECASE)


def _case(text: str, level: Level, rng: np.random.Generator) -> list[Edit]:
    """Each sentence in lower case or in capitals."""
    change = str.upper if level == "upper" else str.lower
    return [
        Edit(start, end, "".join(part if _FIXED.fullmatch(part) else change(part) for part in parts))
        for start, end in sentence_spans(text)
        for parts in [_FIXED.split(text[start:end])]
    ]


def _punctuation(text: str, level: Level, rng: np.random.Generator) -> list[Edit]:
    pattern, new = _PUNCTUATION[str(level)]
    return [Edit(*match.span(), new) for match in pattern.finditer(text)]


def _spacing(text: str, level: Level, rng: np.random.Generator) -> list[Edit]:
    pattern, new = _SPACING[str(level)]
    return [Edit(*match.span(), new) for match in pattern.finditer(text)]


def _sentence_order(text: str, level: Level, rng: np.random.Generator) -> list[Edit]:
    """The sentences of each line in another order, never in theirs; numbered lists stay."""
    edits = []
    for stretch in stretches_to_read(text):
        for line in _LINE.finditer(text, stretch.start, stretch.end):
            old = line[0].rstrip()
            sentences = split_sentences(old)
            if len(sentences) < 2 or any(_LIST_ITEM.match(sentence) for sentence in sentences):
                continue
            order = np.argsort(rng.random(len(sentences)))
            if (np.diff(order) == 1).all():
                order = order[::-1]
            moved = [sentences[k] if sentences[k][-1] in ".!?" else f"{sentences[k]}." for k in order]
            edits.append(Edit(line.start(), line.start() + len(old), " ".join(moved)))
    return edits


def _section_order(text: str, level: Level, rng: np.random.Generator) -> list[Edit]:
    """FINDINGS and IMPRESSION, heads and all, in each other's place; what stands between stays."""
    read = [stretch for stretch in stretches_to_read(text) if stretch.section in ("findings", "impression")]
    if len(read) != 2 or read[0].section == read[1].section:
        return []
    blocks = []
    for stretch in read:
        head = _HEAD.search(text[: stretch.start].rstrip())
        if head is None:
            return []
        blocks.append((head.start(), stretch.start + len(text[stretch.start : stretch.end].rstrip())))
    (start, stop), (other_start, other_stop) = blocks
    new = text[other_start:other_stop] + text[stop:other_start] + text[start:stop]
    return [Edit(start, other_stop, new)]


CASE = TextPerturbation(
    "case", of=("report", "prompt"), levels=("lower", "upper"), apply=_case, says="one case throughout"
)
PUNCTUATION = TextPerturbation(
    "punctuation",
    of=("report", "prompt"),
    levels=tuple(_PUNCTUATION),
    apply=_punctuation,
    says="without the last stop of a line; without commas; semicolons between sentences",
)
SPACING = TextPerturbation(
    "spacing",
    of=("report", "prompt"),
    levels=tuple(_SPACING),
    apply=_spacing,
    says="blanks doubled; a blank before stops and commas; a line for each sentence",
)
SENTENCE_ORDER = TextPerturbation(
    "sentence_order",
    of=("report",),
    levels=("shuffled",),
    apply=_sentence_order,
    says="sentences in another order within their line and section",
)
SECTION_ORDER = TextPerturbation(
    "section_order",
    of=("report",),
    levels=("swapped",),
    apply=_section_order,
    says="FINDINGS and IMPRESSION in each other's place",
)

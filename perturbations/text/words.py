"""Other words for the same: slips of the keyboard, abbreviations, synonyms of findings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from medvlm_harness.labelers.lexicon import lexicon
from medvlm_harness.metrics.laterality import side_words
from medvlm_harness.perturbations.text.base import Level, TextPerturbation
from medvlm_harness.perturbations.text.guard import Edit, protected_words
from medvlm_harness.perturbations.text.terms import terms

__all__ = ["ABBREVIATED_FINDINGS", "ABBREVIATIONS", "SYNONYMS", "TYPOS", "TYPOS_IN_FINDINGS"]

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# Four letters or more, and neither a section's head nor a placeholder such as <image>.
_WORD = re.compile(r"(?<![\w<'’])[A-Za-z]{4,}(?![\w>'’]|\s*:)")

_ARTICLE = re.compile(r"\b(an?)\s+\Z", re.IGNORECASE)


def _typos(text: str, rate: Level, rng: np.random.Generator) -> list[Edit]:
    """At most one slip a word: each letter but the first is struck wrong with the rate as its chance."""
    edits = []
    for word in _WORD.finditer(text):
        lower = word[0].lower()
        if lower in protected_words() or side_words(lower) or set(lower) == {"x"}:
            continue
        struck = np.flatnonzero(rng.random(len(lower) - 1) < float(rate))
        if struck.size:
            place = word.start() + 1 + int(struck[0])
            edits.append(_slip(text, place, word.end(), rng))
    return edits


def _slip(text: str, place: int, end: int, rng: np.random.Generator) -> Edit:
    """One letter for its neighbour on the keyboard, left out, doubled, or swapped with the next."""
    letter, kind = text[place], int(rng.random() * 4)
    if kind == 0:
        return Edit(place, place + 1, "")
    if kind == 1:
        return Edit(place, place + 1, letter * 2)
    if kind == 2 and place + 1 < end and text[place + 1] != letter:
        return Edit(place, place + 2, text[place + 1] + letter)
    near = _neighbours()[letter.lower()]
    new = near[int(rng.random() * len(near))]
    return Edit(place, place + 1, new.upper() if letter.isupper() else new)


@cache
def _neighbours() -> dict[str, str]:
    """Letter -> the letters beside it, and above and below it, on a US keyboard."""
    at = {(r, c): letter for r, row in enumerate(_ROWS) for c, letter in enumerate(row)}
    steps = ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0))  # each row stands half a key to the right
    return {x: "".join(at[r + i, c + j] for i, j in steps if (r + i, c + j) in at) for (r, c), x in at.items()}


def _mended(text: str) -> str:
    """The text with words taken for those that they are one slip away from, by the words of the entity extractor."""
    return _WORD.sub(lambda word: lexicon().spelt(word[0]), text)


def _abbreviations(text: str, share: Level, rng: np.random.Generator) -> list[Edit]:
    """Each phrase of the dictionary, abbreviated with the share as its chance."""
    table = {phrase: (short,) for phrase, short in terms().abbreviations.items()}
    return _replaced(text, table, float(share), rng)


def _written_out(text: str) -> str:
    """The text with the dictionary's short forms of findings written out."""
    return _short_pattern().sub(lambda match: _long_forms()[match[0]], text)


def _synonyms(text: str, share: Level, rng: np.random.Generator) -> list[Edit]:
    """Each phrase of the map, by one of its synonyms with the share as its chance."""
    edits = _replaced(text, terms().synonyms, float(share), rng)
    return [_in_case(text, edit) for edit in edits if _article_fits(text, edit)]


def _article_fits(text: str, edit: Edit) -> bool:
    """False for "an osseous lesion" that would become "an bony lesion"."""
    article = _ARTICLE.search(text, max(0, edit.start - 4), edit.start)
    return article is None or (article[1].lower() == "an") == (edit.new[0] in "aeiou")


def _replaced(text: str, table: Mapping[str, tuple[str, ...]], share: float, rng: np.random.Generator) -> list[Edit]:
    edits = []
    for match in _pattern(tuple(table)).finditer(text):
        chosen, which = rng.random(2)  # drawn for each, so that one place does not shift the others
        if chosen < share:
            news = table[" ".join(match[0].lower().split())]
            edits.append(Edit(*match.span(), news[int(which * len(news))]))
    return edits


def _in_case(text: str, edit: Edit) -> Edit:
    """The new words in capitals, or with a capital, where the old ones are."""
    old = text[edit.start : edit.end]
    new = edit.new.upper() if old.isupper() else edit.new[0].upper() + edit.new[1:] if old[0].isupper() else edit.new
    return edit._replace(new=new)


@cache
def _long_forms() -> dict[str, str]:
    """Short form -> long form, of those in capitals only: others are words, or the guard knows them."""
    return {short: phrase for phrase, short in terms().abbreviations.items() if len(short) > 1 and short.isupper()}


@cache
def _short_pattern() -> re.Pattern[str]:
    return re.compile(rf"(?<![\w/-])(?:{'|'.join(sorted(_long_forms()))})(?![\w/-])")


@cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(phrases, key=len, reverse=True)
    alternatives = "|".join(r"\s+".join(map(re.escape, phrase.split())) for phrase in longest_first)
    return re.compile(rf"(?<![\w/-])(?:{alternatives})(?![\w/-]|\s*:)", re.IGNORECASE)


TYPOS = TextPerturbation(
    "typos",
    of=("report", "prompt"),
    levels=(0.02, 0.05, 0.1),
    apply=_typos,
    says="slips of the keyboard; chance per letter, at most one a word, never in negation cues and side words",
)
TYPOS_IN_FINDINGS = replace(
    TYPOS,
    name="typos_in_findings",
    read=_mended,
    says="the same, also in names of findings where the spelling can be mended; the labeler reads the mended text",
)
ABBREVIATIONS = TextPerturbation(
    "abbreviations",
    of=("report", "prompt"),
    levels=(0.25, 0.5, 1.0),
    apply=_abbreviations,
    says="clinical abbreviations; share of the places where the dictionary has one",
)
ABBREVIATED_FINDINGS = replace(
    ABBREVIATIONS,
    name="abbreviated_findings",
    read=_written_out,
    says="the same, also where the labeler does not know the short form; it reads the text written out",
)
SYNONYMS = TextPerturbation(
    "synonyms",
    of=("report", "prompt"),
    levels=(0.25, 0.5, 1.0),
    apply=_synonyms,
    says="synonyms of findings and structures; share of the places where the map has one",
)

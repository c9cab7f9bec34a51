"""What a perturbed text must still say, and edits that are made only where it does.

A text is read as three things: how often each negation cue stands in it, which side words, and the labels that the
labeler `rules` reads from it. An edit that changes any of them within its sentence, or in the whole, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

from medvlm_harness.labelers.rules import RulesLabeler
from medvlm_harness.metrics.laterality import side_words
from medvlm_harness.perturbations.text.terms import terms

__all__ = [
    "Edit",
    "Reading",
    "edited",
    "inverts",
    "kept",
    "labeler_version",
    "protected_words",
    "reading",
    "sentence_spans",
]

_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
_WORD = re.compile(r"\b[a-z]+/[a-z]+\b|n['’]t\b|[a-z]+?(?=n['’]t\b)|[a-z]+", re.IGNORECASE)
_REMEMBERED = 2**13  # texts and sentences


class Edit(NamedTuple):
    """Characters [start, end) of a text, and what is to stand there."""

    start: int
    end: int
    new: str


class Reading(NamedTuple):
    """What counts of a text."""

    negations: tuple[str, ...]  # each as often as it stands there, sorted
    sides: tuple[str, ...]  # likewise: left, right, both
    labels: tuple[tuple[str, int | None], ...]


@lru_cache(maxsize=_REMEMBERED)
def reading(text: str, read: Callable[[str], str] = str) -> Reading:
    """Negation cues and side words of a text, a short form as what it stands for, and the labels of `read(text)`."""
    short = terms().short_forms
    words = [word[0].lower().replace("’", "'") for word in _WORD.finditer(text)]
    words = [short.get(word, word) for word in words]
    cues = sorted(word for word in words if word in _cues())
    return Reading(tuple(cues), tuple(sorted(side_words(" ".join(words)))), tuple(_labeler().label(read(text)).items()))


def inverts(before: Reading, after: Reading) -> bool:
    """Whether what one reading has as there is denied in the other, and the reverse, in all of at least one label."""
    old, new = dict(before.labels), dict(after.labels)
    said = {name for name in old if name != "No Finding" and (old[name] is not None or new[name] is not None)}
    return bool(said) and all({old[name], new[name]} == {0, 1} for name in said)


def kept(text: str, edits: Sequence[Edit], *, invert: bool = False, read: Callable[[str], str] = str) -> list[Edit]:
    """The edits that the guard lets through, in order; they must not overlap.

    Tried sentence by sentence, all of a sentence at once and then one after the other; then in the whole text. With
    `invert` a sentence must say the opposite, and the whole is free. `read` gives what the labeler reads of a text.
    """

    def agree(old: str, new: str) -> bool:
        before, after = reading(old, read), reading(new, read)
        return inverts(before, after) if invert else before == after

    groups = [_within(text, start, end, edits, agree) for start, end in _joined_spans(text, edits)]
    if not invert and not agree(text, edited(text, _flat(groups))):
        accepted: list[list[Edit]] = []
        for group in groups:
            if group and agree(text, edited(text, _flat([*accepted, group]))):
                accepted.append(group)
        groups = accepted
    return _flat(groups)


def edited(text: str, edits: Iterable[Edit]) -> str:
    """The text with the edits made."""
    parts, place = [], 0
    for edit in sorted(edits):
        parts += [text[place : edit.start], edit.new]
        place = edit.end
    return "".join([*parts, text[place:]])


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The text cut behind each line and each stop that white space follows; the spans cover it."""
    cuts = {0, len(text), *(match.end() for match in _SENTENCE_ENDS.finditer(text))}
    return list(pairwise(sorted(cuts)))


@cache
def protected_words() -> frozenset[str]:
    """Negation cues and their short forms, in lower case; side words are known by `side_words`."""
    return frozenset((*terms().negation_cues, *terms().short_forms))


def _within(text: str, start: int, end: int, edits: Sequence[Edit], agree: Callable[[str, str], bool]) -> list[Edit]:
    """Those of the edits in [start, end) with which this stretch still reads as it must."""
    stretch = text[start:end]
    own = [Edit(edit.start - start, edit.end - start, edit.new) for edit in edits if start <= edit.start < end]
    passed = own if own and agree(stretch, edited(stretch, own)) else []
    if not passed and len(own) > 1:
        for edit in own:
            if agree(stretch, edited(stretch, [*passed, edit])):
                passed.append(edit)
    return [Edit(edit.start + start, edit.end + start, edit.new) for edit in passed]


def _joined_spans(text: str, edits: Sequence[Edit]) -> list[tuple[int, int]]:
    """Sentences; those that one edit covers together are one stretch."""
    joined: list[tuple[int, int]] = []
    for start, end in sentence_spans(text):
        if joined and any(edit.start < start < edit.end for edit in edits):
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _flat(groups: Iterable[Sequence[Edit]]) -> list[Edit]:
    return [edit for group in groups for edit in group]


@cache
def _cues() -> frozenset[str]:
    return frozenset(terms().negation_cues)


@cache
def _labeler() -> RulesLabeler:
    return RulesLabeler()


def labeler_version() -> str:
    """Version of the labeler that the guard reads with."""
    return _labeler().version

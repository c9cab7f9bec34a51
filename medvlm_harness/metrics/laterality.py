"""On which side a report sees each finding, and whether two reports contradict each other there.

A parser of plain text, for texts without a labeler's mentions. It is made to raise few false alarms: a side goes to one
finding only, denied findings have none, and two texts conflict only if their sides have nothing in common.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import Any, NamedTuple

import yaml

from medvlm_harness.metrics.sentences import split_sentences

__all__ = [
    "SidedMention",
    "Sides",
    "laterality_conflicts",
    "laterality_version",
    "mentioned_sides",
    "side_words",
    "sided_findings",
]

Sides = Mapping[str, AbstractSet[str]]
"""Finding -> "left", "right" or both."""

_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)?|[,;:()]")
_CLAUSE_ENDS = frozenset({";", "but", "with"})
_FARTHEST = 14  # words and breaks between a side and its finding


class SidedMention(NamedTuple):
    """One mention of a finding, as a labeler found it."""

    finding: str
    status: int  # 1 positive, 0 negative, -1 uncertain
    side: str | None  # "left", "right", "both", or None where the text names none


def mentioned_sides(mentions: Iterable[SidedMention]) -> dict[str, frozenset[str]]:
    """Sides of the findings that a labeler found positive or uncertain."""
    sides: dict[str, set[str]] = {}
    for mention in mentions:
        if mention.side not in ("left", "right", "both", None):
            raise ValueError(f"Expected left, right, both or None as side, but got {mention.side!r}.")
        if mention.status != 0 and mention.side:
            sides.setdefault(mention.finding, set()).update(_sides_of(mention.side))
    return {finding: frozenset(found) for finding, found in sides.items()}


def sided_findings(text: str) -> dict[str, frozenset[str]]:
    """Sides of the findings that a text states, by the words of laterality.yaml; findings without a side are left out.

    >>> sided_findings("No left pneumothorax. Small right effusion and bibasilar atelectasis.")["effusion"]
    frozenset({'right'})
    """
    sides: dict[str, set[str]] = {}
    for sentence in split_sentences(text):
        for finding, side in _assigned(sentence):
            sides.setdefault(finding, set()).update(_sides_of(side))
    return {finding: frozenset(found) for finding, found in sides.items()}


def laterality_conflicts(source: Sides, text: Sides) -> set[str]:
    """Findings that both texts place, with no side in common: left here and right there. Both sides agree with either.

    Args:
        source: as `sided_findings` or `mentioned_sides` gives it.
        text: likewise.
    """
    return {finding for finding in source.keys() & text.keys() if not source[finding] & text[finding]}


def side_words(text: str) -> list[str]:
    """What each side word of a text says, in order: "left", "right" or "both".

    >>> side_words("Left effusion, bibasilar atelectasis and an RLL opacity.")
    ['left', 'both', 'right']
    """
    return [side for token in _TOKEN.findall(text.lower()) if (side := _terms().sides.of(token))]


def laterality_version() -> int:
    """Version of laterality.yaml, to stand beside every score."""
    return _terms().version


def _sides_of(side: str) -> tuple[str, ...]:
    return ("left", "right") if side == "both" else (side,)


def _assigned(sentence: str) -> Iterable[tuple[str, str]]:
    """(finding, side) for each side word of a sentence that has a finding to belong to."""
    terms = _terms()
    tokens = _TOKEN.findall(sentence.lower())
    denied = _denied(tokens)
    findings = [(place, name) for place, token in enumerate(tokens) if (name := terms.findings.of(token))]
    # Cost of all tokens up to and with each: what lies between two is a difference.
    upto = list(accumulate(terms.breaks.get(token, 0) + 1 for token in tokens))
    for place, token in enumerate(tokens):
        side = terms.sides.of(token)
        if side and not (place + 1 < len(tokens) and terms.not_a_side_before.of(tokens[place + 1])):
            following = bisect(findings, (place,))
            candidates = []
            # A side stands before its finding more often than behind: "left effusion", "effusion on the left".
            for other, name in findings[max(0, following - 1) : following]:
                candidates.append((upto[place - 1] - upto[other] + 1, other, name))
            for other, name in findings[following : following + 1]:
                candidates.append((upto[other - 1] - upto[place], other, name))
            distance, nearest, name = min(candidates, default=(_FARTHEST + 1, 0, ""))
            if distance <= _FARTHEST and not denied[nearest]:
                yield name, side


def _denied(tokens: list[str]) -> list[bool]:
    """Whether each token stands in a clause after a word that denies."""
    terms = _terms()
    denied, active = [], False
    for place, token in enumerate(tokens):
        if token in _CLAUSE_ENDS:
            active = False
        elif terms.denials.of(token):
            active = not any(terms.no_denial_before.of(following) for following in tokens[place + 1 : place + 4])
        denied.append(active)
    return denied


class _Words:
    """Groups of words, by whole word or by prefix."""

    def __init__(self, groups: Mapping[str, Iterable[str]]) -> None:
        pairs = [(word.lower(), name) for name, words in groups.items() for word in words]
        self._whole = {word: name for word, name in pairs if not word.endswith("*")}
        self._prefixes = [(word[:-1], name) for word, name in pairs if word.endswith("*")]

    def of(self, token: str) -> str | None:
        """The group of a word, None if it is in none."""
        if token in self._whole:
            return self._whole[token]
        return next((name for prefix, name in self._prefixes if token.startswith(prefix)), None)


@dataclass(frozen=True, slots=True)
class _Terms:
    version: int
    sides: _Words
    findings: _Words
    not_a_side_before: _Words
    denials: _Words
    no_denial_before: _Words
    breaks: Mapping[str, int]


@cache
def _terms() -> _Terms:
    text = files("medvlm_harness.metrics").joinpath("laterality.yaml").read_text(encoding="utf-8")
    raw: dict[str, Any] = yaml.safe_load(text)
    groups = {key: _Words(raw[key]) for key in ("sides", "findings")}
    lists = {key: _Words({key: raw[key]}) for key in ("not_a_side_before", "denials", "no_denial_before")}
    return _Terms(**raw | groups | lists)

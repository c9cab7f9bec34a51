"""`rules`: CheXpert's observations by phrases and assertion rules, offline and the same everywhere.

What is a mention, in which order assertions count and how mentions add up to labels follows the public chexpert-labeler
(Irvin et al. 2019, arXiv 1901.07031; stages/classify.py and stages/aggregate.py); the words are our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from medvlm_harness.data.chexpert import CHEXPERT_13, CHEXPERT_14
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.labelers.assertion import ASSERTION_TERMS, AssertionEngine, Target
from medvlm_harness.labelers.term_files import load_terms, rules_version, strings
from medvlm_harness.labelers.text import Sections, checked_sections, clean

if TYPE_CHECKING:
    from spacy.tokens import Doc

__all__ = ["CONVENTIONS", "OTHER", "Convention", "Mention", "RulesLabeler", "aggregate"]

MENTION_TERMS, HABIT_TERMS, SECTION_TERMS = "chexpert.yaml", "chexpert_labeler.yaml", "sections.yaml"
Convention = Literal["meaning", "chexpert_labeler"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
OTHER = "Other"  # findings outside the thirteen: they only keep a report from being `No Finding`
Kind = Literal["findings", "uncertain", "structures", "not"]
_KINDS: tuple[Kind, ...] = ("findings", "uncertain", "structures", "not")
_HEART_FAILURE = frozenset({"chf", "heart failure"})
# "atelectasis or scarring", "infiltrate versus mass": neither is certain. At most this many words between them.
_ALTERNATIVE_WORDS = frozenset({"or", "versus", "vs"})
_ALTERNATIVE_GAP = 4
_DENIALS = frozenset({"no", "not", "without", "neither"})  # under one of them "or" joins, and offers nothing


class Mention(NamedTuple):
    """One mention of an observation."""

    label: str  # one of CHEXPERT_13, or OTHER
    text: str
    start: int  # tokens [start, end) of the text as cleaned
    end: int
    value: int  # 1, 0 or -1


class RulesLabeler:
    """The labeler by rules.

    Args:
        sections: which sections of a report with heads are read; one without heads is read whole.
        convention: "meaning" labels what the report says. "chexpert_labeler" also repeats the habits of the public
            labeler that make a label positive against the report's meaning (`terms/chexpert_labeler.yaml`; and a heart
            of which nothing is said counts as large), for comparison with labels that it made, and for nothing else.
    """

    name = "rules"

    def __init__(self, sections: str = "both", convention: str = "meaning") -> None:
        if convention not in CONVENTIONS:
            raise UserError(
                f"Expected convention to be one of {', '.join(CONVENTIONS)}, but got {convention!r}."
                f"{near_matches(convention, CONVENTIONS)}"
            )
        self.sections: Sections = checked_sections(sections)
        self.convention = convention
        self._habits = _habits() if convention == "chexpert_labeler" else None
        phrases = dict(_phrases())
        for key, more in self._habits.phrases.items() if self._habits else ():
            phrases[key] = (*phrases[key], *more)
        structures = tuple(key for key in phrases if key.endswith("|structures"))
        reach = dict.fromkeys(("normal", "abnormal", "indefinite"), structures)
        self._engine = AssertionEngine(phrases, reach=reach)
        files = (MENTION_TERMS, ASSERTION_TERMS, SECTION_TERMS, *((HABIT_TERMS,) if self._habits else ()))
        self.version = rules_version(files, ("rules", "assertion", "text")) + (f"-{convention}" if self._habits else "")

    def label(self, text: str) -> dict[str, int | None]:
        """The fourteen observations; see `Labeler.label`."""
        cleaned = clean(text, self.sections)
        if not cleaned:
            return dict.fromkeys(CHEXPERT_14)
        return aggregate(self._mentions(self._engine.parse(cleaned)))

    def mentions(self, text: str) -> list[Mention]:
        """Every mention that counts, in order: what the labels are made of."""
        return self._mentions(self._engine.parse(clean(text, self.sections)))

    def _mentions(self, doc: Doc) -> list[Mention]:
        found = [(*_split(target.key), target) for target in self._engine.find(doc)]
        unbarred = self._habits.without_exceptions if self._habits else frozenset[str]()
        barred = [(label, target) for label, kind, target in found if kind == "not" and label not in unbarred]
        mentions = []
        for label, kind, target in found:
            if kind == "not" or any(label == name and _overlap(target, other) for name, other in barred):
                continue
            value = _value(kind, target.assertions)
            if value is None and kind == "structures" and self._habits and "hypothetical" not in target.assertions:
                value = 1
            if value is not None:
                mentions.append(Mention(label, doc[target.start : target.end].text, target.start, target.end, value))
        mentions = _alternatives(doc, mentions)
        if self._habits:
            mentions += self._habits.lost_denials(doc)
        return mentions


def aggregate(mentions: Iterable[Mention]) -> dict[str, int | None]:
    """Labels from mentions: 1 beats -1 beats 0; `No Finding` is 1 where nothing but devices is 1 or -1, else None.

    Heart failure, which is counted as edema, also makes the heart's size uncertain where nothing says more.
    """
    values: dict[str, set[int]] = {name: set() for name in CHEXPERT_13}
    abnormal = False
    for mention in mentions:
        abnormal |= mention.value != 0 and mention.label != "Support Devices"
        if mention.label == OTHER:
            continue
        values[mention.label].add(mention.value)
        if mention.value != 0 and mention.text.lower() in _HEART_FAILURE:
            values["Cardiomegaly"].add(-1)
    labels: dict[str, int | None] = {"No Finding": None if abnormal else 1}
    return labels | {
        name: next((value for value in (1, -1, 0) if value in found), None) for name, found in values.items()
    }


def _value(kind: Kind, said: frozenset[str]) -> int | None:
    """What one mention means, by the status order of chexpert-labeler; None where it is no mention."""
    if "not_excluded" in said:
        return -1
    if "hypothetical" in said:
        return None
    if kind == "structures":
        return _structure(said)
    if said & {"negated", "unlikely"}:
        return 0
    return -1 if kind == "uncertain" or "uncertain" in said else 1


def _structure(said: frozenset[str]) -> int | None:
    """A heart or mediastinum: nothing unless something is said of its size."""
    if "abnormal" in said:
        return 0 if said & {"negated", "unlikely"} else -1 if "uncertain" in said else 1
    if "normal" in said:
        return 0
    return -1 if "indefinite" in said else None


def _alternatives(doc: Doc, mentions: Sequence[Mention]) -> list[Mention]:
    """Neighbouring findings that are offered as alternatives, and not denied, are both uncertain."""
    result = list(mentions)
    for i, first in enumerate(mentions):
        following = [j for j in range(i + 1, len(mentions)) if mentions[j].start >= first.end]
        for j in following:
            second = mentions[j]
            if second.start > mentions[following[0]].start:
                break  # another mention stands between
            between = doc[first.end : second.start]
            joined = len(between) <= _ALTERNATIVE_GAP and any(t.lower_ in _ALTERNATIVE_WORDS for t in between)
            if joined and _denied_before(doc, first):
                break
            if joined and 0 not in (first.value, second.value) and not any(t.is_sent_start for t in between):
                result[i], result[j] = first._replace(value=-1), second._replace(value=-1)
    return result


def _denied_before(doc: Doc, mention: Mention) -> bool:
    """Whether a denial stands before a mention in its sentence, as in "no change in the opacity or the effusion"."""
    sentence = doc[mention.start].sent.start
    return any(token.lower_ in _DENIALS for token in doc[sentence : mention.start])


def _overlap(first: Target, second: Target) -> bool:
    return first.start < second.end and second.start < first.end


@cache
def _phrases() -> dict[str, tuple[str, ...]]:
    """`label|kind` -> phrases."""
    raw = load_terms(MENTION_TERMS, {"labels", "other"})
    if raw["labels"].keys() != set(CHEXPERT_13):
        raise ValueError(f"Expected the thirteen observations in {MENTION_TERMS}, but got {', '.join(raw['labels'])}.")
    by_key = {f"{OTHER}|findings": strings(MENTION_TERMS, raw["other"])}
    for label, kinds in raw["labels"].items():
        if kinds.keys() != set(_KINDS):
            raise ValueError(f"Expected {', '.join(_KINDS)} of {label} in {MENTION_TERMS}, but got {', '.join(kinds)}.")
        by_key |= {f"{label}|{kind}": strings(MENTION_TERMS, phrases) for kind, phrases in kinds.items() if phrases}
    return by_key


@dataclass(frozen=True, slots=True)
class _Habits:
    """What the public labeler does beyond the meaning of a report."""

    phrases: dict[str, tuple[str, ...]]  # "label|kind" -> more phrases
    without_exceptions: frozenset[str]  # labels
    patterns: tuple[tuple[str, re.Pattern[str]], ...]  # label, pattern

    def lost_denials(self, doc: Doc) -> list[Mention]:
        """A positive mention for each stretch of text in which that labeler loses a denial."""
        text = doc.text.lower()
        mentions = []
        for label, pattern in self.patterns:
            for match in pattern.finditer(text):
                span = doc.char_span(match.start(), match.end(), alignment_mode="expand")
                mentions.append(Mention(label, span.text, span.start, span.end, 1))
        return mentions


@cache
def _habits() -> _Habits:
    raw = load_terms(HABIT_TERMS, {"phrases", "without_exceptions", "lost_denials"})
    unknown = (raw["phrases"].keys() - _phrases().keys()) | (raw["lost_denials"].keys() - set(CHEXPERT_13))
    if unknown:
        raise ValueError(f"Expected labels and kinds of {MENTION_TERMS} in {HABIT_TERMS}, but got {sorted(unknown)}.")
    return _Habits(
        {key: strings(HABIT_TERMS, phrases) for key, phrases in raw["phrases"].items()},
        frozenset(raw["without_exceptions"]),
        tuple((label, re.compile(pattern)) for label, found in raw["lost_denials"].items() for pattern in found),
    )


def _split(key: str) -> tuple[str, Kind]:
    label, _, kind = key.partition("|")
    return label, kind  # type: ignore[return-value]  # made from _KINDS

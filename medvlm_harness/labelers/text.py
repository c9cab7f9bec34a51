"""What is read of a report: its sections told apart, hard-wrapped lines joined, and each paragraph ended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

from medvlm_harness.errors import UserError
from medvlm_harness.labelers.term_files import load_terms, strings

__all__ = ["SECTIONS", "Sections", "Stretch", "checked_sections", "clean", "stretches_to_read"]

Sections = Literal["both", "findings", "impression"]
SECTIONS: tuple[str, ...] = get_args(Sections)
"""What may be read of a report that has heads; one without heads is read whole."""

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_BULLET = re.compile(r"\s*(?:[-*\u2022]|\(?\d{1,2}[.)])\s+")
_MARKUP = re.compile(r"\*\*|__|`|^#+\s*", re.MULTILINE)
_WITH, _WITHOUT = re.compile(r"\bw/(?=\s|$)", re.IGNORECASE), re.compile(r"\bw/o\b", re.IGNORECASE)
_AND_OR = re.compile(r"\band\s*/\s*or\b", re.IGNORECASE)
_SLASH = re.compile(r"(?<=[a-z]{2})\s*/\s*(?=[a-z]{2})", re.IGNORECASE)


class Stretch(NamedTuple):
    """Characters [start, end) of a text that belong to one section."""

    start: int
    end: int
    section: str  # "findings", "impression", "ignored", or "" for what stands under no head


def checked_sections(sections: str) -> Sections:
    """The option `sections` of labelers.

    Raises:
        UserError: if it is none of them.
    """
    if sections not in SECTIONS:
        raise UserError(f"Expected sections to be one of {', '.join(SECTIONS)}, but got {sections!r}.")
    return sections  # type: ignore[return-value]  # checked


def stretches_to_read(text: str, sections: Sections = "both") -> list[Stretch]:
    """The parts of a report that are about its image, in order; heads, indication, history and the like are left out.

    Text that stands under no head counts as findings where there is no head of findings, and is left out elsewhere if
    one section alone is asked for.

    >>> text = "HISTORY: rule out fracture. The lungs are clear. IMPRESSION: Normal."
    >>> [text[s.start : s.end].strip() for s in stretches_to_read(text)]
    ['The lungs are clear.', 'Normal.']
    """
    found = list(_stretches(text))
    headed = {stretch.section for stretch in found} & {"findings", "impression"}
    wanted: set[str] = {"findings", "impression"} if sections == "both" else {sections}
    if sections == "both" or not headed or (sections == "findings" and "findings" not in headed):
        wanted.add("")
    return [stretch for stretch in found if stretch.section in wanted and text[stretch.start : stretch.end].strip()]


def clean(text: str, sections: Sections = "both") -> str:
    r"""A report as labelers read it: one paragraph a line, each ending in a full stop, without heads and mark-up.

    Line breaks that only wrap are undone; `and/or` and `A/B` become `or`, `w/o` without. XXXX stays: an unknown word.

    >>> clean("INDICATION: pneumonia?\n\nFINDINGS: No effusion\nor pneumothorax")
    'No effusion or pneumothorax.'
    """
    parts = [text[stretch.start : stretch.end] for stretch in stretches_to_read(text, sections)]
    paragraphs = [paragraph for part in parts for paragraph in _paragraphs(_MARKUP.sub("", part))]
    joined = "\n".join(p if p[-1] in ".!?" else f"{p}." for p in paragraphs)
    joined = _WITHOUT.sub("without", joined)
    joined = _WITH.sub("with", joined)
    return _SLASH.sub(" or ", _AND_OR.sub("or", joined))


@dataclass(frozen=True, slots=True)
class _Heads:
    sections: dict[str, str]  # head -> section
    one_statement: frozenset[str]
    pattern: re.Pattern[str]
    joining: frozenset[str]


@cache
def _heads() -> _Heads:
    raw = load_terms("sections.yaml", {"read", "ignored", "one_statement", "joining"})
    sections = {head: section for section, heads in raw["read"].items() for head in strings("sections.yaml", heads)}
    sections |= dict.fromkeys(strings("sections.yaml", raw["ignored"]), "ignored")
    longest_first = sorted(sections, key=len, reverse=True)
    in_any_case = "|".join(r"\s+".join(head.split()) for head in longest_first)
    in_capitals = "|".join(r"\s+".join(head.upper().split()) for head in longest_first)
    start = r"(?:\A|\n|(?<=[.!?:;]))[\s*#_>]*"
    pattern = rf"(?:{start}(?i:(?P<any>{in_any_case}))|\b(?P<capitals>{in_capitals}))[\s*_]*:\**"
    one = frozenset(strings("sections.yaml", raw["one_statement"]))
    joining = frozenset(strings("sections.yaml", raw["joining"]))
    return _Heads(sections, one, re.compile(pattern), joining)


def _stretches(text: str) -> Iterator[Stretch]:
    """All parts of a text with the section they belong to, without the heads themselves."""
    heads = _heads()
    matches = list(heads.pattern.finditer(text)) if ":" in text else []
    if not matches:
        yield Stretch(0, len(text), "")
        return
    yield Stretch(0, matches[0].start(), "")
    names = [" ".join((match["any"] or match["capitals"]).lower().split()) for match in matches]
    no_findings = "findings" not in (heads.sections[name] for name in names)  # then they stand under another head
    limits = [match.start() for match in matches[1:]] + [len(text)]
    for number, (match, head, end) in enumerate(zip(matches, names, limits, strict=True)):
        section, start = heads.sections[head], match.end()
        if section == "ignored":
            last = number == len(matches) - 1
            stop = _end_of_ignored(text, start, end, short=no_findings or head in heads.one_statement, last=last)
            yield Stretch(start, stop, section)
            yield Stretch(stop, end, "")
        else:
            yield Stretch(start, end, section)


def _end_of_ignored(text: str, start: int, end: int, *, short: bool, last: bool) -> int:
    """Where a section that is not read ends: at the next head or a blank line, and without either at a full stop."""
    begin = start + len(text[start:end]) - len(text[start:end].lstrip())
    blank = _BLANK_LINE.search(text, begin, end)
    if blank:
        return blank.start()
    if last or (short and "\n" not in text[begin:end].strip()):
        sentence = _SENTENCE_END.search(text, begin, end)
        return sentence.end() if sentence else end
    return end


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs without line breaks: a break is kept where the writer made it, and undone where a line was full."""
    lines = text.splitlines()
    if len(lines) < 2:
        if whole := " ".join(text.split()):
            yield whole
        return
    width = max(len(line.rstrip()) for line in lines)
    gathered: list[str] = []
    length = 0
    for line in lines:
        words = line.split()
        bullet = _BULLET.match(line)
        if gathered and (not words or bullet or _begins_a_statement(words[0], length, width)):
            yield " ".join(gathered)
            gathered = []
        if bullet:
            words = line[bullet.end() :].split()
        gathered += words
        length = len(line.rstrip())
    if gathered:
        yield " ".join(gathered)


def _begins_a_statement(word: str, length: int, width: int) -> bool:
    """Whether a line that begins with this word does not go on with the one before.

    It does not where the word is capitalised, though it would have fitted on that line, or that line is the longest,
    which tells nothing. In text all in capitals only the first and a word that joins clauses tell; XXXX is no word.
    """
    fits = length + 1 + len(word) <= width
    if word[0].isupper() and not word.isupper():
        return fits or length == width
    joins = word.lower() in _heads().joining or set(word) <= set("X")
    return word.isalpha() and word.isupper() and len(word) > 1 and fits and not joins

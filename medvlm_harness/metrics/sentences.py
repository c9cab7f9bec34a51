"""Sentences of a radiology report, by rules that know its numbers, abbreviations and numbered lists.

ROUGE-Lsum, the lead and oracle baselines and the side parser all need sentences. NLTK's splitter needs a download and
cuts numbered impressions apart.
"""

from __future__ import annotations

import re

__all__ = ["split_sentences"]

# No sentence ends after these, whatever follows. Case matters: "CF." and "MS." are diagnoses.
_NEVER_FINAL = frozenset({"Dr", "dr", "Mr", "Mrs", "St", "vs", "e.g", "E.g", "i.e", "I.e", "approx", "Fig", "fig"})
# One may end after these, but not where the text goes on in lower case.
_SELDOM_FINAL = frozenset(["a.m", "p.m", "am", "pm", "etc", "al"])
_UNIT = re.compile(r"\d\s*(?:mm|cm|in|ml)$")
_AFTER_UNIT = re.compile(r"(?:in|at|on|of|x|by|from|to|above|below|wide|long|thick)\b")
# A stop before white space, or one typed without it: "effusion.No pneumothorax", never "3.5" or "p.m.".
_STOP = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|(?<=[a-z]{3})[.!?](?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W_]")
_NEAR = 12  # characters; more than the longest abbreviation or unit
_ITEM = re.compile(r"(?<!\S)\(?(\d{1,2})[.)](?=\s|[A-Za-z])\s*")


def split_sentences(text: str) -> list[str]:
    """The sentences of a report in order, with their stops and list numbers; white space inside them is one blank.

    A stop ends a sentence before white space, except in numbers ("3.5 cm"), after abbreviations ("Dr. Smith",
    "e.g. edema") and after the number of a list item ("1. Cardiomegaly"). The next number of a list starts a sentence
    even where the stop before it is missing. Words in lower case start sentences too, as models write them so. A line
    break ends a sentence unless the next line goes on in lower case.

    >>> split_sentences("1. Nodule of 3.5 cm, e.g. a granuloma. 2. No effusion.No pneumothorax")
    ['1. Nodule of 3.5 cm, e.g. a granuloma.', '2. No effusion.', 'No pneumothorax']
    """
    return [sentence for line in _unwrapped(text) for item in _items(line) for sentence in _sentences(item)]


def _unwrapped(text: str) -> list[str]:
    """Lines that begin where a sentence may begin: one that goes on in lower case belongs to the line before."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        first = len(lines)
        for line in (" ".join(raw.split()) for raw in paragraph.splitlines()):
            if len(lines) > first and line[:1].islower() and lines[-1][-1] not in ".!?:":
                lines[-1] += " " + line
            elif line:
                lines.append(line)
    return lines


def _items(line: str) -> list[str]:
    """The line cut before each number of a list: one at the start, after a stop, or next in count to the one before."""
    cuts, expected = [0], 0
    for item in _ITEM.finditer(line):
        if item.start() == 0 or line[item.start() - 2] in ".:;!?" or int(item[1]) == expected:
            cuts.append(item.start())
            expected = int(item[1]) + 1
    return _pieces(line, cuts)


def _sentences(item: str) -> list[str]:
    number = _ITEM.match(item)
    cuts = [0]
    last_word = next((place for place in reversed(range(len(item))) if _WORD.match(item[place])), -1)
    first_word = _WORD.search(item)
    for stop in _STOP.finditer(item, number.end() if number else 0):
        # Without a word on either side there are only marks, as in "clear. .", and they are no sentence.
        if first_word and first_word.start() < stop.start() and stop.end() <= last_word and _is_final(item, stop):
            cuts.append(stop.end())
            first_word = _WORD.search(item, stop.end())
    return _pieces(item, cuts)


def _is_final(text: str, stop: re.Match[str]) -> bool:
    """Whether a stop ends its sentence; looks at few characters, so that any model output takes linear time."""
    if stop[0] != ".":
        return True
    before, after = text[max(0, stop.start() - _NEAR) : stop.start()], text[stop.end() : stop.end() + _NEAR].lstrip()
    words = before.split()
    word = words[-1].lstrip("([\"'") if words else ""
    if word in _NEVER_FINAL or (word.lower() in _SELDOM_FINAL and after[:1].islower()):
        return False
    return not (_UNIT.search(before) and _AFTER_UNIT.match(after))


def _pieces(text: str, cuts: list[int]) -> list[str]:
    pieces = (text[start:end].strip() for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True))
    return [piece for piece in pieces if piece]

"""JSON as models write it: inside other text, with slips, or cut off in the middle; read as far as it goes.

Python's own reader refuses all of it for one slip, and recurses as deep as a text has brackets. This one never raises,
takes linear time, and says how much it could not use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["JsonObject", "JsonPieces", "JsonValue", "read_json_pieces"]

# A bracket begins JSON where a string, a bracket or the end follows: "[absent]" and "(see {1})" do not.
_START = re.compile(r"""[{\[](?=\s*+(?:["'{}\[\]]|\Z))""")
_TOKEN = re.compile(
    r"""\s*+(?:(?P<mark>[{}\[\]:,])"""
    r"""|"(?P<double>(?:[^"\\\n]|\\[^\n])*+)(?P<end2>"?)"""
    r"""|'(?P<single>(?:[^'\\\n]|\\[^\n])*+)(?P<end1>'?)"""
    r"""|(?P<word>[^\s{}\[\]:,"]++))"""
)
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/bfnrt])|\\|"')
_NULL = frozenset({"null", "None"})
_DEEPEST = 32  # brackets; what lies deeper is left aside


@dataclass(slots=True)
class JsonObject:
    """Pairs in order, equal keys included, since models repeat them."""

    pairs: list[tuple[str, JsonValue]] = field(default_factory=list)
    closed: bool = True  # False where the text ended before its bracket
    dangling: bool = False  # the text ended within a pair, which is left out and counted as damage


JsonValue = str | None | list["JsonValue"] | JsonObject
"""Numbers and booleans are given as they are written."""


class JsonPieces(NamedTuple):
    """The values that stand one after the other in a text."""

    values: list[JsonValue]
    damaged: int  # pieces that could not be used
    cut: bool  # the text ended within the last one


def read_json_pieces(text: str) -> JsonPieces:
    """Every object and array of a text, in order; what lies around them is not looked at.

    Trailing commas, single quotes, words without quotes and wrong or missing closing brackets are let pass; a pair or
    string that the end of the text cuts is left out.

    >>> read_json_pieces('Sure: ["effusion", "ede').values
    [['effusion']]
    """
    values: list[JsonValue] = []
    damaged = position = 0
    cut = False
    while start := _START.search(text, position):
        reader = _Reader(text, start.start())
        values.append(reader.read())
        damaged += reader.damaged
        position, cut = reader.position, reader.cut
    return JsonPieces(values, damaged, cut)


@dataclass(slots=True)
class _Open:
    """A container that is not closed yet; of an object also the key that waits for its value."""

    value: list[JsonValue] | JsonObject
    key: str | None = None
    colon: bool = False


class _Reader:
    """Reads one value; the containers that are open are a list, not a recursion."""

    def __init__(self, text: str, start: int) -> None:
        self.text, self.position = text, start
        self.damaged = 0
        self.cut = False
        self._open: list[_Open] = []
        self._words: list[str] = []  # of a value without quotes
        self._too_deep = 0

    def read(self) -> JsonValue:
        """The value; afterwards `position` is behind it."""
        root: JsonValue = None
        for kind, piece in self._tokens():
            if self._too_deep:
                self._too_deep += (piece in "{[") - (piece in "}]") if kind == "mark" else 0
                continue
            if kind == "word":
                self._words.append(piece)
                continue
            self._end_words()
            if kind == "text":
                self._add(piece)
            elif piece in "{[":
                made = self._begin(piece)
                root = made if root is None else root
            elif piece in "}]":
                self._close(list if piece == "]" else JsonObject)
                if not self._open:
                    return root
            elif self._open[-1].key is not None:
                self._between(piece)
        self._cut()
        return root

    def _tokens(self) -> Iterator[tuple[str, str]]:
        while match := _TOKEN.match(self.text, self.position):
            self.position = match.end()
            if match["mark"] is not None:
                yield "mark", match["mark"]
            elif match["word"] is not None:
                yield "word", match["word"]
            else:
                quote = '"' if match["double"] is not None else "'"
                inside = match["double"] if quote == '"' else match["single"]
                following = self.text[self.position : self.position + 2]
                if match["end2"] or match["end1"] or following not in ("", "\\"):  # a line's end ends it too
                    yield "text", _unescaped(inside)
                else:
                    self._dangle()
                    break
        self.position = len(self.text)

    def _begin(self, bracket: str) -> list[JsonValue] | JsonObject | None:
        if len(self._open) == _DEEPEST:
            self._too_deep = 1
            self.damaged += 1
            return None
        made: list[JsonValue] | JsonObject = [] if bracket == "[" else JsonObject(closed=False)
        if self._open:
            self._add(made)
        self._open.append(_Open(made))
        return made

    def _close(self, kind: type) -> None:
        """The innermost container of a kind, and with it what was left open inside."""
        if not any(isinstance(one.value, kind) for one in self._open):
            self.damaged += 1
            return
        while True:
            last = self._open.pop()
            self.damaged += last.key is not None
            if isinstance(last.value, JsonObject):
                last.value.closed = True
            if isinstance(last.value, kind):
                return

    def _between(self, mark: str) -> None:
        """A colon or comma behind a key."""
        top = self._open[-1]
        if mark == ":":
            top.colon = True
        else:
            top.key, top.colon = None, False
            self.damaged += 1

    def _add(self, value: JsonValue) -> None:
        top = self._open[-1]
        if isinstance(top.value, list):
            top.value.append(value)
        elif top.key is not None and top.colon:
            top.value.pairs.append((top.key, value))
            top.key, top.colon = None, False
        elif isinstance(value, str):
            self.damaged += top.key is not None  # two strings without a colon: the first is no key
            top.key = value
        else:
            self.damaged += 1

    def _end_words(self) -> None:
        if self._words:
            joined = " ".join(self._words)
            self._words = []
            self._add(None if joined in _NULL else joined)

    def _cut(self) -> None:
        """The text has ended: a word or pair that is not whole is left out."""
        self.cut = True
        if self._words or any(one.key is not None for one in self._open):
            self._dangle()

    def _dangle(self) -> None:
        self.damaged += 1
        self._words = []
        for one in self._open:
            one.key = None
        if self._open and isinstance(self._open[-1].value, JsonObject):
            self._open[-1].value.dangling = True


def _unescaped(inside: str) -> str:
    """A string's content; a backslash that escapes nothing is left out."""
    if "\\" not in inside:
        return inside
    valid = _ESCAPE.sub(lambda one: one[0] if one[1] else ('\\"' if one[0] == '"' else ""), inside)
    text = str(json.loads(f'"{valid}"', strict=False))
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair could not be written anywhere

"""What a model lists of a report, as (finding, status) pairs: from JSON, and from lists as people write them.

Any text is read without an error and in linear time. What could not be read is counted, so that a model that does not
keep to the form is seen to be one, rather than one that finds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, NamedTuple

from medvlm_harness.tracks.answer_words import (
    DETAIL_KEYS,
    HEADER_WORDS,
    LEADS,
    LONGEST_LEAD,
    LONGEST_TAIL,
    NAME_KEYS,
    NEGATION_KEYS,
    NOTHING,
    STATUS_KEYS,
    TAILS,
    Status,
    status_of,
)
from medvlm_harness.tracks.tolerant_json import JsonObject, JsonValue, read_json_pieces

__all__ = ["EntityAnswer", "ListedFinding", "Status", "parse_entities"]

MOST_WORDS = 40  # of an item of a list; a longer one is prose
MOST_WORDS_BARE = 12  # of one without a bullet or quotes
_LONGEST_DENIAL = 200  # characters at a list's start that are looked at for "no A, B or C"
_STRENGTH = {"present": 0, "uncertain": 1, "absent": 2}
_OPPOSITE: dict[Status, Status] = {"present": "absent", "absent": "present", "uncertain": "present"}
_YES, _NO = frozenset({"true", "yes", "1"}), frozenset({"false", "no", "0"})
_EDGES = " \t\r\n\"'`*_.,;:!|<>#"
_BULLET = re.compile(r"(?:[•‣·] ?|(?:[-*+–—]|\(?\d{1,3}[.):]|\(?[A-Za-z][.)]) ){1,3}")  # "- 1. effusion"
_CHECKBOX = re.compile(r"(?m)^[^\S\n]*+[-*+] \[([ xX])\] ?([^\n]*+)$")
_RULE = re.compile(r"[-=_*|:` +~.]*+")
_PIECES = re.compile(r"[,;.] | (?=\d{1,2}[.)] )")
_SENTENCES = re.compile(r"[.;] (?![a-z])| (?=\d{1,2}[.)] )")
# Between a finding and its status; the last one in a text is looked at.
_SEPARATORS = (":", "=", "->", "→", "|", " - ", " – ", " — ", ",")
_LEADING_SEPARATORS = (":", "|", " - ", " – ", " — ")


class ListedFinding(NamedTuple):
    """One finding as it was listed, without the words that say whether it is there."""

    phrase: str
    status: Status


class EntityAnswer(NamedTuple):
    """What was read of one answer."""

    findings: tuple[ListedFinding, ...]
    unparsed: int  # items and lines that could not be read
    form: Literal["json", "list", "none"]  # none: nothing was read, not even that there is nothing

    @property
    def parsed(self) -> bool:
        """Whether a list was read; it may say that there is nothing."""
        return self.form != "none"


def parse_entities(text: str) -> EntityAnswer:
    r"""Read a list of findings with their status.

    JSON, wherever it stands in the text: objects with a name (finding, entity, ...) and a status, strings, phrase ->
    status, or status -> phrases; cut off JSON as far as it goes. Without any, lines: bullets, numbers, tables, headings
    with a status, "X: absent", "X (absent)", "no X", and comma lists. A finding without a status is present. A value
    that is no status ("heart: enlarged") is part of the finding.

    >>> parse_entities('[{"finding": "effusion", "status": "absent"}, "cardiomegaly"]').findings
    (ListedFinding(phrase='effusion', status='absent'), ListedFinding(phrase='cardiomegaly', status='present'))
    >>> parse_entities("- Pleural effusion: absent\n- possible pneumonia").findings[1]
    ListedFinding(phrase='pneumonia', status='uncertain')
    """
    text = _CHECKBOX.sub(lambda box: f"- {box[2]}: {'absent' if box[1] == ' ' else 'present'}", text)
    pieces = read_json_pieces(text)
    reading = _Reading()
    if pieces.values:
        reading.unparsed = pieces.damaged
        for value in pieces.values:
            reading.value(value)
        reading.says_nothing &= not pieces.cut  # "[" and then the end does not say that there is nothing
        return reading.answer("json")
    reading.lines(text)
    return reading.answer("list")


class _Waiting(NamedTuple):
    """A finding whose status may stand in the next line."""

    phrase: str = ""
    listed: bool = False  # it counts without one
    bulleted: bool = False  # else it is a heading, and with nothing below it an item that says nothing


class _Reading:
    """Findings as they come in."""

    def __init__(self) -> None:
        self.found: list[ListedFinding] = []
        self.unparsed = 0
        self.says_nothing = False  # an empty list, or "none"

    def answer(self, form: Literal["json", "list"]) -> EntityAnswer:
        """What was read."""
        read = self.found or self.says_nothing
        return EntityAnswer(tuple(self.found), self.unparsed, form if read else "none")

    def add(self, phrase: str, statuses: Iterable[Status | None] = (), *, most: int = MOST_WORDS) -> None:
        """One finding; of several statuses (said of it, and in its own words) the strongest holds."""
        if len(phrase.split()) > 2 * most:  # which keeps what follows short
            self.unparsed += 1
            return
        bare, own = _own_status(phrase)
        said = [one for one in (*statuses, *own) if one is not None]
        if " ".join(phrase.lower().strip(_EDGES).split()) in NOTHING:
            self.says_nothing = True
        elif not any(map(str.isalpha, bare)) or len(bare.split()) > most:
            self.unparsed += 1
        else:
            self.found.append(ListedFinding(bare, max(said, key=_STRENGTH.__getitem__, default="present")))

    # --- JSON

    def value(self, value: JsonValue, status: Status | None = None) -> None:
        """A value below which everything has a status, or None where that is open; no deeper than the reader goes."""
        if isinstance(value, JsonObject):
            self._object(value, status)
        elif isinstance(value, list):
            self.says_nothing |= not value
            for one in value:
                self.value(one, status)
        elif value is None:
            self.unparsed += 1
        else:
            self._item(value, status)

    def _item(self, text: str, status: Status | None = None) -> None:
        phrase, said = _split_status(text)
        self.add(phrase, (status, said))

    def _object(self, given: JsonObject, status: Status | None) -> None:
        self.says_nothing |= not given.pairs and given.closed
        pairs = [(_key(key), key, value) for key, value in given.pairs]
        names = [value for key, _, value in pairs if key in NAME_KEYS and isinstance(value, str)]
        label = [value for key, _, value in pairs if key == "label"]
        label_is_name = not names and any(isinstance(one, str) and status_of(one) is None for one in label)
        says = [value for key, _, value in pairs if key in STATUS_KEYS or (key == "label" and not label_is_name)]
        if names or label_is_name:
            self._named(given, status, pairs, says, NAME_KEYS | ({"label"} if label_is_name else set()))
        elif says and any(isinstance(value, list | JsonObject) for key, _, value in pairs if key not in STATUS_KEYS):
            inner = status_of(says[0]) if isinstance(says[0], str) else None
            for key, _, value in pairs:
                if key not in STATUS_KEYS and isinstance(value, list | JsonObject):
                    self.value(value, inner or status)
        else:
            others = [one for one in pairs if one[0] not in STATUS_KEYS or _is_phrase(one[2])]
            self.unparsed += bool(pairs) and not others  # a status of nothing
            for key, written, value in others:
                self._pair(key, written, value, status)

    def _named(
        self,
        given: JsonObject,
        status: Status | None,
        pairs: Sequence[tuple[str, str, JsonValue]],
        says: Sequence[JsonValue],
        names: AbstractSet[str],
    ) -> None:
        """An object that is one finding."""
        words = [value for key, _, value in pairs if key in names | DETAIL_KEYS and isinstance(value, str)]
        words = [word for word in words if word.strip().lower() not in NOTHING]
        statuses: list[Status | None] = [status]
        for key, _, value in pairs:
            flag = value.strip().lower() if isinstance(value, str) else ""
            own = _heading_status(key)
            if key in NEGATION_KEYS and flag in _YES:
                statuses.append("absent")
            elif own is not None and flag in _YES | _NO:
                statuses.append(own if flag in _YES else _OPPOSITE[own])
        for value in says:
            if isinstance(value, str):
                said = status_of(value)
                statuses.append(said)
                words += [value] if said is None else []
        if not words and any(isinstance(value, str) for key, _, value in pairs if key in names):
            self.says_nothing = True
        elif not words or not all(isinstance(value, str) for value in says):
            self.unparsed += 1
        elif not given.closed and not says and not any(statuses):
            self.unparsed += not given.dangling  # cut off before its status: what it would have said is open
        else:
            self.add(" ".join(words), statuses)

    def _pair(self, key: str, written: str, value: JsonValue, status: Status | None) -> None:
        """A pair of an object that is no finding itself: phrase -> status, status -> phrases, or a group."""
        heading = _heading_status(key)
        if value is None:
            self.unparsed += 1
        elif isinstance(value, JsonObject) and _only_status(value):
            phrase = " ".join([written, *(v for k, v in value.pairs if _key(k) in DETAIL_KEYS and isinstance(v, str))])
            says = [v for k, v in value.pairs if _key(k) in STATUS_KEYS and isinstance(v, str)]
            self.add(phrase, (status, *map(status_of, says)))
        elif not isinstance(value, str):
            self.value(value, heading or status)
        elif heading is not None or key in HEADER_WORDS or not any(map(str.isalpha, key)):
            for piece in _pieces(value, _PIECES):
                self._item(piece, heading or status)
        elif (said := status_of(value)) is not None:
            self.add(written, (status, said))
        else:
            self._item(f"{written}: {value}", status)

    # --- lines

    def lines(self, text: str) -> None:
        """Every line as what it looks like."""
        heading: Status | None = None
        waiting = _Waiting()
        for raw in text.splitlines():
            line = " ".join(raw.split())
            if _RULE.fullmatch(line) or line.startswith("```"):
                continue
            bullet = _BULLET.match(line)
            body = (line[bullet.end() :] if bullet else line).strip("| ")
            title = body.strip(" #*_")
            key, _, rest = title.partition(":")
            key, rest = _key(key), rest.strip(_EDGES)
            if key in STATUS_KEYS and rest:
                self._status_line(waiting, status_of(rest))
                waiting = _Waiting()
                continue
            is_heading = title.endswith(":") or line.startswith("#") or _is_header(title)
            self._leave(waiting, heading, empty=is_heading)
            waiting = _Waiting()
            if is_heading:
                heading = _heading_status(key)
                if not (heading or _is_header(key)):
                    waiting = _Waiting(key, bulleted=bullet is not None)
            elif key in NAME_KEYS and rest and _split_status(rest)[1] is None:
                waiting = _Waiting(rest, listed=True)
            elif rest and (key in NAME_KEYS or _is_header(key)):  # "Findings: effusion, edema"
                self._line(rest, heading, bulleted=bullet is not None and key in NAME_KEYS)
            else:
                self._line(body, heading, bulleted=bullet is not None)
        self._leave(waiting, heading, empty=True)

    def _leave(self, waiting: _Waiting, heading: Status | None, *, empty: bool) -> None:
        """Another line came, or none, than the status that was waited for; `empty`: nothing stands below."""
        if waiting.listed:
            self._item(waiting.phrase, heading)
        elif waiting.bulleted and empty:
            self.unparsed += 1

    def _status_line(self, waiting: _Waiting, said: Status | None) -> None:
        """A line that holds the status of the finding above it."""
        if waiting.phrase and said is not None:
            self._item(waiting.phrase, said)
        else:
            self.unparsed += 1

    def _line(self, line: str, heading: Status | None, *, bulleted: bool) -> None:
        head, said = _leading_status(line)
        if said is not None:  # "Absent: effusion, edema"
            self._list(_pieces(head, _PIECES), said, MOST_WORDS if bulleted else MOST_WORDS_BARE)
        elif bulleted:
            for piece in _pieces(line, _SENTENCES):
                self._item(piece, heading)
        elif _is_marked(line):
            self._item(line, heading)
        else:
            self._list(_pieces(line, _PIECES), heading, MOST_WORDS_BARE)

    def _list(self, pieces: Sequence[str], status: Status | None, most: int) -> None:
        """Pieces between commas: a status belongs to the piece before it, and "no A, B or C" denies all three."""
        alternatives = [k for k, piece in enumerate(pieces) if piece.lower().startswith("or ")]
        shared = _own_status(pieces[0][:_LONGEST_DENIAL])[1] if alternatives else ()
        k = 0
        while k < len(pieces):
            phrase, said = _split_status(pieces[k])
            statuses = [status, said]
            if alternatives and k <= alternatives[-1]:
                statuses += shared
            if k + 1 < len(pieces) and (following := status_of(pieces[k + 1])) is not None:
                statuses.append(following)
                k += 1
            self.add(phrase, statuses, most=most)
            k += 1


def _key(text: str) -> str:
    """A key or title as the lists of words spell it."""
    return " ".join(text.lower().replace("_", " ").replace("-", " ").strip(_EDGES).split())


def _is_phrase(value: JsonValue) -> bool:
    return isinstance(value, str) and status_of(value) is None


def _only_status(value: JsonObject) -> bool:
    keys = {_key(key) for key, _ in value.pairs}
    return bool(keys & STATUS_KEYS) and not keys & NAME_KEYS


def _heading_status(title: str) -> Status | None:
    """The status of "absent findings"; None of "findings", and of "0", which is a number there."""
    said = status_of(" ".join(word for word in title.split() if word not in HEADER_WORDS))
    return said if any(map(str.isalpha, title)) else None


def _is_header(title: str) -> bool:
    """Whether a line is a table's first row or the name of what follows."""
    words = title.lower().replace("|", " ").replace(",", " ").split()
    return bool(words) and all(word in HEADER_WORDS or word in STATUS_KEYS for word in words)


def _is_marked(line: str) -> bool:
    """Whether all of a line is one finding with its status; in a comma list each piece has its own."""
    phrase, said = _split_status(line)
    return said is not None and ", " not in phrase and "; " not in phrase


def _pieces(text: str, between: re.Pattern[str]) -> list[str]:
    pieces = [piece.strip() for piece in between.split(" ".join(text.split()))]
    # What a bullet or number stands before in the middle of a line keeps it.
    pieces = [piece[match.end() :] if (match := _BULLET.match(piece)) else piece for piece in pieces]
    return [piece for piece in pieces if piece.strip(_EDGES)] or [text]


def _split_status(text: str) -> tuple[str, Status | None]:
    """A text without the status that stands behind or before it in marks; None where there is none."""
    text = text.strip(_EDGES.replace(":", ""))
    for closing, opening in ((")", "("), ("]", "[")):
        if text.endswith(closing) and (start := text.rfind(opening)) > 0:
            inside = text[start + 1 : -1]
            key, _, rest = inside.partition(":")
            said = status_of(rest if _key(key) in STATUS_KEYS else inside)
            if said is not None:
                return text[:start], said
    for mark in _SEPARATORS:
        place = text.rfind(mark)
        said = status_of(text[place + len(mark) :]) if place > 0 else None
        if said is not None:
            phrase, _, last = text[:place].strip(_EDGES).rpartition(" ")
            named = bool(phrase) and _key(last) in STATUS_KEYS  # "effusion, status: absent"
            return (phrase if named else text[:place]), said
    return _leading_status(text)


def _leading_status(text: str) -> tuple[str, Status | None]:
    """As `_split_status`, of "absent: effusion"."""
    for mark in _LEADING_SEPARATORS:
        place = text.find(mark)
        said = _heading_status(_key(text[:place])) if place > 0 else None
        if said is not None:
            return text[place + len(mark) :], said
    return text, None


def _own_status(phrase: str) -> tuple[str, list[Status]]:
    """A phrase without the words that deny or hedge it, and what they say: "no effusion", "lungs: no effusion"."""
    head, colon, rest = phrase.partition(":")
    words = (rest if colon else phrase).split()
    said: list[Status] = []
    if words and words[0].startswith("?"):
        said.append("uncertain")
    words = [word for word in (word.strip(_EDGES + "?()[]{}") for word in words) if word]
    if words and words[0].lower() in ("and", "or"):
        del words[0]
    lower = [word.lower() for word in words]
    while lead := _fitting(lower, LEADS, LONGEST_LEAD, behind=False):
        said.append(LEADS[lead])
        words, lower = words[len(lead) :], lower[len(lead) :]
    if tail := _fitting(lower, TAILS, LONGEST_TAIL, behind=True):
        said.append(TAILS[tail])
        words = words[: -len(tail)]
    before = [word.strip(_EDGES) for word in head.split() if colon]
    return " ".join(word for word in (*before, *words) if word), said


def _fitting(
    words: Sequence[str], known: Mapping[tuple[str, ...], Status], longest: int, *, behind: bool
) -> tuple[str, ...]:
    """The longest known words at one end that leave a word over; () where there are none."""
    for n in range(min(longest, len(words) - 1), 0, -1):
        end = tuple(words[-n:] if behind else words[:n])
        if end in known:
            return end
    return ()

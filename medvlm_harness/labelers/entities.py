"""Entities of a report in RadGraph's form, by rules: a lexicon, the assertion engine, and what stands beside what.

Tokens, spans, statuses and relations follow RadGraph (Jain et al. 2021, arXiv 2106.14463) with the label names of
RadGraph-XL (Delbrouck et al. 2024). Relations come from adjacency rules and are approximate: for scores that hang on
them use annotated files where there are some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from medvlm_harness.labelers.assertion import ASSERTION_TERMS, AssertionEngine
from medvlm_harness.labelers.entity_relations import link
from medvlm_harness.labelers.lexicon import ENTITY_TERMS, Kind, lexicon
from medvlm_harness.labelers.term_files import rules_version
from medvlm_harness.labelers.text import stretches_to_read

if TYPE_CHECKING:
    from spacy.tokens import Doc

__all__ = ["EntityExtractor", "Span", "Status"]

Status = Literal["definitely present", "definitely absent", "uncertain"]
Relation = tuple[str, int]  # type, position of the target in the list of spans

_NUMBER = r"\d+(?: \. \d+)?"
_UNIT = r"(?:mm|cm|m|ml|cc|inch|inches|fr|french|percent|%|degrees?)"
_MEASURE = re.compile(rf"{_NUMBER}(?: (?:x|by|to|-) {_NUMBER})* (?:- )?{_UNIT}(?= |$)|\d+(?:mm|cm)(?= |$)")
_VERTEBRA = re.compile(r"[CTLS]\d{1,2}")
_ORDINAL = re.compile(r"\d{1,2}(?:st|nd|rd|th)", re.IGNORECASE)  # of ribs
_HYPHENS = frozenset("-\u2010\u2011")
# "S-shaped", "pleural-based": what the first part makes of the noun is a description, whatever it is.
_SHAPES = frozenset({"shaped", "like", "appearing", "sized", "based", "looking", "form"})
_HEDGES = frozenset({"probably", "probable", "possibly", "possible", "likely", "presumably", "perhaps"})


@dataclass(slots=True)
class Span:
    """One entity while it is worked out."""

    start: int  # tokens [start, end]
    end: int
    kind: Kind
    group: str  # list of the lexicon, or "measures"
    word: str  # lower case, as spelt in the lexicon
    status: Status = "definitely present"
    relations: list[Relation] = field(default_factory=list)


class EntityExtractor:
    """Extracts entities from report text.

    One report takes about a millisecond; nothing is loaded but the term files.
    """

    name = "rules"

    def __init__(self) -> None:
        self._lexicon = lexicon()
        self._engine = AssertionEngine({})
        modules = ("entities", "entity_phrases", "entity_relations", "lexicon", "assertion", "text")
        self.version = rules_version((ENTITY_TERMS, ASSERTION_TERMS, "sections.yaml"), modules)

    @property
    def metadata(self) -> dict[str, str]:
        """What made the entities, for every file and result that holds them."""
        return {
            "extractor": self.name,
            "version": self.version,
            "relations": "approximate: adjacency rules",
        }

    def extract(self, text: str) -> dict[str, Any]:
        """One report as RadGraph writes it: `text` (tokens joined by spaces) and `entities` by number.

        Sections that are not about the image (indication, history, ...) are part of the text and hold no entity.

        >>> extracted = EntityExtractor().extract("No effusion.")
        >>> extracted["text"], extracted["entities"]["1"]["label"]
        ('No effusion .', 'Observation::definitely absent')
        """
        return self.extract_tokens([token.text for token in self._engine.parse(text) if not token.is_space])

    def extract_tokens(self, tokens: Sequence[str]) -> dict[str, Any]:
        """As `extract`, of a text that is tokenised, so that the spans fit another annotation of the same tokens.

        Args:
            tokens: without white space in them.
        """
        doc = self._engine.parse_tokens([self._lexicon.spelt(token) for token in tokens])
        spans = self._spans(tokens, [token.text for token in doc])
        spans = self._with_status(doc, spans)
        for span, relations in zip(spans, link(doc, spans), strict=True):
            span.relations = relations
        _pass_status_on(doc, spans)
        return {"text": " ".join(tokens), "entities": _entities(tokens, spans)}

    def extract_all(self, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Reports by key, as in a RadGraph file; each says what extracted it."""
        return {key: {**self.extract(text), "metadata": self.metadata} for key, text in texts.items()}

    def _spans(self, tokens: Sequence[str], spelt: Sequence[str]) -> list[Span]:
        """Every entity by its words alone, in order."""
        read = _tokens_to_read(tokens)
        taken = [not inside for inside in read]
        spans = [*_measures(tokens, taken), *self._hyphenated(spelt, taken)]
        for span in spans:
            taken[span.start : span.end + 1] = [True] * (span.end - span.start + 1)
        for i, token in enumerate(spelt):
            if taken[i]:
                continue
            word = self._lexicon.find(token)
            if token.lower() == "in" and i + 1 < len(spelt) and spelt[i + 1].lower() == "place" and not taken[i + 1]:
                spans.append(Span(i, i + 1, "Observation", "normality", "in place"))
            elif _VERTEBRA.fullmatch(token):
                spans.append(Span(i, i, "Anatomy", "organs", token.lower()))
            elif _ORDINAL.fullmatch(token):
                spans.append(Span(i, i, "Anatomy", "places", token.lower()))
            elif word is not None:
                spans.append(Span(i, i, word.kind, word.group, word.base))
            elif token.lower() in self._lexicon.lists["graders"]:
                spans.append(Span(i, i, "Observation", "descriptors", token.lower()))
        spans.sort(key=lambda span: span.start)
        return _in_context([token.lower() for token in spelt], spans, self._lexicon.lists)

    def _hyphenated(self, spelt: Sequence[str], taken: Sequence[bool]) -> list[Span]:
        """Words joined by hyphens: one entity where the whole or a part is one."""
        spans = []
        i = 0
        while i < len(spelt):
            end = i
            while end + 2 < len(spelt) and spelt[end + 1] in _HYPHENS and spelt[end + 2].isalnum():
                end += 2
            if end > i and spelt[i].isalnum() and not any(taken[i : end + 1]):
                parts = [spelt[k] for k in range(i, end + 1, 2)]
                found = self._lexicon.find("-".join(parts)) or self._lexicon.find("".join(parts))
                each = [self._lexicon.find(part) for part in parts]
                if found is None and any(_VERTEBRA.fullmatch(part) for part in parts):
                    spans.append(Span(i, end, "Anatomy", "organs", "-".join(parts).lower()))
                elif found is None and parts[-1].lower() in _SHAPES:
                    spans.append(Span(i, end, "Observation", "descriptors", "-".join(parts).lower()))
                elif found is None and any(each):
                    # "left-sided" is a place, "well-defined" a description; the last part that is known decides.
                    found = [word for word in each if word is not None][-1]
                if found is not None:
                    spans.append(Span(i, end, found.kind, found.group, found.base))
            i = end + 1
        return spans

    def _with_status(self, doc: Doc, spans: list[Span]) -> list[Span]:
        """The spans that are about this image, observations with what the engine says of each."""
        targets = self._engine.assert_spans(doc, [(span.kind, span.start, span.end + 1) for span in spans])
        kept = []
        for span, target in zip(spans, targets, strict=True):
            said = target.assertions
            if "hypothetical" in said and "not_excluded" not in said:
                continue
            if span.kind == "Observation":
                span.status = _status(said)
            kept.append(span)
        return kept


def _status(said: frozenset[str]) -> Status:
    if said & {"not_excluded", "unlikely"}:
        return "uncertain"
    if "negated" in said:
        return "definitely absent"
    return "uncertain" if "uncertain" in said else "definitely present"


def _tokens_to_read(tokens: Sequence[str]) -> list[bool]:
    """Whether each token lies in a section that is about the image; section heads do not."""
    text = " ".join(tokens)
    stretches = stretches_to_read(text)
    read, position = [], 0
    for token in tokens:
        read.append(any(stretch.start <= position < stretch.end for stretch in stretches))
        position += len(token) + 1
    return read


def _measures(tokens: Sequence[str], taken: Sequence[bool]) -> list[Span]:
    """Numbers with their unit; with `above` or `below` behind them they are a place."""
    text = " ".join(tokens).lower()
    starts, position = {}, 0
    for i, token in enumerate(tokens):
        starts[position] = i
        position += len(token) + 1
    spans = []
    for match in _MEASURE.finditer(text):
        start = starts.get(match.start())
        if start is None:
            continue
        end = start + len(match.group().split(" ")) - 1
        if any(taken[start : end + 1]):
            continue
        following = tokens[end + 1].lower() if end + 1 < len(tokens) else ""
        if following in ("above", "below", "beneath"):
            spans.append(Span(start, end + 1, "Anatomy", "prepositions", following))
        else:
            spans.append(Span(start, end, "Observation", "measures", match.group()))
    return spans


def _in_context(lower: Sequence[str], spans: list[Span], lists: Mapping[str, frozenset[str]]) -> list[Span]:
    """The spans that are entities where they stand, with the kind they have there."""
    technique = _of_technique(lower, lists)
    starting = {span.start: span for span in spans}
    kept: list[Span] = []
    for span in reversed(spans):
        if technique[span.start]:
            continue
        following = lower[span.end + 1] if span.end + 1 < len(lower) else ""
        before = lower[span.start - 1] if span.start else ""
        behind = starting.get(span.end + 1)
        if behind not in kept[-1:]:
            behind = None  # dropped
        if _names_nothing(span, before, following, behind, lists):
            continue
        _settle_kind(span, before, following, behind)
        kept.append(span)
    return kept[::-1]


def _names_nothing(
    span: Span, before: str, following: str, behind: Span | None, lists: Mapping[str, frozenset[str]]
) -> bool:
    """Whether a word of the lexicon is none where it stands."""
    word = span.word
    if word in lists["graders"]:
        return behind is None or behind.kind != "Observation"
    if word == "free":
        return following in ("of", "from")
    if word in ("suspicious", "negative"):
        return following in ("for", "of", "with")
    if word == "level":
        return before != "fluid"
    if word == "top":
        return following != "normal"
    if word in ("both", "one", "two", "three", "four", "double", "single", "half"):
        return behind is None
    if word in ("above", "below", "beneath") and span.start == span.end:
        return following not in ("the", "left", "right") and behind is None
    if word == "lead":
        return following == "to"
    return word == "body" and before not in ("foreign", "vertebral") and behind is None


def _settle_kind(span: Span, before: str, following: str, behind: Span | None) -> None:
    """A few words are a place beside one word and a description beside another."""
    place = behind is not None and behind.kind == "Anatomy"
    if span.word in ("low", "high") and place and behind is not None and behind.word not in ("lung", "volume"):
        span.kind, span.group = "Anatomy", "places"
    elif span.word == "upper" and following.startswith("limit"):
        span.kind, span.group = "Observation", "descriptors"
    elif span.word == "soft" and following.startswith("tissue"):
        span.kind, span.group = "Anatomy", "places"
    elif span.word == "air" and following in ("space", "spaces"):
        span.kind, span.group = "Anatomy", "organs"
    elif span.word == "body" and before == "foreign":
        span.kind, span.group = "Observation", "findings"


def _of_technique(lower: Sequence[str], lists: Mapping[str, frozenset[str]]) -> list[bool]:
    """Tokens that speak of views and positioning: the noun phrase of a view, and a clause of rotation."""
    marked = [False] * len(lower)
    words = lists["technique"]
    for i, token in enumerate(lower):
        if token not in words:
            continue
        first = i
        while (
            first
            and lower[first - 1] not in (".", ";", ":", ",")
            and (lower[first - 1] in words or lower[first - 1] in _BEFORE_A_VIEW)
        ):
            first -= 1
        last = i
        if token in ("rotated", "rotation"):
            while last + 1 < len(lower) and lower[last + 1] not in (".", ";", ","):
                last += 1
        elif lower[i + 1 : i + 3] == ["of", "the"] and i + 3 < len(lower):
            last = i + 3
        marked[first : last + 1] = [True] * (last + 1 - first)
    return marked


_BEFORE_A_VIEW = frozenset(
    ["single", "two", "three", "one", "frontal", "lateral", "and", "oblique", "lordotic", "chest", "a", "an", "this"]
)


def _pass_status_on(doc: Doc, spans: Sequence[Span]) -> None:
    """A modifier has the status of what it modifies, unless it is a change that is denied or is hedged by itself."""
    denied = lexicon().lists["denied_changes"]

    def settled(position: int, seen: frozenset[int]) -> Status:
        span = spans[position]
        heads = [target for kind, target in span.relations if kind == "modify" and spans[target].kind == span.kind]
        if span.kind != "Observation" or not heads or heads[0] in seen:
            return span.status
        if span.word in denied and _denied(doc, span):
            return "definitely absent"
        if span.start and doc[span.start - 1].lower_ in _HEDGES and heads[0] < position:
            return "uncertain"
        return settled(heads[0], seen | {position})

    for span in spans:
        following = doc[span.end + 1].lower_ if span.end + 1 < len(doc) else ""
        if span.kind == "Observation" and span.status == "definitely present" and following in ("versus", "vs"):
            span.status = "uncertain"  # one of two: neither is certain
    statuses = [settled(position, frozenset()) for position in range(len(spans))]
    for span, status in zip(spans, statuses, strict=True):
        span.status = status


def _denied(doc: Doc, span: Span) -> bool:
    """Whether a "no" or "not" stands right before a change, with nothing but adjectives between."""
    before = [token.lower_ for token in doc[max(0, span.start - 4) : span.start]]
    for word in reversed(before):
        if word in ("no", "not", "without"):
            return True
        if not word.isalpha() or word in ("of", "in", "with", "and", "or"):
            return False
    return False


def _entities(tokens: Sequence[str], spans: Sequence[Span]) -> dict[str, dict[str, Any]]:
    """Numbered from 1, as RadGraph writes them."""
    return {
        str(number): {
            "tokens": " ".join(tokens[span.start : span.end + 1]),
            "label": f"{span.kind}::{span.status}",
            "start_ix": span.start,
            "end_ix": span.end,
            "relations": [[kind, str(target + 1)] for kind, target in span.relations],
        }
        for number, span in enumerate(spans, start=1)
    }

"""The words of the entity extractor, looked up in any inflection, and misspelt words taken for what they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple

from medvlm_harness.labelers.assertion import ASSERTION_TERMS, ASSERTIONS
from medvlm_harness.labelers.term_files import load_terms, strings

__all__ = ["ENTITY_TERMS", "Kind", "Lexicon", "Word", "lexicon"]

ENTITY_TERMS = "entities.yaml"
Kind = Literal["Anatomy", "Observation"]
_GROUPS: dict[Kind, tuple[str, ...]] = {
    "Anatomy": ("organs", "parts", "places", "abbreviations", "prepositions"),
    "Observation": ("findings", "devices", "normality", "descriptors"),
}
_LISTS = (
    "graders",
    "denied_changes",
    "nouns_of_change",
    "degrees_of_change",
    "changes",
    "left_open",
    "offers",
    "copulas",
    "fillers",
    "prepositions",
    "joins",
    "technique",
    "known",
)
# A shorter word is a word of its own too often: "this" is no "thin".
_SHORTEST_MISSPELT = 5
_REMEMBERED = 2**16  # distinct tokens


class Word(NamedTuple):
    """What a word of the lexicon is."""

    kind: Kind
    group: str  # the list it stands in: organs, findings, ...
    base: str  # as it stands there


@dataclass(frozen=True, slots=True, eq=False)
class Lexicon:
    """The term file `entities.yaml`, ready for look-ups."""

    words: dict[str, Word]  # lower case -> word
    lists: dict[str, frozenset[str]]
    known: frozenset[str]  # words that are spelt as they are meant
    near: dict[str, tuple[str, ...]]  # a spelling with one letter left out -> words

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019  # there is one lexicon, and it lives as long as the process
    def find(self, token: str) -> Word | None:
        """The word that a token is an inflection of; abbreviations of one or two letters count in capitals only."""
        lower = token.lower()
        for base in _bases(lower):
            word = self.words.get(base)
            if word is not None:
                short = word.group == "abbreviations" and len(base) <= 2
                return None if short and not token[:2].isupper() else word
        return None

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019
    def spelt(self, token: str) -> str:
        """The token, or the word that is one slip of the pen away: a letter missing, added, changed, or two swapped."""
        lower = token.lower()
        if len(lower) < _SHORTEST_MISSPELT - 1 or not lower.isalpha() or self._is_known(token):
            return token
        candidates = {word for key in _without_one(lower) for word in self.near.get(key, ())}
        fitting = sorted(
            word
            for word in candidates
            if word[0] == lower[0]
            and max(len(word), len(lower)) >= _SHORTEST_MISSPELT
            and (len(lower) >= _SHORTEST_MISSPELT or len(word) > len(lower))
            and _one_slip(lower, word)
        )
        if not fitting:
            return token
        return fitting[0].capitalize() if token[0].isupper() else fitting[0]

    def _is_known(self, token: str) -> bool:
        lower = token.lower()
        return set(lower) == {"x"} or any(base in self.known or base in self.words for base in _bases(lower))


@cache
def lexicon() -> Lexicon:
    """The lexicon, read once."""
    from spacy.lang.en.stop_words import STOP_WORDS

    raw = load_terms(ENTITY_TERMS, {"anatomy", "observation", *_LISTS})
    words: dict[str, Word] = {}
    for kind, groups in _GROUPS.items():
        lists = raw[kind.lower()]
        if lists.keys() != set(groups):
            raise ValueError(f"Expected {', '.join(groups)} under {kind.lower()} in {ENTITY_TERMS}.")
        for group in groups:
            for base in strings(ENTITY_TERMS, lists[group]):
                if base in words:
                    raise ValueError(f"Expected {base!r} once in {ENTITY_TERMS}, but got it twice.")
                words[base] = Word(kind, group, base)
    lists = {name: frozenset(strings(ENTITY_TERMS, raw[name])) for name in _LISTS}
    terms = {part for phrase in _assertion_phrases() for part in phrase.split() if part.isalpha()}
    known = frozenset(STOP_WORDS) | terms | frozenset().union(*lists.values())
    near: dict[str, list[str]] = {}
    for base in sorted({*words, *terms}):
        if base.isalpha() and len(base) >= _SHORTEST_MISSPELT:
            for form in (base, *_inflections(base)) if base in words else (base,):
                for key in _without_one(form):
                    near.setdefault(key, []).append(form)
    return Lexicon(words, lists, known, {key: tuple(forms) for key, forms in near.items()})


def _assertion_phrases() -> Iterator[str]:
    terms = load_terms(ASSERTION_TERMS, {*ASSERTIONS, "always_terminating", "abbreviations"})
    for name in ASSERTIONS:
        for phrases in terms[name].values():
            yield from strings(ASSERTION_TERMS, phrases)


def _bases(lower: str) -> Iterator[str]:
    """What a word may be an inflection of, itself first."""
    yield lower
    if lower.endswith("s") and len(lower) > 3:
        yield lower[:-1]
        if lower.endswith("es"):
            yield lower[:-2]
        if lower.endswith("ies"):
            yield lower[:-3] + "y"
    if lower.endswith("ly") and len(lower) > 5:
        yield lower[:-2]
        if lower.endswith("ally"):
            yield lower[:-4]
        if lower.endswith("ily"):
            yield lower[:-3] + "y"


def _inflections(base: str) -> tuple[str, ...]:
    return (f"{base[:-1]}ies",) if base.endswith("y") else (f"{base}s",)


def _without_one(word: str) -> Iterable[str]:
    return {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))}


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter more, less or other, or two neighbours swapped, makes one word the other."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return a == b
    shared = min(len(a), len(b))
    i = next((k for k in range(shared) if a[k] != b[k]), shared)
    if len(a) > len(b):
        return a[i + 1 :] == b[i:]
    if len(b) > len(a):
        return a[i:] == b[i + 1 :]
    return a[i + 1 :] == b[i + 1 :] or (a[i : i + 2] == b[i : i + 2][::-1] and a[i + 2 :] == b[i + 2 :])

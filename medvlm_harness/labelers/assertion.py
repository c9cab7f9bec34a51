"""What a sentence says of each thing it names: denied, unlikely, uncertain, hypothetical, normal, and so on.

spaCy's blank English pipeline with a rule for sentence ends, and negspacy's NegEx once per kind of assertion, each with
the term set of that name in `terms/assertion.yaml`. Deterministic and offline. NegEx (Chapman et al. 2001,
doi 10.1006/jbin.2001.1029) is lexical: a term reaches from where it stands to the end of its stretch of the sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from medvlm_harness.labelers.term_files import load_terms, strings

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc

__all__ = ["ASSERTIONS", "ASSERTION_TERMS", "AssertionEngine", "Target"]

ASSERTION_TERMS = "assertion.yaml"
ASSERTIONS = (
    "not_excluded",  # "cannot exclude X": uncertainty that beats a negation
    "negated",
    "unlikely",
    "uncertain",
    "hypothetical",  # indication, advice: says nothing of this image
    "normal",
    "abnormal",
    "indefinite",  # of a size or contour: only stable, borderline or hidden
)
_KINDS = ("pseudo", "preceding", "following", "termination")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_SPANS = "targets"  # the key of Doc.spans
_STOPS = frozenset(".!?")  # a "?" may also stand before what it doubts


class Target(NamedTuple):
    """One thing that a text names, and which assertions reach it."""

    key: str  # the name under which its phrase was given
    start: int  # tokens [start, end)
    end: int
    assertions: frozenset[str]


class AssertionEngine:
    """Finds phrases in texts and tells what each text asserts of them.

    Args:
        phrases: key -> phrases in any case; of one key, the longest phrase at a place counts.
        reach: assertion -> the keys it applies to, where it does not apply to all.
    """

    def __init__(
        self, phrases: Mapping[str, Sequence[str]], *, reach: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        from spacy.matcher import PhraseMatcher

        self.nlp = _pipeline({name: tuple(keys) for name, keys in (reach or {}).items()})
        self._matcher = PhraseMatcher(self.nlp.vocab, attr="LOWER")
        for key, values in phrases.items():
            self._matcher.add(key, list(self.nlp.tokenizer.pipe(values)))

    def parse(self, text: str) -> Doc:
        """Tokens and sentences of a text."""
        return self._with_sentences(self.nlp.make_doc(text))

    def parse_tokens(self, tokens: Sequence[str]) -> Doc:
        """The same of text that is split into tokens already."""
        from spacy.tokens import Doc

        return self._with_sentences(Doc(self.nlp.vocab, words=list(tokens)))

    def find(self, doc: Doc) -> list[Target]:
        """Every phrase in a parsed text, with its assertions, in order of place."""
        strings_of = self.nlp.vocab.strings
        found = sorted(
            ((strings_of[key], start, end) for key, start, end in self._matcher(doc)),
            key=lambda match: (match[1], -match[2], match[0]),
        )
        longest: list[tuple[str, int, int]] = []
        reached: dict[str, int] = {}  # key -> end of its last match
        for key, start, end in found:
            if end > reached.get(key, -1):
                longest.append((key, start, end))
                reached[key] = end
        return self.assert_spans(doc, longest)

    def assert_spans(self, doc: Doc, spans: Sequence[tuple[str, int, int]]) -> list[Target]:
        """What the text asserts of the given (key, start, end) spans of tokens."""
        from spacy.tokens import Span

        if not spans:
            return []
        targets = [Span(doc, start, end, label=key) for key, start, end in spans]
        doc.spans[_SPANS] = targets
        for _, component in self.nlp.pipeline:
            component(doc)
        return [
            Target(
                target.label_,
                target.start,
                target.end,
                frozenset(name for name in ASSERTIONS if target._.get(_extension(name))),
            )
            for target in targets
        ]

    def _with_sentences(self, doc: Doc) -> Doc:
        for token, starts in zip(doc, _sentence_starts(doc), strict=True):
            token.is_sent_start = starts
        return doc


def _sentence_starts(doc: Doc) -> Iterator[bool]:
    """After each full stop, save in decimals (also as RadGraph splits them: `4 . 2`) and after abbreviations."""
    starts = True
    for token in doc:
        yield starts
        began, starts = starts, False
        if token.is_space and "\n" in token.text:
            starts = True
        elif token.text in _STOPS:
            starts = token.text != "." or not _inner_point(doc, token.i)
            if token.text == "?" and token.i + 1 < len(doc):
                starts = not began and bool(token.whitespace_) and not doc[token.i + 1].is_lower


def _inner_point(doc: Doc, i: int) -> bool:
    """Whether a point stands inside a number or ends an abbreviation."""
    if not 0 < i < len(doc) - 1:
        return False
    before, after = doc[i - 1], doc[i + 1]
    decimal = before.is_digit and after.is_digit and (bool(before.whitespace_) or not doc[i].whitespace_)
    return decimal or before.lower_ in _abbreviations()


@cache
def _term_sets() -> dict[str, Any]:
    return load_terms(ASSERTION_TERMS, {*ASSERTIONS, "always_terminating", "abbreviations"})


@cache
def _abbreviations() -> frozenset[str]:
    return frozenset(strings(ASSERTION_TERMS, _term_sets()["abbreviations"]))


def _extension(name: str) -> str:
    return f"medvlm_{name}"


def _pipeline(reach: Mapping[str, tuple[str, ...]]) -> Language:
    import negspacy.negation  # noqa: F401  # registers the component "negex"
    import spacy
    from spacy.tokenizer import Tokenizer

    nlp = spacy.blank("en")
    # Words and single punctuation marks, as RadGraph's texts are split; spaCy's own splits "cannot" and keeps "4.2".
    split = _PUNCTUATION
    nlp.tokenizer = Tokenizer(
        nlp.vocab,
        prefix_search=re.compile(rf"^(?:{split.pattern})").search,
        suffix_search=re.compile(rf"(?:{split.pattern})$").search,
        infix_finditer=split.finditer,
    )
    always = strings(ASSERTION_TERMS, _term_sets()["always_terminating"])
    for name in ASSERTIONS:
        terms = _term_sets()[name]
        if not isinstance(terms, dict) or terms.keys() != set(_KINDS):
            raise ValueError(f"Expected the keys {', '.join(_KINDS)} under {name} in {ASSERTION_TERMS}.")
        lists = {kind: strings(ASSERTION_TERMS, terms[kind]) for kind in _KINDS}
        nlp.add_pipe(
            "negex",
            name=name,
            config={
                "neg_termset": {
                    "pseudo_negations": list(lists["pseudo"]),
                    "preceding_negations": list(lists["preceding"]),
                    "following_negations": list(lists["following"]),
                    "termination": list(dict.fromkeys((*lists["termination"], *always))),
                },
                "ent_types": list(reach.get(name, ())),
                "extension_name": _extension(name),
                "span_keys": [_SPANS],
            },
        )
    return nlp

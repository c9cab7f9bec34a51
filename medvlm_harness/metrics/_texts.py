"""What the metrics that compare texts have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["checked_pairs", "checked_texts", "tfidf_vectorizer", "word_spans", "words"]

_WORD = re.compile(r"[^\W_]+(?:[.'’-][^\W_]+)*")


def checked_texts(texts: Sequence[str | None], what: str) -> list[str]:
    """The texts, "" for None, or ValueError: a lone string would count as one text per letter, NaN as the text "nan".

    Args:
        texts: shape (n,).
        what: their name in the error.
    """
    if isinstance(texts, str):
        raise ValueError(f"Expected {what} as a sequence of texts, but got one text.")
    for place, text in enumerate(texts):
        if not (text is None or isinstance(text, str)):
            raise ValueError(f"Expected a text or None at {place} of {what}, but got {type(text).__name__}.")
    return [text or "" for text in texts]


def checked_pairs(generated: Sequence[str | None], references: Sequence[str | None]) -> Iterator[tuple[str, str]]:
    """Pairs of generated and reference text, or ValueError."""
    texts, wanted = checked_texts(generated, "generated"), checked_texts(references, "references")
    if len(texts) != len(wanted):
        raise ValueError(f"Expected a reference for each generated text, but got {len(wanted)} for {len(texts)}.")
    return zip(texts, wanted, strict=True)


def words(text: str) -> list[str]:
    """Words in lower case, without marks; "3.5", "x-ray" and "patient's" are one word each.

    >>> words("Nodule: 3.5 cm, well-defined.")
    ['nodule', '3.5', 'cm', 'well-defined']
    """
    return _WORD.findall(text.lower())


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """Each of `words` with the characters [start, end) where it stands.

    >>> word_spans("No effusion.")
    [('no', 0, 2), ('effusion', 3, 11)]
    """
    return [(found.group().lower(), *found.span()) for found in _WORD.finditer(text)]


def tfidf_vectorizer() -> Any:
    """TF-IDF of words and word pairs, to be fitted; without stop words taken out: "no" decides."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, tokenizer=words, token_pattern=None)

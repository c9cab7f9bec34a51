"""Choosing among texts: was the right one chosen, and how often would a chooser be right that reads nothing, or counts.

Equal scores share the choice: a constant model scores exactly chance, wherever the right options stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._texts import checked_texts, tfidf_vectorizer, words

__all__ = ["choice_hits", "frequency_scores", "likeness_scores", "same_words"]


def choice_hits(scores: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """Probability that the right option is chosen, where the highest score is and equal ones share; (n,), in [0, 1].

    Args:
        scores: of each option, higher is chosen, (n, options); one that is NaN is never chosen before another.
        truth: place of the right option, from 0, (n,).

    Raises:
        ValueError: if the shapes differ, there is no option, or a place is none.

    >>> choice_hits([[0.1, 0.9], [0.5, 0.5]], [1, 0]).tolist()
    [1.0, 0.5]
    """
    s, t = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if s.ndim != 2 or s.shape[1] < 1 or t.shape != (len(s),):
        raise ValueError(f"Expected scores (n, options) and truth (n,), but got {s.shape} and {t.shape}.")
    if t.size and not (t.dtype.kind in "iu" and t.min() >= 0 and t.max() < s.shape[1]):
        raise ValueError(f"Expected truth to hold places from 0 to {s.shape[1] - 1}, but got {np.unique(t)[:5]}.")
    known = np.where(np.isnan(s), -np.inf, s)
    best = known == known.max(axis=1, keepdims=True)
    return np.where(best[np.arange(len(s)), t], 1 / best.sum(axis=1), 0.0)


def same_words(text: str) -> str:
    """What texts of the same words have in common: the words in lower case, without marks.

    >>> same_words("No acute  disease.") == same_words("no acute disease")
    True
    """
    return " ".join(words(text))


def frequency_scores(train: Sequence[str | None], options: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """How many training texts have the words of each option, (n, options): the floor that knows what is usual."""
    counts = Counter(same_words(text) for text in checked_texts(train, "train"))
    return np.array([[counts[same_words(option)] for option in one] for one in options], dtype=np.float64)


def likeness_scores(
    train: Sequence[str | None], sources: Sequence[str | None], options: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """Cosine of TF-IDF vectors of each source and each of its options, (n, options): the floor that compares words.

    Vectors are of words and word pairs, fitted on the training texts; 0 where nothing is alike.

    Args:
        train: texts of both kinds.
        sources: shape (n,).
        options: as many for each source.

    Raises:
        ValueError: if no training text has a word, or the numbers of sources and options differ.
    """
    known = [text for text in checked_texts(train, "train") if words(text)]
    texts = checked_texts(sources, "sources")
    if not known:
        raise ValueError("Expected a training text with a word, but there is none.")
    if len(texts) != len(options):
        raise ValueError(f"Expected options for each source, but got {len(options)} for {len(texts)}.")
    if not texts:
        return np.zeros((0, 0))
    vectorizer = tfidf_vectorizer().fit(known)
    of_sources = vectorizer.transform(texts)
    columns = [vectorizer.transform(column) for column in zip(*options, strict=True)]
    return np.stack([np.asarray(of_sources.multiply(column).sum(axis=1)).ravel() for column in columns], axis=1)

"""Extractive summaries: sentences of the text itself, picked by their vectors. Never to be taken for written ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["centroid_sentences"]


def centroid_sentences(vectors: ArrayLike, *, count: int = 1) -> NDArray[np.int64]:
    """The places of the sentences most like the whole text, in the text's order.

    Like is the cosine with the mean of the sentences' unit vectors (centroid summarisation, as Radev et al. 2004 do it
    with TF-IDF); of equal ones the first.

    Args:
        vectors: one per sentence, (sentences, d), of any length but zero.
        count: how many to pick; all where there are fewer.

    Raises:
        ValueError: if the shape is another, a vector is zero, or count is below 1.

    >>> centroid_sentences([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]], count=2).tolist()
    [0, 2]
    """
    array = np.asarray(vectors, dtype=np.float64)
    if array.ndim != 2 or not len(array):
        raise ValueError(f"Expected vectors of shape (sentences, d) with one sentence or more, but got {array.shape}.")
    if count < 1:
        raise ValueError(f"Expected count to be at least 1, but got {count}.")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError("Expected finite vectors of some length, but one is zero or not finite.")
    unit = array / lengths
    likeness = unit @ unit.mean(axis=0)
    order = np.argsort(-np.round(likeness, 12), kind="stable")[:count]
    return np.sort(order)

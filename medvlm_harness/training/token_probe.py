"""Entities from an encoder by a linear probe on its token vectors: begin, inside, outside (BIO) tags per word.

Encoders cannot list entities in words; this is how they take part. Training documents are RadGraph's JSON: a text of
words joined by blanks, and entities as ranges of words, ends included. Relations are not predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["OUTSIDE", "TokenProbe", "bio_tags", "entities_of", "span_f1", "word_vectors"]

OUTSIDE = "O"
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 3
ITERATIONS = 2000
Vectors = NDArray[np.float64]
Span = tuple[int, int, str]  # first word, last word, label


def bio_tags(document: Mapping[str, Any]) -> list[str]:
    """One tag per word of a RadGraph document; where entities overlap, the one that begins first, then the longer.

    Raises:
        ValueError: if an entity lies outside the text.

    >>> bio_tags({"text": "no pleural effusion", "entities": {"1": {"start_ix": 1, "end_ix": 2, "label": "OBS-DA"}}})
    ['O', 'B-OBS-DA', 'I-OBS-DA']
    """
    words = document["text"].split(" ")
    tags = [OUTSIDE] * len(words)
    for first, last, label in sorted(_spans(document), key=lambda span: (span[0], -span[1])):
        if not 0 <= first <= last < len(words):
            raise ValueError(f"Expected an entity within {len(words)} words, but got {first} to {last}.")
        if all(tag == OUTSIDE for tag in tags[first : last + 1]):
            tags[first : last + 1] = [f"B-{label}", *[f"I-{label}"] * (last - first)]
    return tags


def entities_of(text: str, tags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """RadGraph's entities, without relations, from one tag per word; an inside tag without a beginning begins one.

    >>> entities_of("no pleural effusion", ["O", "B-OBS-DA", "I-OBS-DA"])["1"]["tokens"]
    'pleural effusion'
    """
    words = text.split(" ")
    if len(words) != len(tags):
        raise ValueError(f"Expected a tag for each of {len(words)} words, but got {len(tags)}.")
    found: list[tuple[int, int, str]] = []
    for place, tag in enumerate(tags):
        kind, _, label = tag.partition("-")
        if tag == OUTSIDE:
            continue
        goes_on = kind == "I" and found and found[-1][1] == place - 1 and found[-1][2] == label
        if goes_on:
            found[-1] = (found[-1][0], place, label)
        else:
            found.append((place, place, label))
    return {
        str(number): {
            "tokens": " ".join(words[first : last + 1]),
            "label": label,
            "start_ix": first,
            "end_ix": last,
            "relations": [],
        }
        for number, (first, last, label) in enumerate(found, 1)
    }


def word_vectors(text: str, vectors: NDArray[Any], offsets: Sequence[tuple[int, int]]) -> Vectors:
    """Mean over the pieces of each word of a text, (words, d); zeros for a word that no piece reaches (cut off).

    Args:
        text: words joined by blanks.
        vectors: of the pieces, (pieces, d).
        offsets: characters of each piece, end excluded; a piece belongs to the word of its first character.
    """
    values = np.asarray(vectors, dtype=np.float64)
    if len(values) != len(offsets):
        raise ValueError(f"Expected an offset for each of {len(values)} vectors, but got {len(offsets)}.")
    lengths = [len(word) + 1 for word in text.split(" ")]
    starts = np.cumsum([0, *lengths])
    sums = np.zeros((len(lengths), values.shape[1]))
    counts = np.zeros(len(lengths))
    for vector, (start, end) in zip(values, offsets, strict=True):
        if end > start:
            word = int(np.searchsorted(starts, start, side="right")) - 1
            sums[word] += vector
            counts[word] += 1
    return sums / np.maximum(counts, 1)[:, None]


def span_f1(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    """Micro F1 over exact spans and labels of all documents; 0 where none is right, NaN where there is none at all."""
    right = found = there = 0
    for ours, theirs in zip(predicted, expected, strict=True):
        a, b = _tag_spans(ours), _tag_spans(theirs)
        right, found, there = right + len(a & b), found + len(a), there + len(b)
    return 2 * right / (found + there) if found + there else float("nan")


class TokenProbe:
    """StandardScaler and multinomial logistic regression on word vectors; the best sequence of tags that is one.

    Args:
        penalties: values of C to choose among, by span F1 over folds of documents.
        folds: at most; one per document where there are fewer.
        seed: of the folds.
    """

    def __init__(self, *, penalties: Sequence[float] = PENALTIES, folds: int = FOLDS, seed: int = 0) -> None:
        self.penalties, self.folds, self.seed = sorted(penalties), folds, seed
        self.penalty: float | None = None  # chosen by `fit`
        self._model: Any = None

    def fit(self, features: Sequence[Vectors], tags: Sequence[Sequence[str]]) -> TokenProbe:
        """Learn from one array (words, d) and one list of tags per document.

        Raises:
            ValueError: if their numbers differ, there are fewer than two documents, or no word has an entity.
        """
        _check(features, tags)
        scores = [self._inner(features, tags, penalty) for penalty in self.penalties]
        self.penalty = self.penalties[int(np.argmax(np.nan_to_num(scores, nan=-1.0)))]
        self._model = _fitted(features, tags, self.penalty)
        return self

    def predict(self, features: Sequence[Vectors]) -> list[list[str]]:
        """Tags of each document, one per word.

        Raises:
            ValueError: before `fit`.
        """
        if self._model is None:
            raise ValueError("Expected fit before predict.")
        return _predicted(self._model, features)

    def _inner(self, features: Sequence[Vectors], tags: Sequence[Sequence[str]], penalty: float) -> float:
        order = np.random.default_rng(self.seed).permutation(len(features))
        predicted: list[list[str]] = []
        expected: list[Sequence[str]] = []
        for part in np.array_split(order, min(self.folds, len(order))):
            held = set(part.tolist())
            rest = [k for k in order if k not in held]
            if len({tag for k in rest for tag in tags[k]}) < 2:
                continue
            model = _fitted([features[k] for k in rest], [tags[k] for k in rest], penalty)
            predicted += _predicted(model, [features[k] for k in part])
            expected += [tags[k] for k in part]
        return span_f1(predicted, expected)


def _fitted(features: Sequence[Vectors], tags: Sequence[Sequence[str]], penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=ITERATIONS))
    return model.fit(np.concatenate(features), [tag for own in tags for tag in own])


def _predicted(model: Any, features: Sequence[Vectors]) -> list[list[str]]:
    names = [str(name) for name in model.classes_]
    # An inside tag follows a tag of its own label alone.
    allowed = np.array([[_may_follow(before, after) for after in names] for before in names])
    start = np.array([not name.startswith("I-") for name in names])
    lengths = np.cumsum([len(one) for one in features])[:-1]
    scores = np.split(model.predict_log_proba(np.concatenate(features)), lengths) if len(features) else []
    return [[names[k] for k in _best_path(one, allowed, start)] for one in scores]


def _may_follow(before: str, after: str) -> bool:
    return not after.startswith("I-") or before[2:] == after[2:]


def _best_path(scores: NDArray[np.float64], allowed: NDArray[np.bool_], start: NDArray[np.bool_]) -> list[int]:
    """Viterbi: the allowed sequence with the highest sum of scores, (words, tags)."""
    if not len(scores):
        return []
    steps = np.where(allowed, 0.0, -np.inf)
    best = scores[0] + np.where(start, 0.0, -np.inf)
    back = []
    for row in scores[1:]:
        through = best[:, None] + steps
        back.append(through.argmax(axis=0))
        best = through.max(axis=0) + row
    path = [int(best.argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return path[::-1]


def _spans(document: Mapping[str, Any]) -> list[Span]:
    return [(int(e["start_ix"]), int(e["end_ix"]), str(e["label"])) for e in document["entities"].values()]


def _tag_spans(tags: Sequence[str]) -> set[Span]:
    return set(_spans({"entities": entities_of(" " * (len(tags) - 1), tags)}) if tags else ())


def _check(features: Sequence[Vectors], tags: Sequence[Sequence[str]]) -> None:
    if len(features) != len(tags) or len(features) < 2:
        raise ValueError(f"Expected two or more documents with tags, but got {len(features)} and {len(tags)}.")
    for one, own in zip(features, tags, strict=True):
        if len(one) != len(own):
            raise ValueError(f"Expected a tag for each of {len(one)} words, but got {len(own)}.")
    if all(tag == OUTSIDE for own in tags for tag in own):
        raise ValueError("Expected entities in the training documents, but there are none.")

"""Findings that were listed in words, against annotations of the report in RadGraph's form.

A list has neither places nor relations as RadGraph has them, so what is compared is the words of observations, each
with its status: a listed "small left effusion, absent" is (small, absent), (left, absent), (effusion, absent). Words
that the annotators marked as anatomy in that report alone ("left", "pleural"), and words like "of", count on neither
side. Sets are per report, so that a word that is named twice counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics._texts import words
from medvlm_harness.metrics.radgraph import Entities, radgraph_f1_simple

__all__ = [
    "LABEL_OF_STATUS",
    "ConstantList",
    "Listed",
    "WordScores",
    "best_constant_list",
    "listed_entities",
    "observation_entities",
    "observed_words_list",
    "score_lists",
]

LABEL_OF_STATUS = {
    "present": "Observation::definitely present",
    "absent": "Observation::definitely absent",
    "uncertain": "Observation::uncertain",
}
_STATUS_OF_LABEL = {label: status for status, label in LABEL_OF_STATUS.items()}
_FUNCTION_WORDS = frozenset(
    {"a", "an", "the", "of", "in", "on", "at", "to", "for", "from", "by", "with", "within", "and", "or", "is", "are",
     "was", "were", "be", "been", "has", "have", "there", "this", "that", "as", "it", "its", "no", "not", "without"}
)  # fmt: skip
Listed = Sequence[tuple[str, str]]
"""(phrase, status) pairs of one report; a status is present, absent or uncertain."""


class WordScores(NamedTuple):
    """Scores per report, each of shape (n,); the mean over its annotators where there are two."""

    f1: NDArray[np.float64]  # of (word, status), in [0, 1]; 0 where a side is empty, as in radgraph
    words_f1: NDArray[np.float64]  # of words alone, in [0, 1]
    same_status: NDArray[np.float64]  # how many of the shared words have a status in common
    shared: NDArray[np.float64]  # how many words are on both sides


def score_lists(listed: Sequence[Listed], *annotators: Sequence[Entities | None]) -> WordScores:
    """Score one list per report.

    Args:
        listed: per report, shape (n,).
        *annotators: entities per report, once per annotator; None where one did not read it.

    Raises:
        UserError: if an entity is not as in RadGraph's JSON.
        ValueError: if numbers of reports differ, or a status is none of the three.

    Source: the score is `radgraph_f1_simple` of single words, restricted to observations.
    """
    if not annotators or any(len(annotator) != len(listed) for annotator in annotators):
        raise ValueError(f"Expected annotations of {len(listed)} reports, but got {[len(one) for one in annotators]}.")
    places = [_anatomy_alone(readings) for readings in zip(*annotators, strict=True)]
    ours = [listed_entities(one, without=place) for one, place in zip(listed, places, strict=True)]
    theirs = [[None if one is None else observation_entities(one) for one in annotator] for annotator in annotators]
    status_free = [[None if one is None else _status_free(one) for one in annotator] for annotator in theirs]
    same, shared = _agreement(ours, theirs)
    return WordScores(
        radgraph_f1_simple(ours, *theirs),
        radgraph_f1_simple([_status_free(one) for one in ours], *status_free),
        same,
        shared,
    )


def listed_entities(listed: Listed, *, without: AbstractSet[str] = frozenset()) -> Entities:
    """The words of a list as observations in RadGraph's form, without function words and those of `without`.

    >>> [entity["tokens"] for entity in listed_entities([("opacity in the left base", "present")]).values()]
    ['opacity', 'left', 'base']
    """
    for _, status in listed:
        if status not in LABEL_OF_STATUS:
            raise ValueError(f"Expected a status among {', '.join(LABEL_OF_STATUS)}, but got {status!r}.")
    said = ((word, LABEL_OF_STATUS[status]) for phrase, status in listed for word in _content(phrase))
    return _as_entities((word, label) for word, label in said if word not in without)


def observation_entities(entities: Entities) -> Entities:
    """The observations of a report, word by word and without relations."""
    return _as_entities(sorted(_observed_words(entities)))


def observed_words_list(entities: Entities) -> list[tuple[str, str]]:
    """The observations of a report as a list would have them, so that an extractor's or annotator's can be scored."""
    return sorted((word, _STATUS_OF_LABEL[label]) for word, label in _observed_words(entities))


@dataclass(frozen=True, slots=True)
class ConstantList:
    """The list that scores best when it is given for every report of a set."""

    listed: tuple[tuple[str, str], ...]
    f1: float  # on that set


def best_constant_list(annotated: Sequence[Entities]) -> ConstantList:
    """The most frequent (word, status) pairs of the reports, as many as give the best mean F1 on them.

    Raises:
        ValueError: if there is no report.
    """
    if not annotated:
        raise ValueError("Expected annotated reports, but got none.")
    reports = [frozenset((word, _STATUS_OF_LABEL[label]) for word, label in _observed_words(one)) for one in annotated]
    holders: dict[tuple[str, str], list[int]] = {}
    for place, report in enumerate(reports):
        for pair in report:
            holders.setdefault(pair, []).append(place)
    ranked = sorted(holders, key=lambda pair: (-len(holders[pair]), pair))
    sizes = np.array([len(report) for report in reports], dtype=np.float64)
    matched = np.zeros(len(reports))
    best, best_f1 = 0, 0.0
    for k, pair in enumerate(ranked, start=1):
        matched[holders[pair]] += 1
        f1 = float(np.mean(2 * matched / (sizes + k)))
        if f1 > best_f1:
            best, best_f1 = k, f1
    return ConstantList(tuple(ranked[:best]), best_f1)


def _anatomy_alone(readings: Iterable[Entities | None]) -> frozenset[str]:
    """Words that are anatomy to some annotator and an observation to none."""
    known = [one for one in readings if one is not None]
    observed = {word for one in known for word, _ in _observed_words(one)}
    named = (entity for one in known for entity in one.values() if entity["label"].startswith("Anatomy"))
    return frozenset(word for entity in named for word in words(entity["tokens"])) - observed


def _observed_words(entities: Entities) -> set[tuple[str, str]]:
    """(word, label) of the observations; measured ones count as what they are."""
    found = set()
    for entity in entities.values():
        label = entity["label"].replace("::measurement::", "::")
        if label in _STATUS_OF_LABEL:
            found |= {(word, label) for word in _content(entity["tokens"])}
    return found


def _content(phrase: str) -> list[str]:
    """Its distinct words in order, without function words."""
    return [word for word in dict.fromkeys(words(phrase)) if word not in _FUNCTION_WORDS]


def _as_entities(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    distinct = dict.fromkeys(pairs)
    return {str(k): {"tokens": word, "label": label, "relations": []} for k, (word, label) in enumerate(distinct)}


def _status_free(entities: Entities) -> Entities:
    return _as_entities((entity["tokens"], LABEL_OF_STATUS["present"]) for entity in entities.values())


def _agreement(
    ours: Sequence[Entities], theirs: Sequence[Sequence[Entities | None]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Words on both sides, and those of them with a status in common; means over annotators, (n,) each."""
    same, shared = np.zeros(len(ours)), np.zeros(len(ours))
    for place, mine in enumerate(ours):
        read = [one for annotator in theirs if (one := annotator[place]) is not None]
        for one in read:
            a, b = _statuses(mine), _statuses(one)
            both = a.keys() & b.keys()
            shared[place] += len(both) / len(read)
            same[place] += sum(bool(a[word] & b[word]) for word in both) / len(read)
    return same, shared


def _statuses(entities: Entities) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entity in entities.values():
        found.setdefault(entity["tokens"], set()).add(entity["label"])
    return found

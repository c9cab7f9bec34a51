"""How a tokenizer cuts reports: length, fertility, truncation, unknown words, and what becomes of medical terms.

A word is a run of letters and digits with the marks inside it ("x-ray" and "3.5" are one each), whatever the tokenizer
thinks of it; XXXX, which stands for what was taken out of a report, is a word like others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics._texts import word_spans, words
from medvlm_harness.metrics.bootstrap import Weights, sampled_estimate, weighted_mean, weighted_median
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.paired import paired_estimates

__all__ = [
    "LIMITS",
    "REMOVED",
    "Cuts",
    "Encoded",
    "TermCuts",
    "Tokenization",
    "cut_words",
    "metric_names",
    "term_list_cuts",
    "tokenization",
    "tokenization_estimates",
]

LIMITS = (77, 256, 512)  # tokens that CLIP, small text encoders and BERT take
REMOVED = "xxxx"
Counts = NDArray[np.int64]


class Encoded(NamedTuple):
    """A text as tokens, special ones left out."""

    text: str  # as the spans count its characters
    spans: Counts  # (tokens, 2): the characters [start, end) of each, in order
    unknown: NDArray[np.bool_]  # (tokens,): whether it is the token for what is unknown


class Cuts(NamedTuple):
    """What became of each word of a text; all of shape (words,)."""

    words: tuple[str, ...]  # in lower case
    pieces: Counts  # tokens that have a character of it
    unknown: NDArray[np.bool_]  # a piece is unknown, or a character is in no token at all


class TermCuts(NamedTuple):
    """What became of the terms of a table; all of one shape: (studies,) in reports, (terms,) in a list."""

    occurrences: Counts
    words: Counts  # of the occurrences
    pieces: Counts
    whole: Counts  # occurrences of which no word is cut


@dataclass(frozen=True, slots=True)
class Tokenization:
    """The counts of one tokenizer over reports; arrays are of shape (studies,)."""

    special: int  # tokens added to each text
    knows_bytes: bool  # nothing is unknown, by construction
    characters: Counts
    tokens: Counts  # without special ones
    unknown_tokens: Counts
    words: Counts
    pieces: Counts  # of words; tokens of marks alone are none
    continued_words: Counts  # words of two pieces or more
    unknown_words: Counts
    removed: Counts  # words XXXX
    removed_pieces: Counts
    tables: Mapping[str, TermCuts]
    terms: Mapping[str, TermCuts]  # table -> per term over all reports, in the order of the table


def cut_words(encoded: Encoded) -> Cuts:
    """The words of a text with their pieces.

    >>> encoded = Encoded("no effusion", np.array([[0, 2], [3, 6], [6, 11]]), np.zeros(3, dtype=bool))
    >>> cut_words(encoded).pieces.tolist()
    [1, 2]
    """
    found = word_spans(encoded.text)
    first = np.array([start for _, start, _ in found], dtype=np.int64)
    last = np.array([end for _, _, end in found], dtype=np.int64)
    starts, ends = np.asarray(encoded.spans, dtype=np.int64).reshape(-1, 2).T
    # Tokens stand in order: those of a word are the ones that begin before its end, less those that end by its start.
    low, high = np.searchsorted(ends, first, side="right"), np.searchsorted(starts, last, side="left")
    unknown = np.concatenate([[0], np.cumsum(encoded.unknown)])
    change = np.zeros(len(encoded.text) + 1, dtype=np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, ends, -1)
    bare = np.concatenate([[0], np.cumsum(np.cumsum(change)[:-1] <= 0)])
    return Cuts(
        tuple(word for word, _, _ in found),
        np.maximum(high - low, 0),
        (unknown[np.maximum(high, low)] - unknown[low] + bare[last] - bare[first]) > 0,
    )


def tokenization(
    encoded: Sequence[Encoded], tables: Mapping[str, Sequence[str]], *, special: int = 0, knows_bytes: bool = False
) -> Tokenization:
    """Count what one tokenizer makes of reports.

    Args:
        encoded: one per study, (studies,).
        tables: table -> terms of one word or more; every occurrence counts, within longer terms too.
        special: tokens that are added to each text.
        knows_bytes: a byte is a token.
    """
    cuts = [cut_words(one) for one in encoded]
    studies, terms = {}, {}
    for table, listed in tables.items():
        studies[table], terms[table] = _term_cuts(cuts, listed)
    removed = [[pieces for word, pieces in zip(c.words, c.pieces.tolist(), strict=True) if word == REMOVED]
               for c in cuts]  # fmt: skip
    return Tokenization(
        special=special,
        knows_bytes=knows_bytes,
        characters=_counts(len(one.text) for one in encoded),
        tokens=_counts(len(one.spans) for one in encoded),
        unknown_tokens=_counts(np.sum(one.unknown) for one in encoded),
        words=_counts(len(cut.words) for cut in cuts),
        pieces=_counts(cut.pieces.sum() for cut in cuts),
        continued_words=_counts((cut.pieces > 1).sum() for cut in cuts),
        unknown_words=_counts(cut.unknown.sum() for cut in cuts),
        removed=_counts(map(len, removed)),
        removed_pieces=_counts(map(sum, removed)),
        tables=studies,
        terms=terms,
    )


def term_list_cuts(encoded: Sequence[Encoded]) -> TermCuts:
    """What becomes of each term of a list.

    Args:
        encoded: one per term, after one other word ("the effusion"), which does not count: at the start of a text
            some tokenizers cut otherwise than within it.
    """
    cuts = [cut_words(one) for one in encoded]
    return TermCuts(
        np.ones(len(cuts), dtype=np.int64),
        _counts(len(cut.words) - 1 for cut in cuts),
        _counts(cut.pieces[1:].sum() for cut in cuts),
        _counts((cut.pieces[1:] <= 1).all() for cut in cuts),
    )


def metric_names(tables: Sequence[str], limits: Sequence[int] = LIMITS) -> tuple[str, ...]:
    """The metrics of `tokenization_estimates`, in its order."""
    return (
        "fertility",
        "characters_per_token",
        "tokens_mean",
        "tokens_median",
        "tokens_p95",
        *(f"truncated_{limit}" for limit in limits),
        "unknown_tokens",
        "unknown_words",
        "continued_words",
        *(f"{table}_{kind}" for table in tables for kind in ("whole", "pieces")),
    )


def tokenization_estimates(
    tokenizers: Mapping[str, Tokenization],
    study_ids: ArrayLike,
    *,
    limits: Sequence[int] = LIMITS,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every metric of each tokenizer, and the first one's less each other's, by `paired_names`.

    `fertility`: pieces per word, at least 1 where nothing is dropped. `characters_per_token`: of the whole text, over
    its tokens without special ones. `tokens_*`: of a report, special ones counted; p95 is the least length that 95% of
    the reports do not exceed. `truncated_N`: share of reports longer than N, special tokens counted. `unknown_tokens`:
    share of tokens; `unknown_words`, `continued_words`: shares of words. `<table>_whole`: share of the occurrences of
    its terms of which no word is cut; `<table>_pieces`: pieces per word of them.

    Args:
        tokenizers: name -> counts over the same studies, with the same tables.
        study_ids: (studies,).
        limits: lengths to cut at.
        resamples: number of resamples.
        seed: the same for all that is to be compared.

    Source: fertility and continued words, Rust et al. 2021, arXiv 2012.15613.
    """
    tables = list(next(iter(tokenizers.values())).tables)
    estimates = paired_estimates(
        {name: _statistic(counts, limits) for name, counts in tokenizers.items()},
        study_ids,
        metric_names(tables, limits),
        resamples=resamples,
        seed=seed,
    )
    for name, counts in tokenizers.items():
        of_reports = [f"truncated_{limit}" for limit in limits]
        for metric in of_reports if counts.knows_bytes else [*of_reports, "unknown_tokens", "unknown_words"]:
            one = estimates[f"{metric}_{name}"]
            if one.value in (0, 1):  # an interval without width would claim certainty
                estimates[f"{metric}_{name}"] = sampled_estimate(
                    one.value, np.array([one.value]), n=one.n, seed=seed, trials=one.n
                )
    return estimates


def _statistic(counts: Tokenization, limits: Sequence[int]) -> Callable[[Weights], NDArray[np.float64]]:
    length = (counts.tokens + counts.special).astype(np.float64)
    ratios: list[tuple[Counts, Counts]] = [
        (counts.unknown_tokens, counts.tokens),
        (counts.unknown_words, counts.words),
        (counts.continued_words, counts.words),
    ]
    for cuts in counts.tables.values():
        ratios += [(cuts.whole, cuts.occurrences), (cuts.pieces, cuts.words)]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        def ratio(above: Counts, below: Counts) -> NDArray[np.float64]:
            return ratio_or_nan(weights @ above.astype(np.float64), weights @ below.astype(np.float64))

        return np.column_stack(
            [
                ratio(counts.pieces, counts.words),
                ratio(counts.characters, counts.tokens),
                weighted_mean(length, weights),
                weighted_median(length, weights),
                _weighted_p95(length, weights),
                *(weighted_mean((length > limit).astype(np.float64), weights) for limit in limits),
                *(ratio(above, below) for above, below in ratios),
            ]
        )

    return statistic


def _weighted_p95(values: NDArray[np.float64], weights: Weights) -> NDArray[np.float64]:
    """The least value that 95% of the weight does not exceed, one per row."""
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(weights[:, order], axis=1)
    found: NDArray[np.float64] = values[order][np.argmax(20 * upto >= 19 * upto[:, -1:], axis=1)]
    return found


def _term_cuts(cuts: Sequence[Cuts], terms: Sequence[str]) -> tuple[TermCuts, TermCuts]:
    """Per study and per term, over the reports."""
    number = {tuple(words(term)): place for place, term in enumerate(terms)}
    lengths = sorted({len(key) for key in number if key})
    of_studies = np.zeros((len(TermCuts._fields), len(cuts)), dtype=np.int64)
    of_terms = np.zeros((len(TermCuts._fields), len(terms)), dtype=np.int64)
    for study, cut in enumerate(cuts):
        upto = np.concatenate([[0], np.cumsum(cut.pieces)]).tolist()
        cut_upto = np.concatenate([[0], np.cumsum(cut.pieces > 1)]).tolist()
        for length in lengths:
            for start in range(len(cut.words) - length + 1):
                term = number.get(cut.words[start : start + length])
                if term is not None:
                    end = start + length
                    found = (1, length, upto[end] - upto[start], int(cut_upto[end] == cut_upto[start]))
                    of_studies[:, study] += found
                    of_terms[:, term] += found
    return TermCuts(*of_studies), TermCuts(*of_terms)


def _counts(values: object) -> Counts:
    return np.array(list(values), dtype=np.int64)  # type: ignore[call-overload]  # iterables of whole numbers

"""ROUGE of generated against reference text, exactly as rouge-score computes it, with sentences split our way.

ROUGE cannot see negation ("no effusion" against "effusion" scores 0.67) and one constant sentence scores well on normal
studies: read it beside label and entity F1, and beside the floors of `summary_floors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics._texts import checked_pairs
from medvlm_harness.metrics.sentences import split_sentences

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

__all__ = ["RougeScores", "rouge_scores", "rouge_settings"]


class RougeScores(NamedTuple):
    """F1 per pair, in [0, 1], higher is better; each of shape (n,)."""

    rouge1: NDArray[np.float64]
    rouge2: NDArray[np.float64]
    rougeL: NDArray[np.float64]  # noqa: N815  the field's own name
    rougeLsum: NDArray[np.float64]  # noqa: N815


def rouge_scores(
    generated: Sequence[str | None], references: Sequence[str | None], *, stemmer: bool = True
) -> RougeScores:
    """ROUGE-1, -2, -L and -Lsum F1 of each pair; 0 where either text is empty, missing or without a letter or digit.

    Texts are lower-cased and everything but a-z and 0-9 is a blank, as in rouge-score: "3.5 cm" is three words. For
    Lsum, and only there, both texts are cut by `split_sentences`.

    Args:
        generated: one text per pair, None where there is none.
        references: likewise.
        stemmer: Porter's, for words of more than three letters; say with every score which it was (`rouge_settings`).

    Raises:
        ValueError: if the lengths differ or something is no text.

    Source: Lin 2004, ROUGE: a package for automatic evaluation of summaries; rouge-score 0.1.2.

    >>> [round(float(scores[0]), 3) for scores in rouge_scores(["no effusion"], ["effusion"])]
    [0.667, 0.0, 0.667, 0.667]
    """
    scorer, summary_scorer = _scorers(stemmer)
    rows = np.zeros((len(generated), len(RougeScores._fields)))
    for row, (text, reference) in zip(rows, checked_pairs(generated, references), strict=True):
        if text.strip() and reference.strip():
            scores = scorer.score(reference, text)
            scores |= summary_scorer.score(_one_sentence_a_line(reference), _one_sentence_a_line(text))
            row[:] = [scores[name].fmeasure for name in RougeScores._fields]
    return RougeScores(*rows.T)


def rouge_settings(*, stemmer: bool = True) -> str:
    """What must stand beside a ROUGE score for it to be comparable: package with version, stemmer, sentence split."""
    words = "Porter stemmer" if stemmer else "no stemmer"
    return f"rouge-score {version('rouge-score')}, F1, {words}, Lsum by our sentence split"


def _one_sentence_a_line(text: str) -> str:
    return "\n".join(split_sentences(text))


class _Tokenizer:
    """rouge-score's tokenizer with a memory for stems: reports have few words, and stemming takes most of the time."""

    def __init__(self, stemmer: bool) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer = self if stemmer else None
        self.stem = lru_cache(maxsize=2**16)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        tokens: list[str] = tokenize(text, self._stemmer)
        return tokens


@cache
def _scorers(stemmer: bool) -> tuple[RougeScorer, RougeScorer]:
    # Imported here: it imports nltk, which takes more than a second.
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = _Tokenizer(stemmer)
    return (
        RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer),
        RougeScorer(["rougeLsum"], tokenizer=tokenizer),
    )

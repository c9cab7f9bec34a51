"""BLEU of whole sets of texts: n-gram counts per pair, from which every resample's score is a ratio of sums.

BLEU belongs to a corpus, not to a text: a mean of sentence scores is another measure. Two conventions share the counts:
sacrebleu's (tokens "13a", case kept, smoothing "exp") and that of COCO's caption evaluation, which report generation
uses (`coco`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._arrays import checked_weights
from medvlm_harness.metrics._texts import checked_pairs

__all__ = ["ORDER", "bleu", "bleu_settings", "corpus_bleu", "ngram_counts", "tokens_13a"]

ORDER = 4
_TINY, _SMALL = 1e-15, 1e-9  # of COCO's caption evaluation, which are all its smoothing


def bleu(generated: Sequence[str | None], references: Sequence[str | None]) -> float:
    """Corpus BLEU-4 as sacrebleu computes it, in [0, 1]; higher is better.

    Raises:
        ValueError: if the lengths differ or something is no text.

    Source: Papineni et al. 2002; Post 2018, arXiv 1804.08771 (sacrebleu's defaults).
    """
    pairs = [(tokens_13a(text), tokens_13a(reference)) for text, reference in checked_pairs(generated, references)]
    return float(corpus_bleu(ngram_counts(pairs), np.ones((1, len(pairs))))[0])


def bleu_settings() -> str:
    """What must stand beside a BLEU score for it to be comparable."""
    return f"corpus BLEU-4, sacrebleu {version('sacrebleu')} tokens 13a, case kept, smoothing exp"


def tokens_13a(text: str) -> list[str]:
    """Words and marks by sacrebleu's default tokenizer (mteval-v13a)."""
    return _tokenizer()(text.rstrip()).split()


def ngram_counts(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> NDArray[np.float64]:
    """Per pair of generated and reference tokens: matched n-grams, generated n-grams, and both lengths.

    Returns:
        Shape (n, 2 * ORDER + 2): matches of 1 to 4 words (no more often than the reference has them), generated
        n-grams of 1 to 4 words, tokens generated, tokens of the reference.
    """
    rows = []
    for generated, reference in pairs:
        matched, made = [], []
        for n in range(1, ORDER + 1):
            ours, theirs = _ngrams(generated, n), _ngrams(reference, n)
            matched.append((ours & theirs).total())
            made.append(ours.total())
        rows.append([*matched, *made, len(generated), len(reference)])
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * ORDER + 2)


def corpus_bleu(counts: NDArray[np.float64], weights: ArrayLike, *, coco: bool = False) -> NDArray[np.float64]:
    """BLEU-4 of the pairs, once per row of weights (resamples, n); in [0, 1], shape (resamples,).

    An order of which nothing matches counts as 1/2, 1/4, ... of a match (sacrebleu's "exp"); where nothing at all
    matches, BLEU is 0.

    Args:
        counts: as `ngram_counts` gives them.
        weights: at least 0.
        coco: COCO's convention instead: counts with 1e-15 added and 1e-9 below, no other smoothing.
    """
    sums = checked_weights(weights, len(counts)) @ counts
    matched, made, length, wanted = sums[:, :ORDER], sums[:, ORDER:-2], sums[:, -2], sums[:, -1]
    if coco:
        precision = (matched + _TINY) / (made + _SMALL)
        ratio = (length + _TINY) / (wanted + _SMALL)
        brevity = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
        return np.asarray(brevity * np.exp(np.log(precision).mean(axis=1)), dtype=np.float64)
    unmatched = matched == 0
    smoothed = np.where(unmatched, 0.5 ** unmatched.cumsum(axis=1), matched)
    defined = (matched.sum(axis=1) > 0) & (made > 0).all(axis=1)
    precision = np.where(defined[:, None], smoothed / np.maximum(made, 1), 1)
    brevity = np.exp(np.minimum(0, 1 - wanted / np.maximum(length, 1)))
    return np.where(defined, brevity * np.exp(np.log(precision).mean(axis=1)), 0.0)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[k:] for k in range(n)), strict=False))


@cache
def _tokenizer() -> Callable[[str], str]:
    # Imported here: it is asked for by generation alone.
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    made: Any = Tokenizer13a  # sacrebleu carries no types
    tokenizer: Callable[[str], str] = made()  # remembers what it has cut
    return tokenizer

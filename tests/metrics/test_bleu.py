from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu

from medvlm_harness.metrics.bleu import bleu, bleu_settings, corpus_bleu, ngram_counts, tokens_13a

WORDS = ("the", "heart", "is", "normal.", "No", "effusion,", "3.5", "cm", "left", "lung")


def texts(n: int, seed: int, *, length: int = 14) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, length)))) for _ in range(n)]


@pytest.mark.parametrize("n", [1, 3, 60])
def test_equals_sacrebleu(n: int) -> None:
    generated, references = texts(n, 1), texts(n, 2)
    assert bleu(generated, references) == pytest.approx(sacrebleu.corpus_bleu(generated, [references]).score / 100)


@pytest.mark.parametrize(
    ("generated", "reference"),
    [
        ("a b c d", "a b c d"),
        ("a b x c d y", "a b c d"),  # no match of three words: smoothed
        ("x", "y z"),
        ("a b", "a b c"),  # too short for four words
        ("", "a"),
        ("Heart size, normal.", "heart size normal"),  # case and marks count
    ],
)
def test_equals_sacrebleu_where_counts_are_few(generated: str, reference: str) -> None:
    expected = sacrebleu.corpus_bleu([generated], [[reference]]).score / 100
    assert bleu([generated], [reference]) == pytest.approx(expected, abs=1e-12)


def test_coco_by_hand() -> None:
    """Six tokens against five: 5/6, 3/5, 1/4 and 0/3 matches; then with a whole match beside it."""
    one = (["the", "heart", "is", "big", "and", "round"], ["the", "heart", "is", "and", "round"])
    counts = ngram_counts([one])
    assert counts[0].tolist() == [5, 3, 1, 0, 6, 5, 4, 3, 6, 5]
    same = (["no", "effusion", "is", "seen"],) * 2
    both = ngram_counts([one, same])
    expected = (9 / 10 * 6 / 8 * 3 / 6 * 1 / 4) ** 0.25  # longer than the references: no penalty
    assert corpus_bleu(both, np.ones((1, 2)), coco=True)[0] == pytest.approx(expected, rel=1e-6)
    assert corpus_bleu(counts, np.ones((1, 1)), coco=True)[0] < 1e-3


def test_short_texts_are_punished_in_both_conventions() -> None:
    counts = ngram_counts(
        [(["no", "effusion", "is", "seen"], ["no", "effusion", "is", "seen", "on", "the", "left", "side"])]
    )
    for coco in (False, True):
        assert corpus_bleu(counts, np.ones((1, 1)), coco=coco)[0] == pytest.approx(math.exp(1 - 8 / 4), rel=1e-6)


@pytest.mark.parametrize("coco", [False, True])
def test_a_weight_counts_a_pair_as_often(coco: bool) -> None:
    pairs = [(tokens_13a(a), tokens_13a(b)) for a, b in zip(texts(12, 3), texts(12, 4), strict=True)]
    times = np.random.default_rng(0).integers(0, 3, (5, 12))
    weighted = corpus_bleu(ngram_counts(pairs), times, coco=coco)
    for row, value in zip(times, weighted, strict=True):
        repeated = [pair for pair, count in zip(pairs, row, strict=True) for _ in range(count)]
        expected = corpus_bleu(ngram_counts(repeated), np.ones((1, len(repeated))), coco=coco)[0]
        assert value == pytest.approx(expected, abs=1e-12)


def test_the_settings_name_the_version() -> None:
    assert sacrebleu.__version__ in bleu_settings()
    with pytest.raises(ValueError, match="a reference for each"):
        bleu(["a"], [])

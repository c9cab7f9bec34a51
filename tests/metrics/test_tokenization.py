from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from medvlm_harness.metrics.tokenization import (
    Encoded,
    cut_words,
    metric_names,
    term_list_cuts,
    tokenization,
    tokenization_estimates,
)

TERMS = {"chest": ("pleural effusion", "effusion", "x-ray", "pneumothorax")}
TEXTS = ["No pleural effusion. XXXX", "X-ray: effusion, 3.5 cm", "Normal."]


def in_pieces(text: str, longest: int, unknown: str = "") -> Encoded:
    """Runs of letters, digits or marks, cut into pieces of `longest` characters; pieces of `unknown` are unknown."""
    spans = []
    for run in re.finditer(r"[A-Za-z]+|\d+|[^\sA-Za-z\d]", text):
        spans += [(at, min(at + longest, run.end())) for at in range(run.start(), run.end(), longest)]
    flags = [text[start:end] in unknown if unknown else False for start, end in spans]
    return Encoded(text, np.array(spans).reshape(-1, 2), np.array(flags, dtype=bool))


def by_hand(encoded: Encoded) -> list[tuple[str, int]]:
    """Independent and slow: for each word the tokens that share a character with it."""
    found = []
    for word in re.finditer(r"[A-Za-z0-9]+(?:[.'-][A-Za-z0-9]+)*", encoded.text):
        of_word = [1 for start, end in encoded.spans.tolist() if set(range(start, end)) & set(range(*word.span()))]
        found.append((word.group().lower(), len(of_word)))
    return found


@pytest.mark.parametrize("longest", [1, 3, 4, 50])
@pytest.mark.parametrize("text", [*TEXTS, "", "...", "a-b c"])
def test_pieces_are_the_tokens_that_share_a_character_with_the_word(text: str, longest: int) -> None:
    encoded = in_pieces(text, longest)
    cuts = cut_words(encoded)
    assert list(zip(cuts.words, cuts.pieces.tolist(), strict=True)) == by_hand(encoded)
    assert not cuts.unknown.any()


def test_tokens_of_one_character_and_tokens_over_blanks_count_for_their_word() -> None:
    # " é" as one token over the blank, then "é" as two bytes, and a blank alone.
    encoded = Encoded("a é é", np.array([(0, 1), (1, 3), (3, 4), (4, 5), (4, 5)]), np.zeros(5, dtype=bool))
    assert cut_words(encoded).pieces.tolist() == [1, 1, 2]


def test_a_word_is_unknown_by_a_token_or_by_a_character_that_none_has() -> None:
    assert cut_words(in_pieces("ab cd ef", 1, unknown="d")).unknown.tolist() == [False, True, False]
    dropped = Encoded("ab cd", np.array([(0, 2), (3, 4)]), np.zeros(2, dtype=bool))
    assert cut_words(dropped).unknown.tolist() == [False, True]
    nothing = Encoded("ab cd", np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=bool))
    assert cut_words(nothing).pieces.tolist() == [0, 0]
    assert cut_words(nothing).unknown.all()


def estimates(**tokenizers: list[Encoded]) -> Any:
    counted = {name: tokenization(encoded, TERMS, special=2) for name, encoded in tokenizers.items()}
    return tokenization_estimates(counted, ["a", "b", "c"], limits=(8,), resamples=50)


def test_the_means_are_those_of_the_corpus() -> None:
    found = estimates(whole=[in_pieces(text, 50) for text in TEXTS], cut=[in_pieces(text, 4) for text in TEXTS])
    words = sum(len(by_hand(in_pieces(text, 50))) for text in TEXTS)
    assert words == 4 + 4 + 1
    # The words of several pieces are x-ray (x, -, ray) and 3.5 (3, ., 5).
    assert found["fertility_whole"].value == pytest.approx((words + 4) / words)
    assert found["continued_words_whole"].value == pytest.approx(2 / words)
    lengths = [5 + 2, 10 + 2, 2 + 2]
    assert found["tokens_mean_whole"].value == pytest.approx(np.mean(lengths))
    assert found["tokens_median_whole"].value == 7
    assert found["tokens_p95_whole"].value == 12
    assert found["truncated_8_whole"].value == pytest.approx(1 / 3)
    assert found["characters_per_token_whole"].value == pytest.approx(sum(map(len, TEXTS)) / (5 + 10 + 2))
    difference = found["fertility_whole_minus_cut"]
    assert difference.value == pytest.approx(found["fertility_whole"].value - found["fertility_cut"].value)
    assert difference.value < 0
    assert found["fertility_whole"].n == 3


def test_terms_count_wherever_they_stand_and_phrases_are_whole_only_if_all_words_are() -> None:
    found = estimates(whole=[in_pieces(text, 50) for text in TEXTS], cut=[in_pieces(text, 7) for text in TEXTS])
    # "pleural effusion", "effusion" in it, "effusion" and "x-ray" in the second report.
    assert found["chest_whole_whole"].value == pytest.approx(3 / 4)
    assert found["chest_whole_cut"].value == 0  # pleural has 7 letters, effusion 8
    assert found["chest_pieces_whole"].value == pytest.approx((2 + 1 + 1 + 3) / 5)
    counted = tokenization([in_pieces(text, 50) for text in TEXTS], TERMS)
    assert counted.terms["chest"].occurrences.tolist() == [1, 2, 1, 0]
    assert counted.tables["chest"].occurrences.tolist() == [2, 2, 0]
    assert counted.removed.tolist() == [1, 0, 0]
    longer = term_list_cuts([in_pieces(f"the {term}", 8) for term in TERMS["chest"]])
    assert longer.whole.tolist() == [1, 1, 0, 0]
    assert longer.pieces.tolist() == [2, 1, 3, 2]


def test_a_share_of_all_or_no_report_has_an_interval_with_width() -> None:
    encoded = [in_pieces(text, 50) for text in TEXTS]
    counted = {"a": tokenization(encoded, {}), "bytes": tokenization(encoded, {}, knows_bytes=True)}
    found = tokenization_estimates(counted, ["a", "b", "c"], limits=(77,), resamples=50)
    assert found["truncated_77_a"].value == 0
    assert found["truncated_77_a"].ci95[1] > 0.5  # three reports say little
    assert found["unknown_tokens_a"].ci95[1] > 0.5
    assert found["unknown_tokens_bytes"].ci95 == (0, 0)  # by construction


def test_a_table_without_an_occurrence_and_reports_without_words_are_undefined() -> None:
    counted = {"a": tokenization([in_pieces("...", 1)] * 3, TERMS)}
    found = tokenization_estimates(counted, ["a", "b", "c"], resamples=20)
    for metric in ("fertility", "chest_whole", "chest_pieces", "unknown_words"):
        assert np.isnan(found[f"{metric}_a"].value)
        assert found[f"{metric}_a"].reason
    assert set(found) == {f"{metric}_a" for metric in metric_names(["chest"])}

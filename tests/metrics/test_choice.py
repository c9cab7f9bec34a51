from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from medvlm_harness.metrics.choice import choice_hits, frequency_scores, likeness_scores, same_words

RNG = np.random.default_rng(4)


def test_without_ties_it_is_the_accuracy_of_the_highest_score() -> None:
    scores, truth = RNG.normal(size=(300, 4)), RNG.integers(0, 4, 300)
    expected = [float(max(range(4), key=lambda k: row[k]) == t) for row, t in zip(scores, truth, strict=True)]
    assert choice_hits(scores, truth).tolist() == expected


def test_equal_scores_share_so_a_constant_scores_chance_wherever_the_right_ones_stand() -> None:
    for place in range(4):
        assert choice_hits(np.zeros((6, 4)), np.full(6, place)).tolist() == [0.25] * 6
    assert choice_hits([[2.0, 2.0, 1.0]], [0]).tolist() == [0.5]
    assert choice_hits([[2.0, 2.0, 1.0]], [2]).tolist() == [0.0]


def test_no_number_is_never_chosen_before_one() -> None:
    nan, low = float("nan"), -float("inf")
    assert choice_hits([[nan, -1e9, nan], [nan, -1e9, nan]], [0, 1]).tolist() == [0.0, 1.0]
    assert choice_hits([[nan, low], [nan, nan]], [1, 0]).tolist() == [0.5, 0.5]


def test_nothing_to_choose_gives_nothing() -> None:
    assert choice_hits(np.zeros((0, 4)), np.zeros(0, int)).shape == (0,)


def test_texts_of_the_same_words_are_counted_together() -> None:
    train = ["No acute disease.", "no  acute disease", "Effusion!", None, ""]
    scores = frequency_scores(train, [("No acute disease", "EFFUSION", "Edema."), ("a", "b", "effusion.")])
    assert scores.tolist() == [[2, 1, 0], [0, 0, 1]]
    assert same_words(" . ") == ""


def test_likeness_is_the_cosine_of_scikit_learns_vectors() -> None:
    train = ["the heart is large", "no effusion is seen", "large effusion", "clear lungs"]
    sources = ["the heart is large", "clear lungs, no effusion", "words unknown"]
    options = [("large heart", "effusion"), ("clear lungs", "no effusion"), ("the heart", "lungs")]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"[a-z]+").fit(train)  # noqa: S106
    expected = [
        cosine_similarity(vectorizer.transform([source]), vectorizer.transform(one))[0].tolist()
        for source, one in zip(sources, options, strict=True)
    ]
    assert likeness_scores(train, sources, options) == pytest.approx(np.array(expected))
    assert likeness_scores(train, sources, options)[2].tolist() == [0, 0]
    assert likeness_scores(train, [], []).size == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choice_hits([0.1, 0.2], [0]), r"scores \(n, options\)"),
        (lambda: choice_hits([[0.1, 0.2]], [0, 1]), r"truth \(n,\)"),
        (lambda: choice_hits([[0.1, 0.2]], [2]), "places from 0 to 1"),
        (lambda: choice_hits([[0.1, 0.2]], [-1]), "places from 0 to 1"),
        (lambda: likeness_scores(["", "."], ["a"], [("a",)]), "a training text with a word"),
        (lambda: likeness_scores(["a"], ["a", "b"], [("a",)]), "got 1 for 2"),
        (lambda: frequency_scores("abc", [("a",)]), "got one text"),
    ],
)
def test_wrong_input_says_what_was_expected(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

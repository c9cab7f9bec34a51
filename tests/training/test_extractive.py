from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medvlm_harness.training.extractive import centroid_sentences

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_picked_are_those_nearest_to_the_mean_in_the_texts_order(count: int) -> None:
    vectors = RNG.normal(size=(5, 8)) + 1
    unit = [v / np.sqrt((v**2).sum()) for v in vectors]
    mean = sum(unit) / len(unit)
    likeness = [float(v @ mean) for v in unit]
    expected = sorted(sorted(range(5), key=lambda k: -likeness[k])[:count])
    assert centroid_sentences(vectors, count=count).tolist() == expected


def test_a_long_vector_counts_no_more_than_a_short_one() -> None:
    vectors = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1000.0]])
    assert centroid_sentences(vectors).tolist() == [1]


def test_of_equal_sentences_the_first_is_picked() -> None:
    assert centroid_sentences([[1.0, 2.0]] * 4).tolist() == [0]


@pytest.mark.parametrize(
    ("vectors", "count", "message"),
    [
        ([], 1, "one sentence or more"),
        ([1.0, 2.0], 1, "shape"),
        ([[0.0, 0.0], [1.0, 0.0]], 1, "zero or not finite"),
        ([[1.0, 0.0]], 0, "at least 1"),
    ],
)
def test_wrong_input_says_what_was_expected(vectors: Any, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        centroid_sentences(vectors, count=count)

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from medvlm_harness.metrics.bootstrap import study_weights
from medvlm_harness.metrics.matches import (
    count_matches,
    weighted_micro_f1,
    weighted_micro_precision,
    weighted_micro_recall,
)

RNG = np.random.default_rng(23)


def random_sets(studies: int) -> list[tuple[set[int], set[int]]]:
    return [
        ({*RNG.integers(0, 6, RNG.integers(0, 5))}, {*RNG.integers(0, 6, RNG.integers(0, 5))}) for _ in range(studies)
    ]


def test_equals_scikit_learn_on_the_repeated_studies() -> None:
    pairs = random_sets(30)
    counts, weights = count_matches(pairs), study_weights(np.arange(30), resamples=15)
    predicted = np.array([[item in mine for item in range(6)] for mine, _ in pairs])
    annotated = np.array([[item in theirs for item in range(6)] for _, theirs in pairs])
    for row, *values in zip(
        weights.astype(int),
        weighted_micro_precision(counts, weights),
        weighted_micro_recall(counts, weights),
        weighted_micro_f1(counts, weights),
        strict=True,
    ):
        again = np.repeat(np.arange(30), row)
        expected = precision_recall_fscore_support(annotated[again], predicted[again], average="micro")[:3]
        assert values == pytest.approx(expected, abs=1e-12)


def test_what_has_no_denominator_is_undefined() -> None:
    counts, one = count_matches([(set(), {1})]), np.ones((1, 1))
    assert np.isnan(weighted_micro_precision(counts, one)[0])
    assert weighted_micro_recall(counts, one)[0] == weighted_micro_f1(counts, one)[0] == 0
    assert np.isnan(weighted_micro_f1(count_matches([(set(), set())]), one)[0])
    assert np.isnan(weighted_micro_f1(count_matches([]), np.ones((1, 0)))[0])


def test_weights_of_other_studies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(resamples, 1\)"):
        weighted_micro_f1(count_matches([({1}, {1})]), np.ones((1, 2)))

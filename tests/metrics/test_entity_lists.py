from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.entity_lists import (
    LABEL_OF_STATUS,
    best_constant_list,
    listed_entities,
    observation_entities,
    observed_words_list,
    score_lists,
)
from medvlm_harness.metrics.radgraph import radgraph_f1_simple

PRESENT, ABSENT, UNSURE = (LABEL_OF_STATUS[status] for status in ("present", "absent", "uncertain"))
PLACE = "Anatomy::definitely present"


def entities(*pairs: tuple[str, str]) -> dict[str, dict[str, Any]]:
    return {str(k): {"tokens": words, "label": label, "relations": []} for k, (words, label) in enumerate(pairs)}


REPORT = entities(("small", PRESENT), ("Left", PLACE), ("pleural", PLACE), ("effusion", PRESENT), ("edema", ABSENT))


def f1_by_hand(a: set[Any], b: set[Any]) -> float:
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 0.0


@pytest.mark.parametrize(
    ("listed", "expected", "expected_words"),
    [
        # Left and pleural are anatomy in this report: they count on neither side.
        ([("small left pleural effusion", "present"), ("edema", "absent")], 1.0, 1.0),
        ([("effusion", "present")], 2 * 1 / (1 + 3), 2 * 1 / (1 + 3)),
        ([("small effusion", "absent"), ("edema", "present")], 0.0, 1.0),
        ([("Small Effusion", "present"), ("edema", "uncertain")], 2 * 2 / (3 + 3), 1.0),
        # Right is anatomy in another report alone; here it is a word that nobody observed.
        ([("small right effusion", "present"), ("edema", "absent")], 2 * 3 / (4 + 3), 2 * 3 / (4 + 3)),
        ([("effusion in the pleural space", "present")], 2 * 1 / (2 + 3), 2 * 1 / (2 + 3)),
        ([("effusion", "present"), ("effusion", "present")], 2 * 1 / (1 + 3), 2 * 1 / (1 + 3)),
        ([("effusion", "present"), ("effusion", "absent")], 2 * 1 / (2 + 3), 2 * 1 / (1 + 3)),
        ([], 0.0, 0.0),
    ],
)
def test_observed_words_and_their_status_are_compared(
    listed: list[tuple[str, str]], expected: float, expected_words: float
) -> None:
    scores = score_lists([listed], [REPORT])
    assert scores.f1[0] == pytest.approx(expected)
    assert scores.words_f1[0] == pytest.approx(expected_words)


def test_on_observations_of_one_word_it_is_radgraphs_simple_score() -> None:
    rng = np.random.default_rng(2)
    vocabulary = ["mass", "edema", "clear", "large", "acute", "nodule"]
    labels = [PRESENT, ABSENT, UNSURE]
    ours, theirs = (
        [entities(*[(str(rng.choice(vocabulary)), str(rng.choice(labels))) for _ in range(rng.integers(0, 5))])
         for _ in range(40)]
        for _ in range(2)
    )  # fmt: skip
    listed = [observed_words_list(one) for one in ours]
    assert score_lists(listed, theirs).f1 == pytest.approx(radgraph_f1_simple(ours, theirs))


def test_a_measured_observation_counts_as_what_it_is() -> None:
    measured = entities(("3 cm", PRESENT.replace("::", "::measurement::")), ("mass", PRESENT))
    assert score_lists([[("3 cm mass", "present")]], [measured]).f1[0] == 1.0


def test_status_agreement_is_counted_over_the_words_on_both_sides() -> None:
    listed = [[("small effusion", "present"), ("edema", "present"), ("mass", "absent")], []]
    scores = score_lists(listed, [REPORT, REPORT])
    assert scores.shared.tolist() == [3, 0]
    assert scores.same_status.tolist() == [2, 0]


def test_two_annotators_are_averaged_where_both_read_a_report() -> None:
    other = entities(("effusion", PRESENT))
    listed = [[("effusion", "present")]] * 2
    scores = score_lists(listed, [REPORT, REPORT], [other, None])
    assert scores.f1 == pytest.approx([(0.5 + 1.0) / 2, 0.5])
    assert scores.shared.tolist() == [1, 1]


def test_a_word_that_is_anatomy_to_one_and_observed_by_the_other_counts() -> None:
    first, second = entities(("left", PLACE), ("mass", PRESENT)), entities(("left", PRESENT), ("mass", PRESENT))
    assert score_lists([[("left mass", "present")]], [first], [second]).f1[0] == pytest.approx((2 / 3 + 1) / 2)


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="annotations of 1 reports"):
        score_lists([[]], [REPORT, REPORT])
    with pytest.raises(ValueError, match="annotations of 1 reports"):
        score_lists([[]])
    with pytest.raises(ValueError, match="status among present, absent, uncertain"):
        score_lists([[("mass", "maybe")]], [REPORT])
    with pytest.raises(UserError, match="RadGraph"):
        radgraph_f1_simple([entities(("mass", "OBS-DP"))], [REPORT])


def test_words_without_content_make_no_entity() -> None:
    assert listed_entities([("there is no", "absent")]) == {}
    assert observation_entities(entities(("left", PLACE))) == {}


# --- the constant list


def best_by_trying(reports: Sequence[dict[str, Any]]) -> float:
    """Independent and slow: every subset of the pairs."""
    truths = [set(observed_words_list(report)) for report in reports]
    pairs = sorted(set().union(*truths))
    subsets = itertools.chain.from_iterable(itertools.combinations(pairs, k) for k in range(1, len(pairs) + 1))
    return max(float(np.mean([f1_by_hand(set(subset), truth) for truth in truths])) for subset in subsets)


def test_the_constant_list_scores_on_its_own_reports_what_it_says() -> None:
    rng = np.random.default_rng(4)
    words, weights = ["clear", "normal", "edema", "mass", "stable"], [0.4, 0.3, 0.1, 0.1, 0.1]
    reports = [
        entities(*[(str(rng.choice(words, p=weights)), PRESENT if rng.random() < 0.8 else ABSENT) for _ in range(3)])
        for _ in range(30)
    ]
    constant = best_constant_list(reports)
    assert score_lists([constant.listed] * 30, reports).f1.mean() == pytest.approx(constant.f1)
    assert constant.f1 == pytest.approx(best_by_trying(reports), abs=0.01)  # it tries the frequent ones first


def test_a_constant_list_of_nothing_observed_is_empty() -> None:
    constant = best_constant_list([entities(("left", PLACE)), {}])
    assert (constant.listed, constant.f1) == ((), 0.0)
    with pytest.raises(ValueError, match="got none"):
        best_constant_list([])
    assert math.isclose(best_constant_list([REPORT]).f1, 1.0)

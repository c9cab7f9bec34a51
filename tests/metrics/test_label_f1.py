from __future__ import annotations

import time
import warnings
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import classification_report, f1_score

from medvlm_harness.data.chexpert import CHEXPERT_5, CHEXPERT_14
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.bootstrap import study_weights
from medvlm_harness.metrics.label_f1 import (
    Average,
    UncertainPolicy,
    label_f1,
    label_f1_estimates,
    label_matrix,
    weighted_label_f1,
)

RNG = np.random.default_rng(13)
NAN = np.nan


def random_labels(n: int, labels: int = 14) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Readings that agree in part, with one label that is never positive on either side."""
    true = RNG.choice([1, 0, -1, NAN], (n, labels), p=[0.2, 0.3, 0.1, 0.4])
    pred = np.where(RNG.random((n, labels)) < 0.6, true, RNG.choice([1, 0, -1, NAN], (n, labels)))
    true[:, -1], pred[:, -1] = 0, NAN
    return true, pred


def decided(values: NDArray[np.float64], uncertain: UncertainPolicy) -> NDArray[np.int64]:
    """Independent: one label at a time, by a table."""
    meaning = {1.0: 1, 0.0: 0, -1.0: 0 if uncertain == "zeros" else 1}
    return np.array([[meaning.get(float(value), 0) for value in row] for row in values])


@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
@pytest.mark.parametrize("uncertain", ["ones", "zeros"])
def test_equals_scikit_learn(average: Average, uncertain: UncertainPolicy) -> None:
    true, pred = random_labels(300)
    expected = f1_score(decided(true, uncertain), decided(pred, uncertain), average=average, zero_division=0)
    assert label_f1(true, pred, average=average, uncertain=uncertain) == pytest.approx(expected, abs=1e-12)
    assert 0.3 < expected < 0.9


def test_equals_the_classification_report_that_chexbert_f1_prints() -> None:
    true, pred = random_labels(200)
    report = classification_report(
        decided(true, "ones"), decided(pred, "ones"), target_names=CHEXPERT_14, output_dict=True, zero_division=0
    )
    estimates = label_f1_estimates(true, pred, np.arange(200), resamples=10)
    assert estimates["micro_14"].value == pytest.approx(report["micro avg"]["f1-score"], abs=1e-12)
    assert estimates["macro_14"].value == pytest.approx(report["macro avg"]["f1-score"], abs=1e-12)
    for name in CHEXPERT_14[:-1]:
        assert estimates[name].value == pytest.approx(report[name]["f1-score"], abs=1e-12)
        assert estimates[name].positives == report[name]["support"]
    five = [CHEXPERT_14.index(name) for name in CHEXPERT_5]
    for average in ("micro", "macro"):
        expected = f1_score(decided(true, "ones")[:, five], decided(pred, "ones")[:, five], average=average)
        assert estimates[f"{average}_5"].value == pytest.approx(expected, abs=1e-12)


def test_ignoring_leaves_out_what_the_reference_is_uncertain_about() -> None:
    true, pred = random_labels(200)
    scores = []
    for label in range(13):
        sure = true[:, label] != -1
        scores.append(f1_score(decided(true, "ones")[sure, label], decided(pred, "ones")[sure, label]))
    values = label_f1(true[:, :13], pred[:, :13], average="macro", uncertain="ignore")
    assert values == pytest.approx(np.mean(scores), abs=1e-12)


def test_a_model_gains_nothing_by_hedging_when_uncertain_is_ignored() -> None:
    true = np.array([[1.0], [0.0], [0.0], [NAN]])
    claims, hedges = np.ones((4, 1)), np.full((4, 1), -1.0)
    assert label_f1(true, hedges, uncertain="ignore") == label_f1(true, claims, uncertain="ignore") < 1


def test_hand_case_of_every_policy() -> None:
    true, pred = [[1], [-1], [0], [NAN]], [[1], [0], [-1], [0]]
    # ones: positives 2 and 2, one in common; zeros: 1 and 1, in common; ignore: true 1, predicted 1 and a hedge.
    assert label_f1(true, pred, uncertain="ones") == pytest.approx(2 / 4)
    assert label_f1(true, pred, uncertain="zeros") == 1
    assert label_f1(true, pred, uncertain="ignore") == pytest.approx(2 / 3)


def test_what_zero_division_does() -> None:
    true, pred = [[1, 0], [0, 0]], [[1, NAN], [0, 0]]
    assert label_f1(true, pred, average="macro") == 0.5
    assert label_f1(true, pred, average="macro", zero_division=1) == 1
    assert label_f1(true, pred, average="macro", zero_division=NAN) == 1
    assert label_f1(true, pred, average="macro_supported") == 1
    assert label_f1([[0]], [[0]]) == 0
    assert np.isnan(label_f1([[0]], [[0]], zero_division=NAN))
    assert np.isnan(label_f1([[0]], [[1]], average="macro_supported"))


@pytest.mark.parametrize("average", get_args(Average))
@pytest.mark.parametrize("uncertain", get_args(UncertainPolicy))
def test_every_average_takes_a_resample_as_the_repeated_studies(average: Average, uncertain: UncertainPolicy) -> None:
    true, pred = random_labels(25, 4)
    weights = study_weights(np.arange(25), resamples=20)
    values = weighted_label_f1(true, pred, weights, average=average, uncertain=uncertain)
    for row, value in zip(weights.astype(int), values, strict=True):
        again = np.repeat(np.arange(25), row)
        expected = label_f1(true[again], pred[again], average=average, uncertain=uncertain)
        assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_an_estimate_says_its_policy_its_support_and_why_it_is_undefined() -> None:
    true, pred = random_labels(100)
    estimates = label_f1_estimates(true, pred, np.arange(100), uncertain="zeros", floors={"micro_14": 0.1})
    micro = estimates["micro_14"]
    assert (micro.n, micro.floor, micro.extra["uncertain"], micro.extra["zero_division"]) == (100, 0.1, "zeros", 0)
    assert micro.ci95[0] < micro.value < micro.ci95[1]
    assert micro.positives == (true == 1).sum()
    last = estimates[CHEXPERT_14[-1]]
    assert np.isnan(last.value) and last.positives == 0 and last.reason is not None
    assert label_f1_estimates(true[:0], pred[:0], [])["micro_14"].reason == "no item"
    assert set(label_f1_estimates(true[:, :3], pred[:, :3], np.arange(100), names=CHEXPERT_14[:3], resamples=2)) == {
        "micro_3", "macro_3", "macro_supported_3", *CHEXPERT_14[:3]
    }  # fmt: skip


def test_the_interval_over_studies_covers_what_simulation_covers() -> None:
    """Each label of a study is read right with 80%: the interval of one sample holds the value of a large one."""

    def sample(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        true = (RNG.random((n, 14)) < 0.3).astype(float)
        return true, np.where(RNG.random((n, 14)) < 0.8, true, 1 - true)

    truth = label_f1(*sample(100_000))
    hits = 0
    for _ in range(40):
        low, high = label_f1_estimates(*sample(150), np.arange(150), resamples=200)["micro_14"].ci95
        hits += low <= truth <= high
    assert hits >= 34


def test_the_test_split_with_a_thousand_resamples_takes_less_than_a_second() -> None:
    true, pred = random_labels(590)
    start = time.perf_counter()
    label_f1_estimates(true, pred, np.arange(590))
    assert time.perf_counter() - start < 1.5


def test_labels_are_taken_by_name() -> None:
    reports = [{"Edema": 1, "Fracture": None, "Pneumonia": -1}, {"Fracture": 0, "Edema": None, "Pneumonia": 1}]
    matrix = label_matrix(reports, ("Fracture", "Edema"))
    assert np.array_equal(matrix, [[NAN, 1], [0, NAN]], equal_nan=True)
    assert label_matrix([], ("Edema",)).shape == (0, 1)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"Edema": 2}, "as Edema of report 1, but got 2"),
        ({"Edema": "1"}, "but got '1'"),
        ({}, "but got no such label"),
    ],
)
def test_what_is_no_label_is_refused(report: dict[str, int | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        label_matrix([{"Edema": None}, report], ("Edema",))


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"one shape \(n, labels\)"):
        label_f1([[1]], [[1, 0]])
    with pytest.raises(ValueError, match=r"one shape \(n, labels\)"):
        label_f1([1], [1])
    with pytest.raises(ValueError, match=r"but got 3\.0"):
        label_f1([[1]], [[3]])
    with pytest.raises(ValueError, match="to be ones, zeros or ignore"):
        label_f1([[1]], [[1]], uncertain="positive")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="micro, macro"):
        label_f1([[1]], [[1]], average="samples")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one column for each of 14 names"):
        label_f1_estimates([[1]], [[1]], ["a"])


def test_no_warning_is_raised_where_nothing_is_positive() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label_f1_estimates(np.zeros((5, 14)), np.zeros((5, 14)), np.arange(5), resamples=5)

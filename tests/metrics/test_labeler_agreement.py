from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score, f1_score

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.metrics.bootstrap import study_weights
from medvlm_harness.metrics.labeler_agreement import (
    STATUSES,
    Status,
    label_kappa,
    labeler_agreement_estimates,
    status_f1,
    status_names,
    weighted_status_f1,
)

RNG = np.random.default_rng(17)
NAN = np.nan
# As CheXbert's code numbers them.
CODES = {"blank": 0, "positive": 1, "negative": 2, "uncertain": 3}


def random_readings(n: int, labels: int = 14) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    true = RNG.choice([1, 0, -1, NAN], (n, labels), p=[0.2, 0.3, 0.1, 0.4])
    return true, np.where(RNG.random((n, labels)) < 0.7, true, RNG.choice([1, 0, -1, NAN], (n, labels)))


def coded(values: NDArray[np.float64]) -> NDArray[np.int64]:
    names = {1.0: "positive", 0.0: "negative", -1.0: "uncertain"}
    return np.array([[CODES[names.get(float(value), "blank")] for value in row] for row in values])


@pytest.mark.parametrize("status", get_args(Status))
def test_equals_scikit_learn_one_status_against_the_rest(status: Status) -> None:
    true, pred = random_readings(300)
    pred[:, 5], true[:, 5] = NAN, NAN
    scores, support = [], []
    for column, name in enumerate(CHEXPERT_14):
        a, b = coded(true)[:, column], coded(pred)[:, column]
        if status == "mention":
            a, b = a > 0, b > 0
        else:
            a, b = a == CODES[status], b == CODES[status]
        if name in status_names(status):
            scores.append(f1_score(a, b, zero_division=NAN))
            support.append(int(a.sum()))
    result = status_f1(true, pred, status)
    assert result.f1 == pytest.approx(scores, abs=1e-12, nan_ok=True)
    assert result.support.tolist() == support
    held = np.array(support) > 0
    assert result.weighted == pytest.approx(np.average(np.array(scores)[held], weights=np.array(support)[held]))
    assert result.macro == pytest.approx(np.array(scores)[held].mean())


def test_what_no_text_states_is_not_scored() -> None:
    assert set(CHEXPERT_14) - set(status_names("negative")) == {"No Finding"}
    assert set(CHEXPERT_14) - set(status_names("uncertain")) == {"No Finding", "Support Devices"}
    for status in ("mention", "positive", "blank"):
        assert status_names(status) == CHEXPERT_14


def test_hand_case() -> None:
    names = ("Edema", "Fracture")
    true, pred = [[0, 1], [0, NAN], [NAN, 0], [1, NAN]], [[0, 1], [1, NAN], [0, 0], [1, 0]]
    negative = status_f1(true, pred, "negative", names=names)
    # Edema: 2 denied, 2 found denied, 1 in common. Fracture: 1, 2, 1.
    assert negative.f1 == pytest.approx([1 / 2, 2 / 3])
    assert negative.support.tolist() == [2, 1]
    assert negative.weighted == pytest.approx((2 * 1 / 2 + 2 / 3) / 3)
    assert negative.macro == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_a_status_that_nobody_uses_is_undefined() -> None:
    result = status_f1([[1], [0]], [[1], [0]], "uncertain", names=("Edema",))
    assert np.isnan([result.f1[0], result.weighted, result.macro]).all()


def test_kappa_equals_scikit_learn() -> None:
    true, pred = random_readings(300)
    expected = [cohen_kappa_score(a, b) for a, b in zip(coded(true).T, coded(pred).T, strict=True)]
    assert label_kappa(true, pred) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(label_kappa([[NAN], [NAN]], [[NAN], [NAN]])[0])


def test_a_resample_counts_as_the_repeated_studies() -> None:
    true, pred = random_readings(30)
    weights = study_weights(np.arange(30), resamples=10)
    values = weighted_status_f1(true, pred, "uncertain", weights)
    for row, value in zip(weights.astype(int), values, strict=True):
        again = np.repeat(np.arange(30), row)
        assert value == pytest.approx(status_f1(true[again], pred[again], "uncertain").weighted, abs=1e-12)


def test_estimates_hold_every_status_with_its_support_and_interval() -> None:
    true, pred = random_readings(200)
    estimates = labeler_agreement_estimates(true, pred, np.arange(200), resamples=200)
    assert set(estimates) == {f"{status}_{average}" for status in STATUSES for average in ("weighted", "macro")}
    for status in STATUSES:
        single, weighted = status_f1(true, pred, status), estimates[f"{status}_weighted"]
        assert weighted.value == pytest.approx(single.weighted)
        assert weighted.positives == single.support.sum()
        assert weighted.ci95[0] < weighted.value < weighted.ci95[1]
        assert estimates[f"{status}_macro"].value == pytest.approx(single.macro)


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="one column for each of 14 names"):
        status_f1([[1]], [[1]], "positive")
    with pytest.raises(ValueError, match="status to be one of mention, positive"):
        status_names("denied")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one shape"):
        label_kappa([[1]], [[1, 0]])

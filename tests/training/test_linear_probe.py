from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from medvlm_harness.training.linear_probe import linear_probe, multilabel_probe

RNG = np.random.default_rng(5)
N, M, D = 240, 160, 12


def items(n: int, first_patient: int, *, noise: float = 1.0) -> tuple[Any, Any, list[str]]:
    """Two items of each patient, a label that a direction of the features tells apart, on scales far from one."""
    patients = [f"p{first_patient + k // 2}" for k in range(n)]
    y = np.repeat(RNG.random(n // 2) < 0.3, 2).astype(float)
    x = RNG.normal(size=(n, D)) * noise
    x[:, 3] += 3 * y
    return x * np.logspace(-3, 3, D), y, patients


X, Y, PATIENTS = items(N, 0)
X_TEST, Y_TEST, TEST_PATIENTS = items(M, 10_000)


def test_a_direction_that_tells_a_label_apart_is_found() -> None:
    probe = linear_probe(X, Y, PATIENTS, X_TEST, TEST_PATIENTS)
    assert probe.margin.shape == probe.probability.shape == (3, M)
    assert min(roc_auc_score(Y_TEST, row) for row in probe.margin) > 0.95
    assert ((probe.probability >= 0) & (probe.probability <= 1)).all()
    assert np.mean(probe.probability) == pytest.approx(np.mean(Y_TEST), abs=0.1)
    assert min(probe.inner_auroc) > 0.95
    assert probe.positives == Y.sum()


def test_scores_are_those_of_scikit_learn_with_the_chosen_penalty() -> None:
    probe = linear_probe(X, Y, PATIENTS, X_TEST, TEST_PATIENTS)
    scaler = StandardScaler().fit(X)
    for row, penalty in zip(probe.margin, probe.penalty, strict=True):
        by_hand = LogisticRegression(C=penalty, max_iter=10_000, tol=1e-12).fit(scaler.transform(X), Y)
        assert row == pytest.approx(by_hand.decision_function(scaler.transform(X_TEST)), abs=1e-4)


def test_shuffled_labels_are_not_learnt() -> None:
    """The negative control: what the probe finds is in the features, not in the procedure."""
    areas = []
    for seed in range(20):
        shuffled = np.random.default_rng(seed).permutation(Y)
        probe = linear_probe(X, shuffled, PATIENTS, X_TEST, TEST_PATIENTS, seeds=(0,))
        areas.append(roc_auc_score(Y_TEST, probe.margin[0]))
    assert np.mean(areas) == pytest.approx(0.5, abs=0.08)


def test_patients_that_give_themselves_away_do_not_raise_the_inner_score() -> None:
    """A feature that names the patient: folds that split a patient's items would look perfect."""
    n = 120
    patients = [f"p{k // 4}" for k in range(n)]
    y = np.repeat(RNG.random(n // 4) < 0.5, 4).astype(float)
    x = np.repeat(RNG.normal(size=(n // 4, 60)), 4, axis=0)
    probe = linear_probe(x, y, patients, x[:1], ["q"], penalties=(1.0,))
    assert max(probe.inner_auroc) < 0.75


def test_the_strongest_of_equally_good_penalties_is_chosen() -> None:
    x, y = np.array([[k] for k in range(40)], float), np.array([0.0] * 20 + [1.0] * 20)
    probe = linear_probe(x, y, [str(k) for k in range(40)], x, [f"q{k}" for k in range(40)], penalties=(1.0, 1e-3))
    assert probe.penalty == (1e-3,) * 3


def test_items_of_which_nothing_is_known_are_left_out() -> None:
    unknown = np.append(Y, [np.nan] * 50)
    noise = np.append(X, 1e6 * np.ones((50, D)), axis=0)
    patients = [*PATIENTS, *[f"u{k}" for k in range(50)]]
    with_them = linear_probe(noise, unknown, patients, X_TEST, TEST_PATIENTS)
    assert np.array_equal(with_them.margin, linear_probe(X, Y, PATIENTS, X_TEST, TEST_PATIENTS).margin)


@pytest.mark.parametrize("positives", [0, 1])
def test_a_label_without_two_patients_is_undefined_with_the_reason(positives: int) -> None:
    y = np.zeros(N)
    y[: 2 * positives] = 1  # of one patient
    probe = linear_probe(X, y, PATIENTS, X_TEST, TEST_PATIENTS)
    assert np.isnan(probe.margin).all() and np.isnan(probe.probability).all()
    assert probe.margin.shape == (3, M)
    assert f"{positives} patients with" in probe.reason


def test_each_label_has_a_probe_of_its_own() -> None:
    labels = np.stack([Y, 1 - Y], axis=1)
    one, other = multilabel_probe(X, labels, PATIENTS, X_TEST, TEST_PATIENTS, seeds=(0,))
    assert one.margin == pytest.approx(-other.margin, abs=1e-3)
    with pytest.raises(ValueError, match="shape"):
        multilabel_probe(X, Y, PATIENTS, X_TEST, TEST_PATIENTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": X[:, :3]}, r"\(n, d\) and \(m, d\)"),
        ({"features": X[:0]}, "n > 0"),
        ({"labels": Y[:-1]}, "a label and a patient for each"),
        ({"test_patients": TEST_PATIENTS[:-1]}, "a label and a patient for each"),
        ({"labels": Y + 1}, "labels 0, 1 or NaN"),
        ({"features": np.where(X > 1e6, X, np.nan)}, "finite features"),
        ({"test_patients": [PATIENTS[0], *TEST_PATIENTS[1:]]}, r"no patient on both sides, but 1 are \(such as p0\)"),
    ],
)
def test_wrong_input_says_what_was_expected(change: dict[str, Any], message: str) -> None:
    given = {
        "features": X,
        "labels": Y,
        "patients": PATIENTS,
        "test_features": X_TEST,
        "test_patients": TEST_PATIENTS,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_probe(**given)

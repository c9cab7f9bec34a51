from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medvlm_harness.training.logistic import fit_logistic

RNG = np.random.default_rng(9)
N, D = 300, 24
MIXED = RNG.normal(size=(D, D))
# Alike, on unequal scales, and far from zero.
X = (RNG.normal(size=(N, D)) @ MIXED) * np.logspace(-3, 3, D) + 100 * RNG.normal(size=D)
STANDARD = (X - X.mean(axis=0)) / X.std(axis=0)
Y = (STANDARD @ RNG.normal(size=D) + RNG.normal(size=N) * 2 > 3).astype(float)


def by_scikit_learn(x: Any, y: Any, penalty: float) -> Any:
    model = LogisticRegression(C=penalty, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    return make_pipeline(StandardScaler(), model).fit(x, y)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0, 100.0])
def test_log_odds_are_scikit_learns(penalty: float) -> None:
    fits = fit_logistic(X, Y[:, None], np.ones((N, 1), bool), [penalty])
    assert fits.log_odds(X)[:, 0] == pytest.approx(by_scikit_learn(X, Y, penalty).decision_function(X), abs=1e-5)


def test_each_problem_has_its_own_labels_items_penalty_and_scale() -> None:
    labels = np.stack([Y, 1 - Y, RNG.random(N) < 0.05, Y], axis=1).astype(float)
    labels[:4, 2] = 1
    taken = RNG.random((N, 4)) < 0.7
    taken[:4] = True
    penalties = [0.1, 1e-3, 0.5, 10.0]
    fits = fit_logistic(X, labels, taken, penalties)
    for k, penalty in enumerate(penalties):
        own = by_scikit_learn(X[taken[:, k]], labels[taken[:, k], k], penalty)
        assert fits.log_odds(X)[:, k] == pytest.approx(own.decision_function(X), abs=1e-5)


def test_many_problems_at_once_are_each_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = RNG.random((N, 9)) < 0.8
    labels, penalties = np.repeat(Y[:, None], 9, axis=1), np.logspace(-4, 1, 9)
    together = fit_logistic(X, labels, taken, penalties).log_odds(X)
    monkeypatch.setattr("medvlm_harness.training.logistic._BLOCK_ELEMENTS", N)  # one problem a block
    assert together == pytest.approx(fit_logistic(X, labels, taken, penalties).log_odds(X), abs=1e-5)


def test_what_is_not_taken_may_have_any_label() -> None:
    taken = np.arange(N) % 3 > 0
    labels = np.where(taken, Y, np.nan)
    found = fit_logistic(X, labels[:, None], taken[:, None], [0.1]).log_odds(X)[:, 0]
    assert found == pytest.approx(by_scikit_learn(X[taken], Y[taken], 0.1).decision_function(X), abs=1e-5)


def test_classes_that_a_plane_parts_are_no_difficulty() -> None:
    x = np.array([[k, -k] for k in range(40)], float)
    y = (x[:, 0] > 19).astype(float)
    found = fit_logistic(x, y[:, None], np.ones((40, 1), bool), [1e4]).log_odds(x)[:, 0]
    assert found == pytest.approx(by_scikit_learn(x, y, 1e4).decision_function(x), rel=1e-3, abs=1e-3)


def test_more_features_than_items_and_features_that_never_change() -> None:
    x = np.c_[RNG.normal(size=(30, 80)), np.full(30, 7.0), np.zeros(30)]
    y = np.r_[np.ones(10), np.zeros(20)]
    taken = np.ones((30, 2), bool)
    taken[20:, 1] = False
    x[20:, 3] = 5.0  # constant where the second problem learns nothing
    x[:20, 4] = 2.0  # constant where it learns
    found = fit_logistic(x, y[:, None], taken, [0.1, 0.1]).log_odds(x)
    for k in (0, 1):
        own = by_scikit_learn(x[taken[:, k]], y[taken[:, k]], 0.1)
        assert found[:, k] == pytest.approx(own.decision_function(x), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taken": np.ones((N - 1, 1), bool), "labels": Y[1:, None]}, r"features \(n, d\)"),
        ({"labels": Y}, r"labels and taken \(n, problems\)"),
        ({"penalty": [0.1, 0.1]}, r"penalty \(problems,\)"),
        ({"penalty": [0.0]}, "C above 0"),
        ({"penalty": [float("nan")]}, "C above 0"),
        ({"labels": np.ones((N, 1))}, "both classes"),
        ({"taken": np.zeros((N, 1), bool)}, "both classes"),
    ],
)
def test_wrong_input_says_what_was_expected(change: dict[str, Any], message: str) -> None:
    given = {"features": X, "labels": Y[:, None], "taken": np.ones((N, 1), bool), "penalty": [0.1], **change}
    with pytest.raises(ValueError, match=message):
        fit_logistic(**given)

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from medvlm_harness.metrics.calibration import expected_calibration_error
from medvlm_harness.metrics.selective import aurc
from medvlm_harness.tracks.option_trust import OPTION_TRUST, option_trust

Floats = NDArray[np.float64]


def drawn(n: int, seed: int, *, slope: float = 1.0) -> tuple[Floats, Floats]:
    """One-hot truth of three options, and a model that states the log-odds times the slope."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 3))
    p, stated = (np.exp(k * z) / np.exp(k * z).sum(axis=1, keepdims=True) for k in (1, slope))
    return np.array([rng.multinomial(1, one) for one in p], dtype=float), stated


def found(scored: tuple[Floats, Floats], validation: tuple[Floats, Floats], **options: object) -> dict:
    truth, probability = scored
    settings = {"judged": np.ones(len(truth), dtype=bool), "without": None, **options}
    studies = np.array([f"s{k}" for k in range(len(truth))])
    trust = option_trust(
        truth, probability, studies, fit_truth=validation[0], fit_probability=validation[1], **settings
    )
    json.dumps(trust.details, allow_nan=False)
    assert tuple(trust.estimates) == OPTION_TRUST
    return trust.estimates


def test_values_by_hand() -> None:
    truth, p = drawn(300, 1)
    estimates = found((truth, p), drawn(300, 2))
    right = truth[np.arange(300), p.argmax(axis=1)]
    assert estimates["brier"].value == pytest.approx(((p - truth) ** 2).sum(axis=1).mean())
    share = truth.mean(axis=0)
    constant = ((share - truth) ** 2).sum(axis=1).mean()
    assert estimates["brier"].floor == pytest.approx(constant)
    assert estimates["ece"].value == pytest.approx(expected_calibration_error(right, p.max(axis=1)))
    assert estimates["aurc"].value == pytest.approx(aurc(1 - right, p.max(axis=1)))
    assert estimates["aurc"].floor == pytest.approx(1 - right.mean())
    assert all(one.ci95[0] < one.value < one.ci95[1] and one.reason is None for one in estimates.values())


def test_a_temperature_from_validation_mends_what_is_overstated() -> None:
    estimates = found(drawn(2000, 3, slope=4), drawn(1000, 4, slope=4))
    assert estimates["ece"].value > 3 * estimates["ece_scaled"].value
    assert estimates["ece_scaled"].value < 1.6 * estimates["ece_scaled"].floor
    assert estimates["brier_scaled"].value < estimates["brier"].value
    perfect = found(drawn(2000, 5), drawn(1000, 6))
    assert perfect["ece"].value < 1.6 * perfect["ece"].floor


def test_always_sure_and_always_wrong() -> None:
    truth, _ = drawn(100, 7)
    wrong = np.roll(truth, 1, axis=1)
    estimates = found((truth, wrong), (truth, wrong))
    assert estimates["brier"].value == 2.0
    assert estimates["ece"].value == estimates["aurc"].value == 1.0
    assert np.isnan(estimates["ece_scaled"].value)


def test_what_was_fitted_on_is_not_judged() -> None:
    scored, validation = drawn(400, 8), drawn(100, 9)
    outside = np.arange(400) >= 150
    some = found(scored, validation, judged=outside)
    apart = found((scored[0][outside], scored[1][outside]), validation)
    assert some["ece"].n == 400 and some["ece_scaled"].n == 250
    assert some["ece_scaled"].value == apart["ece_scaled"].value != some["ece"].value
    none = found(scored, validation, judged=np.zeros(400, dtype=bool))
    assert none["brier_scaled"].reason == "nothing is scored outside of what was fitted on"
    empty = found(scored, (np.zeros((0, 3)), np.zeros((0, 3))), without="no validation")
    assert empty["brier_scaled"].reason == "no validation" and not np.isnan(empty["brier"].value)

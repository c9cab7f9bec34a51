"""How far answers among exclusive options can be trusted: calibration and selective prediction, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics.bootstrap import Weights, bootstrap_columns, bootstrap_estimate
from medvlm_harness.metrics.calibration import calibration_estimates
from medvlm_harness.metrics.estimate import Estimate, plain
from medvlm_harness.metrics.scaling import fit_softmax_temperature, softmax_scaled
from medvlm_harness.metrics.selective import weighted_aurc
from medvlm_harness.tracks.label_trust import LabelTrust, risk_coverage_points

__all__ = ["OPTION_CALIBRATION", "OPTION_TRUST", "option_calibration", "option_trust"]

Array = NDArray[np.float64]
OPTION_CALIBRATION = ("brier", "ece", "ece_equal_mass")
SELECTIVE = ("aurc", "excess_aurc")
OPTION_TRUST = (*OPTION_CALIBRATION, *(f"{name}_scaled" for name in OPTION_CALIBRATION), *SELECTIVE)
ANSWER = "answer"


def option_trust(
    truth: Array,
    probability: Array,
    studies: NDArray[np.str_],
    *,
    judged: NDArray[np.bool_],
    fit_truth: Array,
    fit_probability: Array,
    without: str | None,
) -> LabelTrust:
    """The estimates by `OPTION_TRUST`, and what stands beside them.

    The Brier score is the squared distance summed over the options, in [0, 2]. Calibration errors and confidence are
    those of the answer, the most probable option. Scaled: after one temperature, fitted on validation.

    Args:
        truth: one-hot, shape (n, options).
        probability: rows that sum to 1, shape (n, options).
        studies: the study of each row, (n,).
        judged: the rows that nothing was fitted on, (n,).
        fit_truth: of validation, shape (m, options).
        fit_probability: likewise.
        without: why validation is empty, where it is.
    """
    temperature = fit_softmax_temperature(fit_truth, fit_probability)
    temperature = replace(temperature, reason=without) if without else temperature
    stated = option_calibration(truth, probability, studies)
    why = temperature.reason or (None if judged.any() else "nothing is scored outside of what was fitted on")
    after = (
        dict.fromkeys(OPTION_CALIBRATION, Estimate.undefined(why, n=int(judged.sum())))
        if why
        else option_calibration(truth[judged], softmax_scaled(probability[judged], temperature), studies[judged])
    )
    answer = probability.argmax(axis=1)
    error = (truth[np.arange(len(truth)), answer] == 0).astype(np.float64)
    confidence = probability.max(axis=1)
    estimates = stated | {f"{name}_scaled": one for name, one in after.items()} | _selective(error, confidence, studies)
    details = {
        "calibration": {ANSWER: {"scaling": plain(asdict(temperature))}},
        "selective": {ANSWER: {"curve": risk_coverage_points(error, confidence)}},
    }
    return LabelTrust({name: estimates[name] for name in OPTION_TRUST}, details)


def option_calibration(truth: Array, probability: Array, studies: NDArray[np.str_]) -> dict[str, Estimate]:
    """The estimates by `OPTION_CALIBRATION`; arguments as of `option_trust`."""
    distance = ((probability - truth) ** 2).sum(axis=1)
    answer = probability.argmax(axis=1)
    right = truth[np.arange(len(truth)), answer][:, None]
    # Rounding may leave a probability of 1 a little above it.
    confidence = np.minimum(probability.max(axis=1), 1.0)[:, None]
    found = calibration_estimates(right, confidence, studies, keys=[ANSWER])
    share = truth.mean(axis=0)
    brier = bootstrap_estimate(_mean_of(distance), studies, floor=float(1 - (share**2).sum()))
    # What is right is no class: neither positives nor a macro are meant.
    errors = {name: replace(found[f"{name}_{ANSWER}"], positives=None, reason=None) for name in OPTION_CALIBRATION[1:]}
    return {"brier": brier, **errors}


def _mean_of(values: Array) -> Callable[[Weights], Array]:
    def mean(weights: Weights) -> Array:
        averaged: Array = weights @ values / weights.sum(axis=1)
        return averaged

    return mean


def _selective(error: Array, confidence: Array, studies: NDArray[np.str_]) -> dict[str, Estimate]:
    """The floor is that of confidence that says nothing."""
    silent = weighted_aurc(error, np.zeros(len(error)), np.ones((1, len(error))))[0].tolist()
    found = bootstrap_columns(
        lambda weights: weighted_aurc(error, confidence, weights), studies, positives=[None, None], floors=silent
    )
    return dict(zip(SELECTIVE, found, strict=True))

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from medvlm_harness.metrics.scaling import fit_scaling
from medvlm_harness.tracks.label_fits import POINTS, LabelItems, fit_labels

RNG = np.random.default_rng(8)
KEYS = ["common", "rare"]


def items(n: int = 200) -> LabelItems:
    """A label with many positives, one with 5; No Finding is that neither is there."""
    truth = np.stack([RNG.random(n) < 0.4, np.arange(n) < 5], axis=1).astype(float)
    truth[-20:, 0] = np.nan
    margin = RNG.normal(2 * np.nan_to_num(truth))
    studies = np.array([f"s{k // 2}" for k in range(n)])
    none = 1 - np.nan_to_num(truth).max(axis=1), -margin.max(axis=1)
    return LabelItems(truth, margin, expit(margin), studies, none)


def test_each_fit_is_that_of_the_label_by_itself() -> None:
    validation = items()
    fits = fit_labels(validation, keys=KEYS, scaling="platt")
    assert (fits.items, fits.studies, fits.reason) == (200, 100, None)
    assert fits.scalings == fit_scaling(validation.truth, validation.margin, keys=KEYS, method="platt")
    assert fits.scalings["rare"].fitted == "shared temperature"
    y, m = validation.truth[:180, 0], validation.margin[:180, 0]
    # By hand: every margin tried as a threshold.
    index = {t: (m[y == 1] >= t).mean() + (m[y == 0] < t).mean() for t in m}
    youden = fits.thresholds["youden"]["common"]
    assert index[youden.value] == max(index.values())
    assert youden.sensitivity + youden.specificity == pytest.approx(max(index.values()))
    assert (youden.positives, youden.negatives) == (int(y.sum()), int((y == 0).sum()))
    sensitive = fits.thresholds["sensitivity_90"]["common"]
    assert sensitive.value == max(t for t in m if (m[y == 1] >= t).mean() >= 0.9)
    none, score = validation.no_finding or (np.empty(0), np.empty(0))
    of_none = {t: (score[none == 1] >= t).mean() + (score[none == 0] < t).mean() for t in score}
    assert fits.no_finding is not None and of_none[fits.no_finding.value] == max(of_none.values())


def test_answers_are_accepted_from_the_least_confidence_that_is_sensitive_enough() -> None:
    validation = items()
    found = fit_labels(validation, keys=KEYS, scaling="platt").acceptances["common"]
    y, p = validation.truth[:180, 0], validation.probability[:180, 0]
    confidence = np.maximum(p, 1 - p)
    reaching = [
        c
        for c in confidence
        if (y[confidence >= c] == 1).any() and (p[(confidence >= c) & (y == 1)] >= 0.5).mean() >= 0.9
    ]
    assert found.threshold == min(reaching)
    assert found.coverage == pytest.approx((confidence >= found.threshold).mean())


def test_too_few_positives_have_no_threshold_and_say_so() -> None:
    fits = fit_labels(items(), keys=KEYS, scaling="temperature")
    for point in POINTS:
        assert np.isnan(fits.thresholds[point]["rare"].value)
        assert "validation has 5 positives" in str(fits.thresholds[point]["rare"].reason)
    assert np.isnan(fits.acceptances["rare"].threshold)


def test_nothing_to_fit_on_says_why_everywhere() -> None:
    nothing = items().take(np.zeros(200, dtype=bool))
    fits = fit_labels(nothing, keys=KEYS, scaling="platt", without="no validation")
    said = [
        *fits.scalings.values(),
        *(one for its in fits.thresholds.values() for one in its.values()),
        fits.no_finding,
    ]
    assert {one.reason for one in said if one} == {fits.reason} == {"no validation"}
    assert all(np.isnan(one.slope) for one in fits.scalings.values())


def test_a_label_without_scores_has_its_own_reason() -> None:
    validation = items()
    truth, margin = validation.truth.copy(), validation.margin.copy()
    truth[:, 1] = margin[:, 1] = np.nan
    without = LabelItems(truth, margin, np.where(np.isnan(margin), np.nan, 0.5), validation.studies)
    fits = fit_labels(without, keys=KEYS, scaling="platt", reasons=[None, "not learnt"])
    assert fits.thresholds["youden"]["rare"].reason == "not learnt"
    assert (
        fits.thresholds["youden"]["common"]
        == fit_labels(validation, keys=KEYS, scaling="platt").thresholds["youden"]["common"]
    )

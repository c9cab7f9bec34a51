from __future__ import annotations

import numpy as np
import pytest

from medvlm_harness.metrics.ranking import auroc, average_precision
from medvlm_harness.results.report.curves import precision_recall, roc
from medvlm_harness.results.report.drawing import thinned

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("digits", [8, 1])  # without ties, and with many
def test_the_area_below_the_roc_is_the_auroc(digits: int) -> None:
    target = (RNG.random(200) < 0.3).astype(float)
    score = np.round(RNG.random(200) + 0.4 * target, digits)
    x, y = zip(*roc(target, score), strict=True)
    assert np.trapezoid(y, x) == pytest.approx(auroc(target, score), abs=1e-12)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


@pytest.mark.parametrize("digits", [8, 1])
def test_steps_below_precision_and_recall_are_the_average_precision(digits: int) -> None:
    target = (RNG.random(200) < 0.2).astype(float)
    score = np.round(RNG.random(200) + 0.4 * target, digits)
    recall, precision = map(np.array, zip(*precision_recall(target, score), strict=True))
    area = float(np.sum(np.diff(recall, prepend=0) * precision))
    assert area == pytest.approx(average_precision(target, score), abs=1e-12)
    assert precision[-1] == pytest.approx(target.mean())


def test_a_constant_score_is_one_step() -> None:
    assert roc(np.array([0.0, 1.0, 1.0]), np.zeros(3)) == [(0, 0), (1, 1)]


def test_thinning_keeps_both_ends_and_the_course() -> None:
    points = [(k / 5000, (k / 5000) ** 2) for k in range(5001)]
    fewer = thinned(points, 100)
    assert len(fewer) <= 100
    assert (fewer[0], fewer[-1]) == (points[0], points[-1])
    x, y = zip(*fewer, strict=True)
    assert max(abs(np.interp(a, x, y) - b) for a, b in points) < 0.001
    assert thinned(points[:5], 100) == points[:5]

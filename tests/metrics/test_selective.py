from itertools import pairwise, permutations

import numpy as np
import pytest

from medvlm_harness.metrics.bootstrap import percentile_interval, study_weights
from medvlm_harness.metrics.selective import (
    aurc,
    binary_decisions,
    coverage_at_sensitivity,
    excess_aurc,
    risk_coverage,
    selective_estimates,
    selective_names,
    weighted_aurc,
)

RNG = np.random.default_rng(7)


def risks_by_hand(error: list[int], confidence: list[float]) -> list[float]:
    """Independent and slow: the mean over all orders that keep the more confident first."""
    n = len(error)
    orders = [o for o in permutations(range(n)) if all(confidence[a] >= confidence[b] for a, b in pairwise(o))]
    return [float(np.mean([np.mean([error[i] for i in order[: k + 1]]) for order in orders])) for k in range(n)]


@pytest.mark.parametrize("levels", [1, 2, 3, 100])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_the_curve_is_the_expectation_over_all_orders_of_ties(n: int, levels: int) -> None:
    error, confidence = RNG.integers(2, size=n), RNG.integers(levels, size=n) / levels
    by_hand = risks_by_hand(error.tolist(), confidence.tolist())
    curve = risk_coverage(error, confidence)
    assert curve.risk.tolist() == pytest.approx(by_hand, abs=1e-12)
    assert curve.coverage.tolist() == pytest.approx([(k + 1) / n for k in range(n)])
    assert aurc(error, confidence) == pytest.approx(np.mean(by_hand), abs=1e-12)


def test_the_order_of_the_items_changes_nothing() -> None:
    error, confidence = RNG.integers(2, size=200), RNG.integers(5, size=200)
    order = RNG.permutation(200)
    assert aurc(error[order], confidence[order]) == pytest.approx(aurc(error, confidence), abs=1e-14)


def test_confidence_that_says_nothing_scores_the_error_rate() -> None:
    error = RNG.integers(2, size=100)
    assert aurc(error, np.zeros(100)) == pytest.approx(error.mean())
    shuffled = [aurc(error, RNG.random(100)) for _ in range(300)]
    assert np.mean(shuffled) == pytest.approx(error.mean(), abs=0.02)


def test_an_oracle_has_no_excess_and_the_worst_order_has_most() -> None:
    error = np.repeat([0, 1], [80, 20])
    assert excess_aurc(error, -np.arange(100)) == pytest.approx(0, abs=1e-14)
    assert excess_aurc(error, np.arange(100)) > excess_aurc(error, np.zeros(100)) > 0
    by_hand = np.mean([max(0, k - 80) / k for k in range(1, 101)])
    assert aurc(error, -np.arange(100)) == pytest.approx(by_hand)


def test_weights_are_repetitions() -> None:
    error, confidence = RNG.integers(2, size=60), RNG.integers(8, size=60)
    weights = study_weights(np.arange(60) // 2, resamples=20)
    for row, times in zip(weighted_aurc(error, confidence, weights), weights.astype(int), strict=True):
        again = np.repeat(error, times), np.repeat(confidence, times)
        assert row.tolist() == pytest.approx([aurc(*again), excess_aurc(*again)], abs=1e-12)


def test_coverage_at_sensitivity_by_hand() -> None:
    y, called, confidence = [1, 1, 0, 1, 0], [1, 1, 0, 0, 1], [0.9, 0.8, 0.7, 0.6, 0.5]
    assert coverage_at_sensitivity(y, called, confidence, sensitivity=0.9) == (0.7, 0.6, 1.0)
    assert coverage_at_sensitivity(y, called, confidence, sensitivity=0.6) == pytest.approx((0.5, 1.0, 2 / 3))
    never = coverage_at_sensitivity([1, 1], [0, 0], [0.9, 0.8], sensitivity=0.5)
    assert (never.threshold, never.coverage) == (np.inf, 0) and np.isnan(never.sensitivity)
    assert np.isnan(coverage_at_sensitivity([0, 0], [0, 1], [0.9, 0.8], sensitivity=0.5)).all()


def test_a_tie_is_accepted_as_a_whole_or_not_at_all() -> None:
    # Taking only the right one of the tied pair would reach sensitivity 1.
    for y, called in (([1, 1], [1, 0]), ([1, 1], [0, 1])):
        assert coverage_at_sensitivity(y, called, [0.8, 0.8], sensitivity=0.9).coverage == 0
        assert coverage_at_sensitivity(y, called, [0.8, 0.8], sensitivity=0.5).coverage == 1


def test_binary_decisions_by_hand() -> None:
    error, confidence = binary_decisions([1, 1, 0, np.nan], [0.9, 0.2, 0.5, 0.5])
    assert error[:3].tolist() == [0, 1, 1] and np.isnan(error[3])
    assert confidence.tolist() == pytest.approx([0.9, 0.8, 0.5, 0.5])


def test_estimates_are_those_of_resampled_items_and_floors_the_error_rate() -> None:
    p = RNG.random((200, 3))
    y = (RNG.random((200, 3)) < p).astype(float)
    y[:20, 1], p[:, 2] = np.nan, np.nan
    studies, keys = np.arange(200) // 2, ["a", "b", "c"]
    found = selective_estimates(y, p, studies, keys=keys, reasons=[None, None, "no fit"], resamples=40)
    assert tuple(found) == selective_names(keys)
    weights = study_weights(studies, resamples=40).astype(int)
    both = []
    for j, key in enumerate(keys[:2]):
        known = ~np.isnan(y[:, j])
        error, confidence = (one[known] for one in binary_decisions(y[:, j], p[:, j]))
        assert found[f"aurc_{key}"].value == pytest.approx(aurc(error, confidence))
        assert found[f"excess_aurc_{key}"].value == pytest.approx(excess_aurc(error, confidence))
        assert found[f"aurc_{key}"].floor == pytest.approx(error.mean())
        both.append([aurc(np.repeat(error, w), np.repeat(confidence, w)) for w in weights[:, known]])
        assert found[f"aurc_{key}"].ci95 == pytest.approx(percentile_interval(both[-1])[:2])
    assert found["aurc"].ci95 == pytest.approx(percentile_interval(np.mean(both, axis=0))[:2])
    assert np.isnan(found["aurc_c"].value) and found["aurc_c"].reason == "no fit"
    assert found["aurc"].extra["labels"] == ["a", "b"]


def test_thresholds_from_validation_give_coverage_and_sensitivity_on_test() -> None:
    y, p = np.array([[1], [1], [0], [0], [1]] * 20, dtype=float), np.array([[0.9], [0.6], [0.1], [0.4], [0.2]] * 20)
    found = selective_estimates(y, p, np.arange(100), keys=["a"], thresholds=[0.7], resamples=50)
    assert tuple(found) == selective_names(["a"], accepted=True)
    assert found["coverage_a"].value == pytest.approx(3 / 5)  # 0.9, 0.1 and 0.2
    assert found["accepted_sensitivity_a"].value == pytest.approx(1 / 2)  # 0.9 found, 0.2 missed
    assert "held fixed" in found["coverage_a"].method
    nothing = selective_estimates(y, p, np.arange(100), keys=["a"], thresholds=[np.nan], resamples=50)
    assert np.isnan(nothing["coverage_a"].value) and not np.isnan(nothing["aurc_a"].value)


def test_intervals_cover_the_aurc_of_many() -> None:
    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        p = RNG.beta(1, 3, (n, 1))
        return (RNG.random((n, 1)) < p).astype(float), p

    y, p = drawn(200_000)
    expected = aurc(*(one[:, 0] for one in binary_decisions(y, p)))
    covered = 0
    for seed in range(100):
        y, p = drawn(300)
        found = selective_estimates(y, p, np.arange(300), keys=["a"], resamples=100, seed=seed)
        covered += found["aurc_a"].ci95[0] <= expected <= found["aurc_a"].ci95[1]
    assert covered >= 86


@pytest.mark.parametrize(
    ("error", "confidence", "message"),
    [([], [], "n > 0"), ([0, 1], [0.5], "one shape"), ([0, 2], [0.5, 0.5], "only 0 and 1"), ([0], [np.nan], "NaN")],
)
def test_wrong_input_says_what_was_expected(error: list[int], confidence: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        risk_coverage(error, confidence)

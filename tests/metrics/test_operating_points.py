import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from medvlm_harness.metrics.bootstrap import percentile_interval, study_weights
from medvlm_harness.metrics.operating_points import (
    POINTS,
    choose_thresholds,
    operating_point_estimates,
    operating_point_names,
    sensitivity_threshold,
    youden_threshold,
)

RNG = np.random.default_rng(7)
Floats = NDArray[np.float64]


def drawn(n: int, labels: int = 1, *, prevalence: float = 0.3, levels: int = 10_000) -> tuple[Floats, Floats]:
    y = (RNG.random((n, labels)) < prevalence).astype(float)
    return y, np.round(RNG.normal(1.5 * y) * levels) / levels


def rates_by_hand(y: Floats, called: Floats) -> tuple[float, float]:
    tn, fp, fn, tp = confusion_matrix(y, called).ravel()
    return tp / (tp + fn), tn / (tn + fp)


@pytest.mark.parametrize("levels", [1, 10_000])
def test_youden_is_the_best_of_all_scores(levels: int) -> None:
    y, s = (one[:, 0] for one in drawn(80, levels=levels))
    by_hand = {cut: sum(rates_by_hand(y, s >= cut)) for cut in sorted(set(s.tolist()))}
    found = youden_threshold(y, s)
    assert by_hand[found] == pytest.approx(max(by_hand.values()))


def test_of_equally_good_scores_the_lowest_misses_fewest() -> None:
    # From 0.2 on: sensitivity 1, specificity 1/2; from 0.4 on: 1/2 and 1.
    assert youden_threshold([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4]) == 0.2


@pytest.mark.parametrize("sensitivity", [0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("levels", [2, 10_000])
def test_the_highest_score_that_reaches_the_sensitivity(sensitivity: float, levels: int) -> None:
    y, s = (one[:, 0] for one in drawn(80, levels=levels))
    reaching = [cut for cut in set(s.tolist()) if recall_score(y, s >= cut) >= sensitivity]
    found = sensitivity_threshold(y, s, sensitivity=sensitivity)
    assert found in s[y == 1]
    assert (s[y == 1] >= found).mean() >= sensitivity
    assert (s[y == 1] >= max(reaching)).sum() == (s[y == 1] >= found).sum()


@pytest.mark.parametrize(("percent", "positives"), [(90, 10), (90, 70), (95, 20), (95, 180), (55, 100), (55, 220)])
def test_a_share_that_is_a_whole_number_needs_no_positive_more(percent: int, positives: int) -> None:
    y, s = np.repeat([1, 0], [positives, 5]), np.arange(positives + 5)[::-1]
    cut = sensitivity_threshold(y, s, sensitivity=percent / 100)
    assert int((s[y == 1] >= cut).sum()) * 100 == positives * percent


def test_thresholds_need_enough_positives_in_validation() -> None:
    y = np.zeros((100, 3))
    y[:9, 0], y[:10, 1], y[:20, 2] = 1, 1, 1
    s = RNG.random((100, 3))
    keys = ["nine", "ten", "twenty"]
    defined = {
        point: [not np.isnan(one.value) for one in choose_thresholds(y, s, keys=keys, point=point).values()]
        for point in POINTS
    }
    assert defined == {
        "youden": [False, True, True],
        "sensitivity_90": [False, True, True],
        "sensitivity_95": [False, False, True],
    }
    few = choose_thresholds(y, s, keys=keys, point="sensitivity_95")["ten"]
    assert few.reason == "validation has 10 positives and 90 negatives; sensitivity_95 needs 20 and 10"
    with pytest.raises(ValueError, match="Expected a point among youden, "):
        choose_thresholds(y, s, keys=keys, point="best")


def test_a_threshold_says_what_it_reached_on_validation() -> None:
    y, s = drawn(300)
    y[:50] = np.nan
    known = ~np.isnan(y[:, 0])
    found = choose_thresholds(y, s, keys=["a"], point="sensitivity_90")["a"]
    rates = rates_by_hand(y[known, 0], s[known, 0] >= found.value)
    assert (found.sensitivity, found.specificity) == pytest.approx(rates)
    assert (found.positives, found.negatives) == ((y == 1).sum(), (y == 0).sum())


def test_estimates_equal_scikit_learns_on_test_and_on_resampled_items() -> None:
    y, s = drawn(300, 3)
    y[:30, 1] = np.nan
    studies = np.arange(300) // 2
    thresholds = choose_thresholds(*drawn(300, 3), keys=["a", "b", "c"], point="youden")
    found = operating_point_estimates(y, s, studies, thresholds=thresholds, point="youden", resamples=40)
    assert tuple(found) == operating_point_names(["a", "b", "c"], "youden")
    weights = study_weights(studies, resamples=40)
    f1s = []
    for j, (key, threshold) in enumerate(thresholds.items()):
        known = ~np.isnan(y[:, j])
        truth, called = y[known, j], (s[known, j] >= threshold.value).astype(float)
        by_hand = {
            "sensitivity": recall_score(truth, called),
            "specificity": recall_score(truth, called, pos_label=0),
            "f1": f1_score(truth, called),
            "ppv": precision_score(truth, called),
            "npv": precision_score(truth, called, pos_label=0),
        }
        assert {m: found[f"{m}_at_youden_{key}"].value for m in by_hand} == pytest.approx(by_hand)
        f1s.append([f1_score(truth, called, sample_weight=w[known]) for w in weights])
        assert found[f"f1_at_youden_{key}"].ci95 == pytest.approx(percentile_interval(f1s[-1])[:2])
        assert found[f"ppv_at_youden_{key}"].floor == pytest.approx(truth.mean())
        assert found[f"f1_at_youden_{key}"].floor == pytest.approx(f1_score(truth, np.ones(len(truth))))
    assert found["f1_at_youden"].ci95 == pytest.approx(percentile_interval(np.mean(f1s, axis=0))[:2])
    assert "thresholds chosen on validation and held fixed" in found["f1_at_youden"].method


def test_a_label_without_threshold_is_undefined_with_the_reason_and_in_no_macro() -> None:
    validation, s = drawn(100, 2)
    validation[:, 1] = 0
    thresholds = choose_thresholds(validation, s, keys=["a", "b"], point="youden")
    y, s = drawn(100, 2)
    found = operating_point_estimates(y, s, np.arange(100), thresholds=thresholds, point="youden", resamples=20)
    assert np.isnan(found["f1_at_youden_b"].value)
    assert (found["f1_at_youden_b"].reason or "").startswith("validation has 0 positives")
    assert found["f1_at_youden"].extra["labels"] == ["a"]


def test_finding_all_is_no_certainty() -> None:
    y, s = np.repeat([[1.0], [0.0]], [30, 100], axis=0), np.repeat([[2.0], [0.0]], [30, 100], axis=0)
    thresholds = choose_thresholds(y, s, keys=["a"], point="youden")
    found = operating_point_estimates(y, s, np.arange(130), thresholds=thresholds, point="youden", resamples=20)
    low, high = found["sensitivity_at_youden_a"].ci95
    # Wilson's, by its formula for 30 of 30.
    assert (low, high) == (pytest.approx(1 / (1 + 1.959964**2 / 30)), 1)
    assert found["sensitivity_at_youden_a"].stderr > 0
    paired = operating_point_estimates(y, s, np.arange(130) // 2, thresholds=thresholds, point="youden", resamples=20)
    assert paired["sensitivity_at_youden_a"].ci95[0] < low  # 15 studies know less than 30 images


def test_intervals_cover_the_sensitivity_of_the_fixed_threshold() -> None:
    thresholds = choose_thresholds(*drawn(300), keys=["a"], point="sensitivity_90")
    many_y, many_s = drawn(200_000)
    expected = (many_s[many_y == 1] >= thresholds["a"].value).mean()
    covered = 0
    for seed in range(100):
        y, s = drawn(200)
        found = operating_point_estimates(
            y, s, np.arange(200), thresholds=thresholds, point="sensitivity_90", resamples=100, seed=seed
        )
        low, high = found["sensitivity_at_sensitivity_90_a"].ci95
        covered += low <= expected <= high
    assert covered >= 85  # of 100


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="0 and 1, both"):
        youden_threshold([1, 1], [0.1, 0.2])
    with pytest.raises(ValueError, match="one shape"):
        youden_threshold([1, 0], [0.1])
    with pytest.raises(ValueError, match="NaN for 1 of 2"):
        youden_threshold([1, 0], [0.1, np.nan])
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        sensitivity_threshold([1, 0], [0.1, 0.2], sensitivity=0)

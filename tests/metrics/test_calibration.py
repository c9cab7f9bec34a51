import json
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import brier_score_loss

from medvlm_harness.metrics.bootstrap import percentile_interval, study_weights
from medvlm_harness.metrics.calibration import (
    METRICS,
    MINIMUM_SUPPORT,
    Binning,
    brier_score,
    brier_skill,
    calibration_estimates,
    calibration_names,
    expected_calibration_error,
    macro_calibration,
    noise_floor,
    reliability,
)

RNG = np.random.default_rng(7)
Floats = NDArray[np.float64]


def ece_by_hand(y: list[int], p: list[float], bins: int) -> float:
    """Independent and slow: one Python loop over bins, straight from the definition."""
    total = 0.0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins
        last = k == bins - 1
        inside = [(a, b) for a, b in zip(y, p, strict=True) if low <= b < high or (last and b == 1)]
        if inside:
            gap = np.mean([a for a, _ in inside]) - np.mean([b for _, b in inside])
            total += len(inside) / len(y) * abs(float(gap))
    return total


def drawn(n: int, *, offset: float = 0.0, slope: float = 1.0) -> tuple[Floats, Floats]:
    """Outcomes of a logistic model, and what a model says that overstates its log-odds by the slope."""
    z = RNG.normal(offset, 1.5, n)
    return (RNG.random(n) < expit(z)).astype(float), expit(slope * z)


@pytest.mark.parametrize("n", [1, 2, 17, 590])
def test_equals_the_definition(n: int) -> None:
    p = RNG.random(n)
    y = (RNG.random(n) < p).astype(int)
    by_hand = ece_by_hand(y.tolist(), p.tolist(), 10)
    assert expected_calibration_error(y, p, bins=10) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("bins", [5, 10, 15, 50])
@pytest.mark.parametrize("offset", [-3.0, 0.0])
def test_equals_mapie_on_the_same_bins(bins: int, offset: float) -> None:
    mapie = pytest.importorskip("mapie.metrics.calibration", reason="the oracle needs the PyPI package mapie")
    y, p = drawn(590, offset=offset, slope=2)
    p[:3] = 1.0
    # MAPIE's num_bins counts edges: its first bin holds 0 alone, which no item has here.
    theirs = mapie.expected_calibration_error(y.astype(int), p, num_bins=bins + 1, split_strategy="uniform")
    assert expected_calibration_error(y, p, bins=bins) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_always_sure_and_always_wrong_scores_one(binning: Binning) -> None:
    y, p = [0] * 50 + [1] * 50, [1.0] * 50 + [0.0] * 50
    assert expected_calibration_error(y, p, binning=binning) == 1.0
    assert expected_calibration_error([0] * 50, [1.0] * 50, binning=binning) == 1.0


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_ties_are_never_split(binning: Binning) -> None:
    table = reliability([0, 1] * 30, [0.25] * 60, binning=binning)
    assert table.support.tolist() == [60]


def test_equal_mass_bins_hold_equal_counts_where_nothing_is_tied() -> None:
    p = RNG.random(600)
    assert set(reliability(RNG.random(600) < p, p, binning="mass").support.tolist()) == {40}
    rare = RNG.beta(0.2, 20, 600)
    assert reliability(RNG.random(600) < rare, rare, binning="mass").support.max() == 40
    assert reliability(RNG.random(600) < rare, rare).support.max() > 400


def test_reliability_by_hand() -> None:
    table = reliability([0, 1, 1, 0], [0.1, 0.4, 0.6, 0.6], bins=2)
    assert table.confidence.tolist() == pytest.approx([0.25, 0.6])
    assert table.frequency.tolist() == [0.5, 0.5]
    assert table.support.tolist() == [2, 2]


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("offset", [-3.0, 0.0])
def test_a_perfect_model_sits_at_its_noise_floor(binning: Binning, offset: float) -> None:
    _, p = drawn(590, offset=offset)
    scores = [expected_calibration_error(RNG.random(p.size) < p, p, binning=binning) for _ in range(300)]
    assert np.mean(scores) == pytest.approx(noise_floor(p, binning=binning), rel=0.1)


def test_an_overconfident_model_sits_above_its_noise_floor() -> None:
    y, p = drawn(2000, slope=2)
    assert expected_calibration_error(y, p) > 2 * noise_floor(p)


def test_images_that_share_their_study_raise_the_noise_floor() -> None:
    p = np.repeat(drawn(300)[1], 2)
    # Two images with one outcome weigh as one: half the items, root two times the noise.
    assert noise_floor(p, studies=np.arange(600) // 2) == pytest.approx(2**0.5 * noise_floor(p), rel=0.1)
    assert noise_floor(p, studies=np.arange(600) // 2) == pytest.approx(noise_floor(p[::2]), rel=0.1)


def test_brier_equals_scikit_learns_and_skill_is_relative_to_the_prevalence() -> None:
    y, p = drawn(200)
    assert brier_score(y, p) == pytest.approx(brier_score_loss(y, p), abs=1e-15)
    prevalence = np.full(200, y.mean())
    assert brier_skill(y, p) == pytest.approx(1 - brier_score_loss(y, p) / brier_score_loss(y, prevalence))
    assert brier_skill(y, y) == 1
    assert brier_skill(y, prevalence) == pytest.approx(0, abs=1e-12)
    assert np.isnan(brier_skill([0, 0], [0.5, 0.5]))


def test_a_constant_prevalence_has_no_calibration_error_and_no_skill() -> None:
    y = np.repeat([0.0, 1.0], [570, 20])
    p = np.full(590, y.mean())
    estimates = calibration_estimates(y[:, None], p[:, None], np.arange(590), keys=["rare"], resamples=50)
    assert estimates["ece_rare"].value == pytest.approx(0, abs=1e-12)
    assert estimates["brier_skill_rare"].value == pytest.approx(0, abs=1e-12)


def estimates_of(
    y: Floats, p: Floats, studies: NDArray[np.generic], resamples: int = 100
) -> dict[str, tuple[float, tuple[float, float]]]:
    keys = [f"k{j}" for j in range(y.shape[1])]
    found = calibration_estimates(y, p, studies, keys=keys, resamples=resamples)
    assert tuple(found) == calibration_names(keys)
    return {name: (estimate.value, estimate.ci95) for name, estimate in found.items()}


def test_estimates_are_the_metrics_of_what_is_labelled_and_intervals_those_of_resampled_items() -> None:
    columns = [drawn(300, slope=1.5) for _ in range(3)]
    y, p = np.stack([one[0] for one in columns], axis=1), np.stack([one[1] for one in columns], axis=1)
    y[:40, 1] = np.nan
    studies = np.arange(300) // 2
    found = estimates_of(y, p, studies)
    weights = study_weights(studies, resamples=100).astype(int)
    macro = []
    for j in range(3):
        known = ~np.isnan(y[:, j])
        a, b = y[known, j], p[known, j]
        assert found[f"ece_k{j}"][0] == pytest.approx(expected_calibration_error(a, b), abs=1e-12)
        assert found[f"ece_equal_mass_k{j}"][0] == pytest.approx(expected_calibration_error(a, b, binning="mass"))
        assert found[f"brier_k{j}"][0] == pytest.approx(brier_score(a, b))
        resampled = [(np.repeat(a, w), np.repeat(b, w)) for w in weights[:, known]]
        briers = [brier_score(*one) for one in resampled]
        assert found[f"brier_k{j}"][1] == pytest.approx(percentile_interval(briers)[:2])
        skills = [brier_skill(*one) for one in resampled]
        assert found[f"brier_skill_k{j}"][1] == pytest.approx(percentile_interval(skills)[:2])
        errors = np.array([expected_calibration_error(*one) for one in resampled])
        moved = errors - errors.mean() + found[f"ece_k{j}"][0]
        assert found[f"ece_k{j}"][1] == pytest.approx(percentile_interval(np.maximum(moved, 0))[:2])
        macro.append(briers)
    assert found["brier"][0] == pytest.approx(np.mean([found[f"brier_k{j}"][0] for j in range(3)]))
    assert found["brier"][1] == pytest.approx(percentile_interval(np.mean(macro, axis=0))[:2])  # the same resamples


def test_labels_with_few_positives_are_shown_and_left_out_of_the_macro() -> None:
    y, p = np.zeros((590, 2)), np.full((590, 2), 0.3)
    y[:MINIMUM_SUPPORT, 0] = 1
    y[: MINIMUM_SUPPORT - 1, 1] = 1
    found = calibration_estimates(y, p, np.arange(590), keys=["enough", "few"], resamples=20)
    assert found["ece"].value == found["ece_enough"].value != found["ece_few"].value
    assert found["ece"].extra["left_out_positives"] == {"few": 49}
    assert found["ece_few"].reason == "fewer than 50 positives or negatives: left out of macros"
    assert found["ece_enough"].reason is None


def test_a_label_without_probabilities_or_labels_is_undefined_and_says_why() -> None:
    y, p = np.zeros((60, 2)), np.full((60, 2), 0.5)
    y[:, 0], p[:, 1] = np.nan, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibration_estimates(y, p, np.arange(60), keys=["a", "b"], reasons=[None, "no fit"], resamples=20)
    assert np.isnan(found["ece_a"].value) and found["ece_a"].reason == "undefined with 0 positives and 0 negatives"
    assert np.isnan(found["ece_b"].value) and found["ece_b"].reason == "no fit"
    assert np.isnan(found["ece"].value) and "no label" in (found["ece"].reason or "")


def test_an_estimate_is_plain_json_with_its_reliability_table_and_floor() -> None:
    y, p = drawn(200)
    found = calibration_estimates(y[:, None], p[:, None], np.arange(200), keys=["a"], resamples=20)
    plain = json.loads(json.dumps(found["ece_a"].to_dict(), allow_nan=False))
    assert sum(plain["extra"]["reliability"]["support"]) == 200
    assert plain["floor"] == noise_floor(p)


@pytest.mark.parametrize(("offset", "slope"), [(0.0, 1.0), (-3.0, 1.0), (0.0, 2.0)])
def test_intervals_cover_what_samples_of_this_size_score_on_average(offset: float, slope: float) -> None:
    n, times = 400, 60
    expected = np.mean([expected_calibration_error(*drawn(n, offset=offset, slope=slope)) for _ in range(400)])
    covered = 0
    for seed in range(times):
        y, p = drawn(n, offset=offset, slope=slope)
        found = calibration_estimates(y[:, None], p[:, None], np.arange(n), keys=["a"], resamples=150, seed=seed)
        low, high = found["ece_a"].ci95
        covered += low <= expected <= high
    assert covered >= 51  # of 60; where intervals cover 95%, less has a chance below 1 in 500


def test_resampling_a_perfect_model_doubles_its_noise_which_is_why_intervals_are_recentred() -> None:
    y, p = drawn(400)
    weights = study_weights(np.arange(400), resamples=200).astype(int)
    resampled = np.mean([expected_calibration_error(np.repeat(y, w), np.repeat(p, w)) for w in weights])
    assert resampled > 1.2 * expected_calibration_error(y, p)
    found = calibration_estimates(y[:, None], p[:, None], np.arange(400), keys=["a"], resamples=200)["ece_a"]
    assert found.ci95[0] <= noise_floor(p) <= found.ci95[1]


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        ([], [], "n > 0"),
        ([0, 1], [0.5], "one shape"),
        ([0, 2], [0.5, 0.5], "only 0 and 1"),
        ([0, 1], [0.5, 1.5], r"in \[0, 1\]"),
    ],
)
def test_wrong_input_says_what_was_expected(y: list[int], p: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(y, p)
    with pytest.raises(ValueError, match=message):
        brier_score(y, p)


def test_the_macro_is_the_mean_over_labels_with_whatever_truth_they_have() -> None:
    p = RNG.random((80, 2))
    y = (RNG.random(p.shape) < p).astype(float)
    y[:30, 1] = np.nan
    found = dict(zip(METRICS, macro_calibration(y, p)(np.ones((1, 80)))[0], strict=True))
    labels = [(y[:, 0], p[:, 0]), (y[30:, 1], p[30:, 1])]
    assert found["brier"] == pytest.approx(np.mean([brier_score(*one) for one in labels]))
    assert found["brier_skill"] == pytest.approx(np.mean([brier_skill(*one) for one in labels]))
    assert found["ece"] == pytest.approx(np.mean([expected_calibration_error(*one) for one in labels]))
    with pytest.raises(ValueError, match="of one shape"):
        macro_calibration(y[:, :0], p[:, :0])

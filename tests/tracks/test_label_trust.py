from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import brier_score_loss, f1_score, recall_score, roc_auc_score

from medvlm_harness.metrics.calibration import brier_skill, expected_calibration_error
from medvlm_harness.metrics.scaling import scaled
from medvlm_harness.metrics.selective import aurc
from medvlm_harness.tracks.label_fits import LabelItems, fit_labels
from medvlm_harness.tracks.label_trust import LabelTrust, is_lower_better, label_trust, trust_names

Floats = NDArray[np.float64]
KEYS = ["often", "sometimes", "rare"]
OFFSETS = (-0.5, -2.0, -7.0)


def drawn(n: int, seed: int, *, slope: float = 1.0) -> LabelItems:
    """Outcomes of known log-odds, and a model that states them times the slope."""
    rng = np.random.default_rng(seed)
    z = rng.normal(OFFSETS, 1.2, (n, 3))
    truth = (rng.random((n, 3)) < expit(z)).astype(float)
    truth[rng.random(truth.shape) < 0.03] = np.nan
    return of(truth, slope * z)


def of(truth: Floats, margin: Floats) -> LabelItems:
    known = np.nan_to_num(truth)
    none = np.where(known.max(axis=1) == 1, 0.0, np.where(np.isnan(truth).any(axis=1), np.nan, 1.0))
    studies = np.array([f"s{k:05}" for k in range(len(truth))])
    return LabelItems(truth, margin, expit(margin), studies, (none, -margin.max(axis=1)))


def trust(
    scored: LabelItems,
    validation: LabelItems,
    *,
    judged: LabelItems | None = None,
    groups: Any = None,
    scaling: Any = "platt",
    **options: Any,
) -> LabelTrust:
    fits = fit_labels(validation, keys=KEYS, scaling=scaling, without=None if len(validation) else "no validation")
    judged = scored if judged is None else judged
    return label_trust(
        scored, judged, fits, keys=KEYS, groups=groups or {}, frequency=options.pop("frequency", None), **options
    )


@pytest.fixture(scope="module")
def overconfident() -> tuple[LabelItems, LabelItems, LabelTrust]:
    scored, validation = drawn(1500, 1, slope=3), drawn(800, 2, slope=3)
    sex = np.random.default_rng(3).choice(["F", "M", ""], 1500)
    groups = [str(one) or None for one in sex]
    return scored, validation, trust(scored, validation, groups={"sex": (groups, groups)})


def known(items: LabelItems, label: int) -> tuple[Floats, Floats, Floats]:
    """Truth, margin and probability where the truth is known."""
    inside = ~np.isnan(items.truth[:, label])
    return items.truth[inside, label], items.margin[inside, label], items.probability[inside, label]


def test_names_are_those_announced_and_every_value_has_an_interval_or_a_reason(overconfident: Any) -> None:
    *_, found = overconfident
    assert tuple(found.estimates) == trust_names(["sex"], no_finding=True)
    assert "underdiagnosis_gap_sex" not in trust_names(["sex"], no_finding=False)
    for name, estimate in found.estimates.items():
        if np.isnan(estimate.value):
            assert estimate.reason, name
        else:
            assert estimate.ci95[0] <= estimate.value <= estimate.ci95[1], name
    assert json.loads(json.dumps(found.details, allow_nan=False)) == found.details


def test_calibration_before_and_after_scaling_by_hand(overconfident: Any) -> None:
    scored, validation, found = overconfident
    used = [0, 1]  # the third has fewer than 50 positives
    assert found.estimates["ece"].extra["labels"] == KEYS[:2]
    after = scaled(scored.margin, list(fit_labels(validation, keys=KEYS, scaling="platt").scalings.values()))
    for suffix, probability in (("", scored.probability), ("_scaled", after)):
        by_hand: dict[str, list[float]] = {"brier": [], "ece": [], "brier_skill": []}
        for j in used:
            y, inside = known(scored, j)[0], ~np.isnan(scored.truth[:, j])
            by_hand["brier"].append(brier_score_loss(y, probability[inside, j]))
            by_hand["ece"].append(expected_calibration_error(y, probability[inside, j]))
            by_hand["brier_skill"].append(brier_skill(y, probability[inside, j]))
        for name, values in by_hand.items():
            assert found.estimates[name + suffix].value == pytest.approx(np.mean(values)), name + suffix
    # Overstated three times: scaling finds the third.
    assert found.details["calibration"]["often"]["scaling"]["slope"] == pytest.approx(1 / 3, rel=0.2)
    assert found.estimates["ece"].value > 3 * found.estimates["ece_scaled"].value


def test_a_perfect_model_and_one_that_was_scaled_lie_near_their_noise_floor(overconfident: Any) -> None:
    perfect = trust(drawn(1500, 4), drawn(800, 5)).estimates
    for estimate in (perfect["ece"], overconfident[2].estimates["ece_scaled"]):
        assert estimate.floor is not None
        assert estimate.value < 1.6 * estimate.floor
    plain = overconfident[2].estimates["ece"]
    assert plain.floor is not None and plain.value > 3 * plain.floor  # negative control


def test_always_sure_and_always_wrong_has_an_error_of_one_and_no_slope() -> None:
    rng = np.random.default_rng(6)
    truth = (rng.random((400, 3)) < 0.5).astype(float)
    wrong = of(truth, np.where(truth == 1, -800.0, 800.0))
    found = trust(wrong, wrong).estimates
    assert found["ece"].value == found["ece_equal_mass"].value == found["brier"].value == 1.0
    assert found["aurc"].value == 1.0
    assert np.isnan(found["ece_scaled"].value)
    reason = trust(wrong, wrong).details["calibration"]["often"]["scaling"]["reason"]
    assert "do not mean more positives" in reason


def test_operating_points_are_of_test_at_thresholds_of_validation(overconfident: Any) -> None:
    scored, validation, found = overconfident
    thresholds = fit_labels(validation, keys=KEYS, scaling="platt").thresholds
    for point, names in (("youden", ("sensitivity", "f1")), ("sensitivity_90", ("sensitivity",))):
        for metric, theirs in zip(names, (recall_score, f1_score), strict=False):
            values = [
                theirs(y, m >= thresholds[point][key].value)
                for key, (y, m, _) in ((key, known(scored, j)) for j, key in enumerate(KEYS[:2]))
            ]
            assert found.estimates[f"{metric}_at_{point}"].value == pytest.approx(np.mean(values))
    assert found.details["operating_points"]["youden"]["often"]["threshold"]["value"] == pytest.approx(
        thresholds["youden"]["often"].value
    )


def test_selective_prediction_by_hand(overconfident: Any) -> None:
    scored, _, found = overconfident
    areas = []
    for j in (0, 1):
        y, _, p = known(scored, j)
        areas.append(aurc((p >= 0.5) != y, np.maximum(p, 1 - p)))
    # The third has fewer than 10 positives.
    assert found.estimates["aurc"].extra["labels"] == KEYS[:2]
    assert found.estimates["aurc"].value == pytest.approx(np.mean(areas))
    curve = found.details["selective"]["often"]["curve"]
    y, _, p = known(scored, 0)
    assert len(curve["coverage"]) == len(curve["risk"]) == 50
    assert (curve["coverage"][-1], curve["risk"][-1]) == pytest.approx((1, np.mean((p >= 0.5) != y)))


def test_answers_are_accepted_at_the_confidence_that_was_sensitive_enough_on_validation() -> None:
    def able(n: int, seed: int) -> LabelItems:
        rng = np.random.default_rng(seed)
        truth = (rng.random((n, 3)) < 0.3).astype(float)
        return of(truth, rng.normal(3 * truth - 1.5, 1.5))

    scored, validation = able(400, 20), able(400, 21)
    least = fit_labels(validation, keys=KEYS, scaling="platt").acceptances
    coverage, sensitivity = [], []
    for j, key in enumerate(KEYS):
        y, _, p = known(scored, j)
        accepted = np.maximum(p, 1 - p) >= least[key].threshold
        coverage.append(accepted.mean())
        sensitivity.append((p[accepted & (y == 1)] >= 0.5).mean())
    found = trust(scored, validation).estimates
    assert 0.2 < np.mean(coverage) < 1
    assert found["coverage_at_sensitivity_90"].value == pytest.approx(np.mean(coverage))
    assert found["accepted_sensitivity_90"].value == pytest.approx(np.mean(sensitivity))


@pytest.mark.parametrize("frequency", [None, (0.2, 0.2, 0.005)])
def test_rare_findings_are_grouped_by_train_or_by_what_is_scored(frequency: Any, overconfident: Any) -> None:
    scored, validation, _ = overconfident
    found = trust(scored, validation, frequency=frequency)
    areas = [roc_auc_score(*known(scored, j)[:2]) for j in range(3)]
    assert found.estimates["auroc_head"].value == pytest.approx(np.mean(areas[:2]))
    source = "what is scored" if frequency is None else "the train split"
    assert found.estimates["auroc_head"].extra["frequency"] == found.details["label_frequency"]["from"] == source
    assert found.details["label_frequency"]["labels"]["rare"]["group"] == "tail"
    assert np.isnan(found.estimates["auroc_tail"].value)  # fewer than 10 positives


def test_subgroups_of_labels_and_the_underdiagnosed(overconfident: Any) -> None:
    scored, validation, found = overconfident
    sex = np.random.default_rng(3).choice(["F", "M", ""], 1500)
    threshold = fit_labels(validation, keys=KEYS, scaling="platt").no_finding
    assert scored.no_finding is not None and threshold is not None
    none, score = scored.no_finding
    called_well = {one: (score[(sex == one) & (none == 0)] >= threshold.value).mean() for one in "FM"}
    assert found.estimates["underdiagnosis_gap_sex"].value == pytest.approx(abs(called_well["F"] - called_well["M"]))
    gaps = []
    for j in (0, 1):
        areas = []
        for one in "FM":
            inside = (sex == one) & ~np.isnan(scored.truth[:, j])
            areas.append(roc_auc_score(scored.truth[inside, j], scored.margin[inside, j]))
        gaps.append(abs(areas[0] - areas[1]))
    assert found.estimates["auroc_gap_sex"].value == pytest.approx(np.mean(gaps))
    assert found.estimates["auroc_gap_sex"].extra["labels"] == KEYS[:2]
    group = found.details["subgroups"]["sex"]["often"]["groups"]["F"]
    inside = (sex == "F") & ~np.isnan(scored.truth[:, 0])
    assert (group["n"], group["positives"]) == (inside.sum(), scored.truth[inside, 0].sum())


def test_where_the_counts_of_one_subgroup_are_not_shown_none_are() -> None:
    scored, validation = drawn(600, 7), drawn(400, 8)
    positive = np.flatnonzero(scored.truth[:, 0] == 1)
    groups: list[str | None] = ["large"] * 600
    for k in (*positive[:4], *np.flatnonzero(scored.truth[:, 0] == 0)[:30]):
        groups[k] = "small"
    details = trust(scored, validation, groups={"site": (groups, groups)}).details["subgroups"]["site"]["often"]
    small, large = details["groups"]["small"], details["groups"]["large"]
    assert "none shown" in small["reason"]
    assert large["auroc"]["value"] > 0.5 and large["fpr"]["ci95"]
    text = json.dumps(details)
    for count in (30, 34, len(positive) - 4, (np.array(groups) == "large").sum()):
        assert f" {count}," not in text and f" {count}}}" not in text


def test_what_is_fitted_comes_from_validation_alone() -> None:
    scored, validation = drawn(500, 9), drawn(400, 10)
    before = trust(scored, validation).details
    flipped = of(1 - scored.truth, scored.margin)
    after = trust(flipped, validation).details
    other = trust(scored, of(1 - validation.truth, validation.margin)).details

    def fitted(details: Any) -> Any:
        points = {p: {k: v["threshold"] for k, v in its.items()} for p, its in details["operating_points"].items()}
        scalings = {key: its["scaling"] for key, its in details["calibration"].items()}
        return points, scalings, {key: its["threshold"] for key, its in details["selective"].items()}

    assert fitted(before) == fitted(after)
    assert all(a != b for a, b in zip(fitted(before)[:2], fitted(other)[:2], strict=True))


def test_what_was_fitted_on_is_judged_nowhere() -> None:
    """Validation is among what is scored: n says where each number is from."""
    scored = drawn(900, 11, slope=3)
    outside = np.arange(900) >= 400
    judged, validation = scored.take(outside), scored.take(~outside)
    groups = [("F", "M")[k % 2] for k in range(900)]
    whole = trust(scored, validation, judged=judged, groups={"sex": (groups, groups[400:])}).estimates
    apart = trust(judged, validation, groups={"sex": (groups[400:], groups[400:])}).estimates
    alone = trust(scored, validation, groups={"sex": (groups, groups)}).estimates
    fitted = [name for name in whole if "_scaled" in name or "sensitivity" in name or "_at_" in name or "_sex" in name]
    assert len(fitted) == 4 + 2 + 5 + 3 + 5
    for name, estimate in whole.items():
        assert estimate.n == (500 if name in fitted else 900), name
        expected = (apart if name in fitted else alone)[name]
        assert (estimate.value, *estimate.ci95) == pytest.approx((expected.value, *expected.ci95), nan_ok=True), name


@pytest.mark.parametrize(
    ("empty", "reason"),
    [("validation", "no validation"), ("judged", "nothing is scored outside of what was fitted on")],
)
def test_without_validation_or_without_anything_else_what_is_fitted_is_undefined(empty: str, reason: str) -> None:
    scored, nothing = drawn(600, 12), np.zeros(600, dtype=bool)
    groups = [("F", "M")[k % 2] for k in range(600)]
    if empty == "validation":
        found = trust(scored, scored.take(nothing), groups={"sex": (groups, groups)})
    else:
        found = trust(scored, scored, judged=scored.take(nothing), groups={"sex": (groups, [])})
    for name, estimate in found.estimates.items():
        if "_scaled" in name or "sensitivity" in name or "_at_" in name:
            assert (estimate.reason, np.isnan(estimate.value)) == (reason, True), name
    # What needs no fit is there all the same.
    assert all(found.estimates[name].n == 600 for name in ("brier", "aurc", "auroc_head", "auroc_gap_sex"))
    assert not np.isnan(found.estimates["auroc_gap_sex"].value)
    assert np.isnan(found.estimates["fpr_gap_sex"].value)
    json.dumps(found.details, allow_nan=False)


def test_an_attribute_that_is_not_known_of_what_is_scored_is_undefined() -> None:
    scored, validation = drawn(200, 13), drawn(200, 14)
    found = trust(scored, validation, groups={"sex": ([None] * 200, [None] * 200)}).estimates
    assert tuple(found) == trust_names(["sex"], no_finding=True)
    assert found["underdiagnosis_gap_sex"].reason == "sex is not known of any input"


def test_a_label_without_scores_takes_part_in_nothing() -> None:
    scored, validation = drawn(400, 15), drawn(400, 16)

    def without(items: LabelItems) -> LabelItems:
        blank = np.array([1.0, np.nan, 1.0])
        return LabelItems(items.truth * blank, items.margin * blank, items.probability * blank, items.studies)

    fits = fit_labels(without(validation), keys=KEYS, scaling="platt", reasons=[None, "not learnt", None])
    found = label_trust(
        without(scored), without(scored), fits, keys=KEYS, groups={}, frequency=None, reasons=[None, "not learnt", None]
    )
    assert found.estimates["ece"].extra["labels"] == ["often"]
    assert found.details["calibration"]["sometimes"]["ece"]["reason"] == "not learnt"
    assert found.details["operating_points"]["youden"]["sometimes"]["f1"]["reason"] == "not learnt"


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        *(("brier", True), ("brier_scaled", True), ("ece_equal_mass_scaled", True), ("excess_aurc", True)),
        *(("auroc_gap_sex", True), ("equalized_odds_difference_view", True), ("underdiagnosis_gap_sex", True)),
        *(("brier_skill", False), ("brier_skill_scaled", False), ("auroc", False), ("auroc_head", False)),
        *(("coverage_at_sensitivity_90", False), ("average_precision", False), ("f1_at_youden", False)),
    ],
)
def test_directions(name: str, lower: bool) -> None:
    assert is_lower_better(name) is lower

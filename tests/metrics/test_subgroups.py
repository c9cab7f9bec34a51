import json

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from medvlm_harness.metrics.auroc_interval import auroc_interval
from medvlm_harness.metrics.bootstrap import percentile_interval, study_weights
from medvlm_harness.metrics.subgroups import GAPS, label_subgroup_estimates, subgroup_estimates, underdiagnosis

RNG = np.random.default_rng(7)
Floats = NDArray[np.float64]


def drawn(n: int, groups: tuple[str | None, ...] = ("AP", "PA"), *, harm: float = 0.0) -> tuple[Floats, Floats, list]:
    """Truth, scores and groups; in the first group scores are shifted up by `harm`."""
    y = (RNG.random(n) < 0.4).astype(float)
    group = [groups[k] for k in RNG.integers(len(groups), size=n)]
    return y, RNG.normal(1.5 * y) + harm * np.array([one == groups[0] for one in group]), group


def rates(y: Floats, s: Floats, inside: NDArray[np.bool_], threshold: float) -> tuple[float, float, float]:
    """AUROC, FPR and FNR by hand."""
    y, s = y[inside], s[inside]
    return float(roc_auc_score(y, s)), float((s[y == 0] >= threshold).mean()), float((s[y == 1] < threshold).mean())


def test_rates_and_gaps_equal_those_computed_by_hand() -> None:
    y, s, groups = drawn(400, ("AP", "PA", "lateral", None), harm=0.5)
    y[:20] = np.nan
    found = subgroup_estimates(y, s, groups, np.arange(400), threshold=0.7, resamples=30)
    known = ~np.isnan(y)
    by_hand = {name: rates(y, s, known & (np.array(groups) == name), 0.7) for name in ("AP", "PA", "lateral")}
    assert [one.name for one in found.groups] == ["AP", "PA", "lateral"]
    for one in found.groups:
        assert (one.auroc.value, one.fpr.value, one.fnr.value) == pytest.approx(by_hand[one.name])
        inside = known & (np.array(groups) == one.name)
        assert (one.n, one.positives, one.negatives) == (inside.sum(), y[inside].sum(), (y[inside] == 0).sum())
        assert one.auroc.ci95 == pytest.approx(auroc_interval(y[inside], s[inside])[2:])
    columns = np.array(list(by_hand.values()))
    spread = columns.max(axis=0) - columns.min(axis=0)
    assert tuple(found.gaps) == GAPS
    assert [found.gaps[name].value for name in GAPS[:3]] == pytest.approx(spread)
    assert found.gaps["equalized_odds_difference"].value == pytest.approx(max(spread[1:]))
    assert found.gaps["fpr_gap"].extra["between"][0] == list(by_hand)[int(columns[:, 1].argmax())]


@pytest.mark.parametrize("harm", [0.0, 1.0])
def test_the_equalised_odds_difference_equals_fairlearns(harm: float) -> None:
    fairlearn = pytest.importorskip("fairlearn.metrics", reason="the oracle needs the PyPI package fairlearn")
    y, s, groups = drawn(600, ("AP", "PA", "lateral"), harm=harm)
    theirs = fairlearn.equalized_odds_difference(y, (s >= 0.7).astype(int), sensitive_features=groups)
    found = subgroup_estimates(y, s, groups, np.arange(600), threshold=0.7, resamples=20)
    assert found.gaps["equalized_odds_difference"].value == pytest.approx(theirs)


def test_intervals_are_those_of_resampled_studies_and_gaps_are_paired() -> None:
    y, s, groups = drawn(300)
    studies = np.arange(300) // 3
    found = subgroup_estimates(y, s, groups, studies, threshold=0.7, resamples=50)
    is_ap = np.array(groups) == "AP"
    values = []
    for times in study_weights(studies, resamples=50).astype(int):
        again = [np.repeat(one, times) for one in (y, s, is_ap)]
        values.append([rates(again[0], again[1], again[2] == ap, 0.7) for ap in (True, False)])
    sampled = np.array(values)
    assert found.groups[0].fpr.ci95 == pytest.approx(percentile_interval(sampled[:, 0, 1])[:2])
    for k, name in enumerate(GAPS[:3]):
        sign = 1 if found.gaps[name].extra["between"][0] == "AP" else -1
        by_hand = percentile_interval(sign * (sampled[:, 0, k] - sampled[:, 1, k]))[:2]
        assert found.gaps[name].ci95 == pytest.approx(by_hand)


def test_a_subgroup_that_is_over_called_shows_and_one_that_is_not_does_not() -> None:
    unfair = subgroup_estimates(*_with_studies(*drawn(800, harm=1.0)), threshold=0.7, resamples=200)
    assert unfair.gaps["fpr_gap"].extra["between"] == ["AP", "PA"]
    assert unfair.gaps["fpr_gap"].ci95[0] > 0.1 and unfair.gaps["fnr_gap"].ci95[0] > 0
    assert unfair.gaps["auroc_gap"].ci95[0] < 0  # the shift is the same for all of AP: the order in it is as good
    touched = 0
    for _ in range(40):
        fair = subgroup_estimates(*_with_studies(*drawn(400)), threshold=0.7, resamples=100)
        touched += fair.gaps["fpr_gap"].ci95[0] <= 0
    assert touched >= 33  # of 40; both sides count, since the higher of the two comes first: 95% in the long run


def _with_studies(y: Floats, s: Floats, groups: list) -> tuple[Floats, Floats, list, NDArray[np.int64]]:
    return y, s, groups, np.arange(len(y))


def test_too_few_are_insufficient_and_small_counts_are_not_shown() -> None:
    y = np.concatenate([np.repeat([1.0, 0.0], [positives, 30]) for positives in (20, 19, 9, 0)])
    groups = ["enough"] * 50 + ["few"] * 49 + ["small"] * 39 + ["none"] * 30
    found = subgroup_estimates(y, RNG.random(len(y)), groups, np.arange(len(y)), threshold=0.5, resamples=20)
    enough, few, none, small = found.groups
    assert not np.isnan(enough.auroc.value)
    for one in (few, none, small):
        assert all(np.isnan(rate.value) and "insufficient" in (rate.reason or "") for rate in (one.auroc, one.fnr))
    assert (few.n, few.positives, few.negatives) == (49, 19, 30)
    assert (none.n, none.positives) == (30, 0)
    assert (small.n, small.positives, small.negatives) == (None, None, None)
    shown = json.dumps([small.name, small.auroc.to_dict(), small.fpr.to_dict(), small.fnr.to_dict()])
    assert "39" not in shown and "9" not in shown.replace("95", "") and "30" not in shown
    assert "1 subgroup(s)" in (found.gaps["auroc_gap"].reason or "") and np.isnan(found.gaps["auroc_gap"].value)


def test_a_subgroup_without_false_alarms_is_not_certain() -> None:
    y = np.repeat([1.0, 0.0], [40, 40])
    found = subgroup_estimates(y, y, ["a", "b"] * 40, np.arange(80), threshold=0.5, resamples=20)
    assert found.groups[0].fpr.value == 0 and found.groups[0].fpr.ci95[1] == pytest.approx(
        1.96**2 / (20 + 1.96**2), abs=1e-4
    )


def test_labels_are_those_by_themselves_and_means_are_over_those_that_have_the_gap() -> None:
    y, s, groups = drawn(400, harm=0.5)
    rare = np.where(np.arange(400) < 25, 1.0, 0.0)  # in one subgroup or both too few
    truth, score = np.stack([y, 1 - y, rare, y], axis=1), np.stack([s, -s, s, s], axis=1)
    found = label_subgroup_estimates(
        truth,
        score,
        groups,
        np.arange(400),
        keys=["a", "b", "rare", "apart"],
        thresholds=[0.7, np.nan, 0.7, 0.2],
        reasons=[None, "validation has 3 positives", None, None],
        averaged=["a", "b", "rare"],
        resamples=30,
    )
    for key, place, threshold in (("a", 0, 0.7), ("rare", 2, 0.7), ("apart", 3, 0.2)):
        alone = subgroup_estimates(
            truth[:, place], score[:, place], groups, np.arange(400), threshold=threshold, resamples=30
        )
        assert [vars(one)["auroc"].to_dict() for one in found.labels[key].groups] == [
            one.auroc.to_dict() for one in alone.groups
        ]
        assert {k: v.to_dict() for k, v in found.labels[key].gaps.items()} == {
            k: v.to_dict() for k, v in alone.gaps.items()
        }
    a, b = found.labels["a"].gaps, found.labels["b"].gaps
    assert found.gaps["auroc_gap"].value == pytest.approx((a["auroc_gap"].value + b["auroc_gap"].value) / 2)
    assert found.gaps["auroc_gap"].extra["labels"] == ["a", "b"]
    # Without a threshold a label has an order, and no rates.
    assert np.isnan(b["fpr_gap"].value) and b["fpr_gap"].reason == "validation has 3 positives"
    assert found.gaps["fpr_gap"].value == pytest.approx(a["fpr_gap"].value)
    assert found.gaps["fpr_gap"].extra["labels"] == ["a"]


def test_without_a_label_that_has_two_subgroups_the_mean_is_undefined() -> None:
    y, s, _ = drawn(60)
    found = label_subgroup_estimates(
        y[:, None], s[:, None], ["AP"] * 60, np.arange(60), keys=["a"], thresholds=[0.7], resamples=5
    )
    assert all(np.isnan(one.value) and "no label has two" in str(one.reason) for one in found.gaps.values())


def test_underdiagnosis_is_the_false_positive_rate_of_no_finding() -> None:
    no_finding, s, groups = drawn(400, ("female", "male"), harm=1.0)
    found = underdiagnosis(no_finding, s, groups, np.arange(400), threshold=0.7, resamples=50)
    assert list(found) == ["underdiagnosis_female", "underdiagnosis_male", "underdiagnosis_gap"]
    sick = (no_finding == 0) & (np.array(groups) == "female")
    called_well = float((s[sick] >= 0.7).mean())
    assert found["underdiagnosis_female"].value == pytest.approx(called_well)
    assert found["underdiagnosis_gap"].value == pytest.approx(called_well - found["underdiagnosis_male"].value)


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="a subgroup or None for each of 2 items, but got 1"):
        subgroup_estimates([0, 1], [0.1, 0.2], ["a"], [1, 2], threshold=0.5)
    with pytest.raises(ValueError, match="all are None"):
        subgroup_estimates([0, 1], [0.1, 0.2], [None, None], [1, 2], threshold=0.5)
    with pytest.raises(ValueError, match="got NaN for a labelled item"):
        subgroup_estimates([0, 1], [0.1, np.nan], ["a", "b"], [1, 2], threshold=0.5)
    with pytest.raises(ValueError, match="Expected a threshold"):
        subgroup_estimates([0, 1], [0.1, 0.2], ["a", "b"], [1, 2], threshold=np.nan)

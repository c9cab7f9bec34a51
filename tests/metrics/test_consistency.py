from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata, spearmanr

from medvlm_harness.metrics.bootstrap import study_weights
from medvlm_harness.metrics.consistency import (
    QUADRANTS,
    consistency_estimates,
    consistency_names,
    decide,
    score_change_estimates,
    score_change_names,
)

Decisions = dict[str, NDArray[np.int64]]
NAMES = ("clean", "blur", "noise", "crop", "other", "blank")
SUBSTITUTES = ("other", "blank")


def drawn(n: int = 80, labels: int = 3, *, unknown: float = 0.0) -> Decisions:
    """Decisions that differ from clean more from condition to condition, some of them unknown."""
    rng = np.random.default_rng(4)
    clean = (rng.random((n, labels)) < (0.1, 0.4, 0.6)[:labels]).astype(int)
    table = {name: np.where(rng.random(clean.shape) < 0.1 * k, 1 - clean, clean) for k, name in enumerate(NAMES)}
    return {name: np.where(rng.random(clean.shape) < unknown, -1, one) for name, one in table.items()}


def shares_by_hand(table: Decisions, rows: list[int]) -> dict[str, float]:
    """Plain loops over labels and items, which may repeat."""
    variants = [name for name in table if name not in ("clean", *SUBSTITUTES)]
    of_label: dict[str, list[float]] = {}
    for j in range(table["clean"].shape[1]):
        hits: dict[str, list[float]] = {}
        for i in rows:
            at = {name: int(one[i, j]) for name, one in table.items()}
            for name in table:
                if name != "clean" and at["clean"] >= 0 and at[name] >= 0:
                    kind = "reliance" if name in SUBSTITUTES else "flip_rate"
                    hits.setdefault(f"{kind}_{name}", []).append(at[name] != at["clean"])
            answers = [at[name] for name in ("clean", *variants)]
            if min(answers) < 0:
                continue
            hits.setdefault("flip_rate_any", []).append(len(set(answers)) > 1)
            hits.setdefault("pairwise_consistency", []).append(
                float(np.mean([a == b for a, b in combinations(answers, 2)]))
            )
            if at["other"] >= 0:
                steady = "consistent" if len(set(answers)) == 1 else "inconsistent"
                found = f"{steady}_{'reliant' if at['other'] != at['clean'] else 'unreliant'}"
                for quadrant in QUADRANTS:
                    hits.setdefault(quadrant, []).append(quadrant == found)
        for name, its in hits.items():
            of_label.setdefault(name, []).append(float(np.mean(its)))
    shares = {name: float(np.mean(its)) for name, its in of_label.items()}
    shares["flip_rate"] = float(np.mean([shares[f"flip_rate_{one}"] for one in variants]))
    return shares


@pytest.mark.parametrize("unknown", [0.0, 0.1])
def test_equals_an_independent_computation_on_every_resample(unknown: float) -> None:
    table, studies = drawn(unknown=unknown), np.arange(80) // 2
    found = consistency_estimates(table, studies, keys=["a", "b", "c"], substitutes=SUBSTITUTES, resamples=30, seed=2)
    assert tuple(found) == consistency_names(("blur", "noise", "crop"), SUBSTITUTES)
    drawings = [np.ones(80), *study_weights(studies, resamples=30, seed=2)]
    by_hand = [shares_by_hand(table, np.repeat(np.arange(80), times.astype(int)).tolist()) for times in drawings]
    for name, estimate in found.items():
        value, *samples = (one[name] for one in by_hand)
        assert estimate.value == pytest.approx(value, abs=1e-12)
        assert estimate.ci95 == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])), abs=1e-12)


def test_by_hand() -> None:
    """Four images of one label: steady; flips; flips and reliant; reliant."""
    table = {"clean": [[1], [1], [0], [0]], "blur": [[1], [0], [1], [0]], "noise": [[1], [0], [0], [0]]}
    table |= {"other": [[1], [1], [1], [1]]}
    found = consistency_estimates(table, range(4), keys=["a"], substitutes=["other"], resamples=50)
    expected = {
        "flip_rate_blur": 0.5,
        "flip_rate_noise": 0.25,
        "flip_rate": 0.375,
        "flip_rate_any": 0.5,
        "pairwise_consistency": (1 + 1 / 3 + 1 / 3 + 1) / 4,
        "reliance_other": 0.5,
        **dict.fromkeys(QUADRANTS, 0.25),
    }
    assert {name: one.value for name, one in found.items()} == pytest.approx(expected)
    assert (found["reliance_other"].floor, found["reliance_other"].ceiling) == (0, 0.5)
    assert (found["consistent_unreliant"].floor, found["consistent_unreliant"].ceiling) == (1, 0.5)


def test_quadrants_sum_to_one() -> None:
    found = consistency_estimates(drawn(unknown=0.1), range(80), keys="abc", substitutes=SUBSTITUTES, resamples=20)
    assert sum(found[name].value for name in QUADRANTS) == pytest.approx(1)


def test_answers_that_do_not_depend_on_the_image_are_all_consistent_and_unreliant() -> None:
    prior = np.tile([0, 1, 0], (60, 1))
    prior[::3, 2] = 1  # a text-only answer: from study to study different, from image to image the same
    studies = np.arange(60) // 2
    found = consistency_estimates(dict.fromkeys(NAMES, prior), studies, keys="abc", substitutes=SUBSTITUTES)
    assert [found[name].value for name in QUADRANTS] == [0, 1, 0, 0]
    none, every = (tuple(binomtest(k, 30).proportion_ci(method="wilson")) for k in (0, 30))  # of 30 studies
    assert found["consistent_unreliant"].ci95 == pytest.approx(every)
    assert found["reliance_other"].value == 0
    for name in ("consistent_reliant", "reliance_other", "flip_rate_any", "flip_rate"):
        assert found[name].ci95 == pytest.approx(none)


def test_independent_images_change_as_much_as_the_ceiling_says() -> None:
    rng, rates = np.random.default_rng(0), (0.05, 0.3, 0.5)
    clean, other = ((rng.random((4000, 3)) < rates).astype(int) for _ in range(2))
    table = {"clean": clean, "blur": clean, "other": other}
    found = consistency_estimates(table, range(4000), keys="abc", substitutes=["other"], resamples=100)
    expected = float(np.mean([2 * p * (1 - p) for p in rates]))
    assert found["reliance_other"].ceiling == pytest.approx(expected, abs=0.01)
    assert found["reliance_other"].value == pytest.approx(expected, abs=0.015)
    # Of a model that looks at nothing but the image, most decisions are "unreliant" all the same.
    assert found["consistent_unreliant"].value == pytest.approx(found["consistent_unreliant"].ceiling, abs=0.02)


def test_any_of_the_gates_makes_a_decision_reliant() -> None:
    table = {"clean": [[0], [0], [0]], "blur": [[0], [0], [0]], "other": [[1], [0], [0]], "blank": [[0], [1], [0]]}
    both, one = (
        consistency_estimates(table, range(3), keys="a", substitutes=SUBSTITUTES, gates=gates, resamples=10)
        for gates in (SUBSTITUTES, ("other",))
    )
    assert both["consistent_reliant"].value == pytest.approx(2 / 3)
    assert one["consistent_reliant"].value == pytest.approx(1 / 3)


def test_a_label_without_threshold_counts_nowhere() -> None:
    table = drawn(labels=2)
    thresholds = [0.5, float("nan"), 0.5]
    with_unknown = {name: decide(np.insert(one, 1, 1, axis=1), thresholds) for name, one in table.items()}
    found = consistency_estimates(with_unknown, range(80), keys="axb", substitutes=SUBSTITUTES, resamples=20)
    expected = consistency_estimates(table, range(80), keys="ab", substitutes=SUBSTITUTES, resamples=20)
    assert {name: one.value for name, one in found.items()} == {name: one.value for name, one in expected.items()}
    assert found["reliance_other"].ceiling == expected["reliance_other"].ceiling
    assert found["flip_rate"].extra["labels"] == ["a", "b"]
    nothing = consistency_estimates(dict.fromkeys(NAMES, -np.ones((80, 1))), range(80), keys="a", resamples=5)
    assert {np.isnan(one.value) and one.reason for one in nothing.values()} == {
        "no decision is known under all conditions that are compared"
    }


def test_without_substitutes_there_are_flips_alone_and_without_items_nothing_is_defined() -> None:
    table = {name: one for name, one in drawn().items() if name not in SUBSTITUTES}
    found = consistency_estimates(table, range(80), keys="abc", resamples=5)
    assert tuple(found) == consistency_names(("blur", "noise", "crop"))
    empty = consistency_estimates(dict.fromkeys(NAMES, np.empty((0, 1))), [], keys="a", substitutes=SUBSTITUTES)
    assert {one.reason for one in empty.values()} == {"no item"} and len(empty) == 5 + 2 + 2 + 4 - 1


def test_score_changes_equal_scipys_and_their_resamples_the_correlation_of_ranks() -> None:
    rng, studies = np.random.default_rng(1), np.arange(60) // 2
    clean = np.round(rng.normal(size=(60, 2)), 1)  # with ties
    scores = {"clean": clean, "blur": np.round(clean + rng.normal(size=(60, 2)), 1), "blank": np.zeros((60, 2))}
    found = score_change_estimates(scores, studies, keys="ab", resamples=25)
    changes, correlations = [], []
    for times in study_weights(studies, resamples=25):
        items = np.repeat(np.arange(60), times.astype(int))
        changes.append(float(np.abs(scores["blur"] - clean)[items].mean()))
        pairs = [(rankdata(clean[:, j])[items], rankdata(scores["blur"][:, j])[items]) for j in range(2)]
        correlations.append(float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])))
    values = {
        "score_change_blur": float(np.abs(scores["blur"] - clean).mean()),
        "rank_correlation_blur": float(np.mean([spearmanr(clean[:, j], scores["blur"][:, j])[0] for j in range(2)])),
    }
    for (name, value), samples in zip(values.items(), (changes, correlations), strict=True):
        assert found[name].value == pytest.approx(value, abs=1e-12)
        assert found[name].ci95 == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])), abs=1e-12)
    assert np.isnan(found["rank_correlation_blank"].value)
    assert found["rank_correlation_blank"].reason == "each label's scores are all equal"
    assert found["score_change_blank"].value == pytest.approx(np.abs(clean).mean())


def test_a_rank_correlation_lies_within_its_interval() -> None:
    """Ranked anew in each resample, ties of repeated items put the interval below the value."""
    rng = np.random.default_rng(3)
    clean = rng.normal(size=(300, 4))
    near = {"clean": clean, "blur": clean + 0.05 * rng.normal(size=clean.shape)}
    found = score_change_estimates(near, range(300), keys="abcd")["rank_correlation_blur"]
    low, high = found.ci95
    assert tuple(score_change_estimates(near, range(300), keys="abcd", resamples=5)) == score_change_names(["blur"])
    assert 0.3 < (found.value - low) / (high - low) < 0.7


def test_equal_scores_do_not_move() -> None:
    scores = np.random.default_rng(2).random((40, 2))
    found = score_change_estimates({"clean": scores, "blur": scores.copy()}, range(40), keys="ab", resamples=20)
    assert (found["score_change_blur"].value, found["score_change_blur"].ci95) == (0, (0, 0))
    assert found["rank_correlation_blur"].ci95 == pytest.approx((1, 1))


def test_wrong_input_says_what_was_expected() -> None:
    table = drawn()
    with pytest.raises(ValueError, match="clean first"):
        consistency_estimates({"blur": table["blur"], "clean": table["clean"]}, range(80), keys="abc")
    with pytest.raises(ValueError, match="1, 0 or -1"):
        consistency_estimates({**table, "blur": table["blur"] + 2}, range(80), keys="abc")
    with pytest.raises(ValueError, match="Expected gates among the substitutes"):
        consistency_estimates(table, range(80), keys="abc", substitutes=["blank"])
    with pytest.raises(ValueError, match="Expected a variant"):
        consistency_estimates({k: table[k] for k in ("clean", "other")}, range(80), keys="abc", substitutes=["other"])
    with pytest.raises(ValueError, match=r"\(n, labels\) = \(80, 2\)"):
        consistency_estimates(table, range(80), keys="ab")
    with pytest.raises(ValueError, match="no variant that is called any"):
        consistency_estimates({"clean": table["clean"], "any": table["blur"]}, range(80), keys="abc")
    with pytest.raises(ValueError, match="finite"):
        score_change_estimates({"clean": [[0.1]], "blur": [[np.nan]]}, [1], keys="a")

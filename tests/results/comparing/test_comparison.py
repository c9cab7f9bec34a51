from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.bootstrap import study_weights
from medvlm_harness.metrics.calibration import expected_calibration_error
from medvlm_harness.metrics.retrieval import rank_queries, recall_at, reciprocal_rank
from medvlm_harness.metrics.robustness import Conditions, Measure, robustness_estimates
from medvlm_harness.results.comparing.comparison import compare_runs, comparison_table
from medvlm_harness.results.run_files import RunFiles, read_run
from medvlm_harness.results.scores import write_scores
from medvlm_harness.tracks.zero_shot_metrics import macro_auroc

DATE = "2026-01-02T03-04-05.000006"
LABELS = ("Edema", "Fracture", "Rare")
STUDIES = [f"s{k // 2:03d}" for k in range(240)]  # two images each
RNG = np.random.default_rng(3)
TRUTH = np.stack([RNG.random(240) < 0.35, RNG.random(240) < 0.12, np.arange(240) < 4], axis=1).astype(float)
TRUTH[5, 0] = np.nan
GOOD = np.nan_to_num(TRUTH) + RNG.standard_normal(TRUTH.shape)
POOR = 0.5 * np.nan_to_num(TRUTH) + RNG.standard_normal(TRUTH.shape)
Array = np.ndarray[Any, np.dtype[Any]]


def label_rows(margin: Array, truth: Array = TRUTH, labels: Sequence[str] = LABELS) -> list[dict[str, Any]]:
    return [
        {
            "study": study,
            "image": f"{k}.png",
            "label": label,
            "target": None if np.isnan(truth[k, j]) else int(truth[k, j]),
            "margin": margin[k, j],
            "probability": 1 / (1 + np.exp(-margin[k, j])),
        }
        for k, study in enumerate(STUDIES)
        for j, label in enumerate(labels)
    ]


def value_rows(label: str, values: Sequence[float | None], answers: Sequence[str | None] = ()) -> list[dict[str, Any]]:
    said = answers or [None] * len(values)
    return [
        {"study": f"s{k:03d}", "label": label, "value": value, "answer": answer}
        for k, (value, answer) in enumerate(zip(values, said, strict=True))
    ]


def compared(first: RunFiles, other: RunFiles, **options: Any) -> Any:
    """The block of the one task of both."""
    block = compare_runs({"a": first, "b": other}, reference="a", **{"resamples": 40, **options})
    json.dumps(block, allow_nan=False)
    return block["tasks"]["t"]


def by_hand(
    score: Callable[[Array, Array, Array], float], margins: Array, columns: Sequence[int], weights: Array
) -> float:
    found = []
    for j in columns:
        known = ~np.isnan(TRUTH[:, j])
        found.append(score(TRUTH[known, j], margins[known, j], weights[known]))
    return float(np.mean(found))


def test_differences_of_labels_are_of_the_same_resamples(make: Callable[..., RunFiles]) -> None:
    found = compared(make("one", label_rows(GOOD)), make("two", label_rows(POOR)[::-1]), seed=4)["metrics"]
    weights = np.vstack([np.ones(240), study_weights(STUDIES, resamples=40, seed=4)])
    measures = {  # columns: macros take labels with enough support
        "auroc": ((0, 1), lambda y, s, w: roc_auc_score(y, s, sample_weight=w)),
        "average_precision": ((0, 1), lambda y, s, w: average_precision_score(y, s, sample_weight=w)),
        "brier": ((0,), lambda y, s, w: brier_score_loss(y, 1 / (1 + np.exp(-s)), sample_weight=w)),
    }
    for metric, (columns, score) in measures.items():
        value, *samples = [by_hand(score, POOR, columns, w) - by_hand(score, GOOD, columns, w) for w in weights]
        difference = found[metric]["differences"]["b"]
        assert difference["value"] == pytest.approx(value, abs=1e-12)
        assert difference["ci95"] == pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=1e-12)
        levels = found[metric]["runs"]
        assert levels["b"]["value"] - levels["a"]["value"] == pytest.approx(value, abs=1e-12)
    known = ~np.isnan(TRUTH[:, 0])
    eces = [expected_calibration_error(TRUTH[known, 0], 1 / (1 + np.exp(-m[known, 0]))) for m in (GOOD, POOR)]
    assert found["ece"]["differences"]["b"]["value"] == pytest.approx(eces[1] - eces[0], abs=1e-12)
    assert found["auroc"]["runs"]["a"]["extra"]["labels"] == ["Edema", "Fracture"]
    assert found["auroc"]["runs"]["a"]["extra"]["labels_calibrated"] == ["Edema"]


def test_pairing_narrows_the_interval_of_runs_that_rise_and_fall_together(make: Callable[..., RunFiles]) -> None:
    alike = GOOD + 0.1 * RNG.standard_normal(GOOD.shape)
    metric = compared(make("one", label_rows(GOOD)), make("two", label_rows(alike)), resamples=200)["metrics"]["auroc"]
    apart = np.hypot(*(run["stderr"] for run in metric["runs"].values()))
    assert metric["differences"]["b"]["stderr"] < 0.3 * apart


def test_a_run_does_not_differ_from_itself(make: Callable[..., RunFiles]) -> None:
    task = compared(make("one", label_rows(GOOD)), make("two", label_rows(GOOD)))
    for metric in task["metrics"].values():
        assert [metric["differences"]["b"][key] for key in ("value", "ci95")] == [0, [0, 0]]
    agreement = task["agreement"]["b"]
    assert (agreement["flip_rate"]["value"], agreement["score_change"]["value"]) == (0, 0)
    assert agreement["flip_rate"]["ci95"][1] > 0  # none seen is not none at all
    assert agreement["rank_correlation"]["value"] == pytest.approx(1, abs=1e-12)


def test_the_interval_of_a_difference_covers_it_under_the_null() -> None:
    """Two noisy readings of one score, on fresh studies each time: neither is better."""
    from medvlm_harness.results.comparing.paired_scores import pair_scores
    from medvlm_harness.results.score_table import ScoreTable

    rng, covered, repeats, n = np.random.default_rng(11), 0, 200, 100
    for _ in range(repeats):
        truth = (rng.random((n, 1)) < 0.3).astype(float)
        score = truth + rng.standard_normal((n, 1))
        nothing = np.full((n, 1), np.nan)
        tables = {}
        for name in ("a", "b"):
            margin = score + 0.5 * rng.standard_normal((n, 1))
            ids = [(f"{k:03d}", "") for k in range(n)]
            answers = np.full((n, 1), None, dtype=object)
            tables[name] = ScoreTable(ids, ["x"], truth, margin, nothing, nothing, nothing, nothing, answers)
        details: dict[str, Any] = {name: {"metrics": {}} for name in tables}
        found = pair_scores(tables, details, reference="a", resamples=100).differences["auroc"]["b"]
        covered += found.ci95[0] <= 0 <= found.ci95[1]
    assert 0.90 <= covered / repeats <= 0.99  # 95%, and three standard errors of 200 repeats


THRESHOLDS = {"edema": 0.5, "fracture": 1.0, "rare": None}


def fitted(shift: float = 0.0) -> dict[str, Any]:
    values = {key: None if one is None else one + shift for key, one in THRESHOLDS.items()}
    return {"operating_points": {"youden": {key: {"threshold": {"value": one}} for key, one in values.items()}}}


def test_flips_are_at_the_references_thresholds_and_at_refitted_ones(make: Callable[..., RunFiles]) -> None:
    shifted = compared(make("one", label_rows(GOOD), **fitted()), make("two", label_rows(GOOD + 0.3), **fitted(0.3)))
    flips = shifted["agreement"]["b"]
    kept = [np.mean((GOOD[:, j] >= cut) != (GOOD[:, j] + 0.3 >= cut)) for j, cut in enumerate((0.5, 1.0))]
    assert flips["flip_rate"]["value"] == pytest.approx(np.mean(kept))
    assert flips["flip_rate"]["extra"]["labels"] == ["Edema", "Fracture"]
    assert flips["flip_rate_refitted"]["value"] == pytest.approx(0, abs=1e-2)  # a last digit of a threshold
    assert flips["flip_rate"]["extra"]["by"] == "the reference's thresholds"


def test_without_thresholds_flips_are_at_one_half(make: Callable[..., RunFiles]) -> None:
    flips = compared(make("one", label_rows(GOOD)), make("two", label_rows(POOR)))["agreement"]["b"]
    assert flips["flip_rate"]["value"] == pytest.approx(np.mean((GOOD >= 0) != (POOR >= 0)))
    assert flips["flip_rate"]["extra"]["by"].startswith("probability 0.5")
    assert flips["rank_correlation"]["value"] == pytest.approx(
        np.mean([spearmanr(GOOD[:, j], POOR[:, j]).statistic for j in range(3)])
    )


def test_searches_give_the_recall_that_their_vectors_have(make: Callable[..., RunFiles]) -> None:
    rng, n = np.random.default_rng(2), 40
    reports = np.repeat(rng.standard_normal((n // 2, 8)), 2, axis=0).astype(np.float32)  # pairs that tie
    runs, ranked = [], []
    for k in range(2):
        images = (reports + 2 * rng.standard_normal((n, 8))).astype(np.float32)
        ranked.append(rank_queries(images, reports, np.arange(n), np.arange(n)))
        rank = ranked[k].greater + (ranked[k].tied + 1) / 2
        rows = [
            {"study": f"s{i:03d}", "label": "i2t", "rank": rank[i], "tied": int(ranked[k].tied[i])} for i in range(n)
        ]
        runs.append(make(f"run{k}", [*rows, {"study": "s999", "label": "i2t"}]))  # one without a counterpart
    task = compared(*runs)
    for metric, per_query in (
        ("i2t_recall@5", lambda one: recall_at(one, 5)),
        ("i2t_mrr", reciprocal_rank),
    ):
        values = [per_query(one).mean() for one in ranked]
        assert task["metrics"][metric]["differences"]["b"]["value"] == pytest.approx(values[1] - values[0])
    assert task["primary"] == ["i2t_recall@10"]
    ranks = [one.greater + (one.tied + 1) / 2 for one in ranked]
    assert task["metrics"]["i2t_median_rank"]["runs"]["a"]["value"] == np.median(ranks[0])
    agreement = task["agreement"]["b"]
    assert agreement["flip_rate@5"]["value"] == pytest.approx(np.mean((ranks[0] <= 5) != (ranks[1] <= 5)))
    assert agreement["rank_correlation"]["value"] == pytest.approx(spearmanr(*ranks).statistic)


def test_ranks_without_ties_give_no_recall_and_say_why(make: Callable[..., RunFiles]) -> None:
    runs = [make(name, [{"study": f"{k}", "label": "i2t", "rank": k + 1.5} for k in range(20)]) for name in ("x", "y")]
    found = compared(*runs)["metrics"]["i2t_recall@10"]
    assert found["runs"]["a"]["value"] is None
    assert "do not hold ties" in found["differences"]["b"]["reason"]


def test_options_are_compared_by_their_answers(make: Callable[..., RunFiles]) -> None:
    rng = np.random.default_rng(8)
    truth = np.eye(2)[rng.integers(0, 2, 240)]
    runs = []
    for k in range(2):
        margin = 2 * truth[:, :1] - 1 + rng.standard_normal((240, 1)) * (1 + k)
        runs.append(np.hstack([margin, -margin]))
    metrics = {"balanced_accuracy": None}
    files = [make(f"run{k}", label_rows(one, truth, ("front", "side")), metrics=metrics) for k, one in enumerate(runs)]
    task = compared(*files)
    answers = [one.argmax(axis=1) for one in runs]
    recall = [np.mean([(a == c)[truth[:, c] == 1].mean() for c in (0, 1)]) for a in answers]
    assert task["kind"] == "options"
    assert task["metrics"]["balanced_accuracy"]["differences"]["b"]["value"] == pytest.approx(recall[1] - recall[0])
    right = [truth[np.arange(240), a] for a in answers]
    assert task["metrics"]["accuracy"]["runs"]["a"]["value"] == pytest.approx(right[0].mean())
    stated = 1 / (1 + np.exp(-runs[0].max(axis=1)))
    assert task["metrics"]["ece"]["runs"]["a"]["value"] == pytest.approx(expected_calibration_error(right[0], stated))
    assert task["agreement"]["b"]["flip_rate"]["value"] == pytest.approx(np.mean(answers[0] != answers[1]))


def test_texts_are_compared_study_by_study(make: Callable[..., RunFiles]) -> None:
    values = np.random.default_rng(1).random((2, 30))
    values[1, :10] = values[0, :10]
    said = [[f"{k}" for k in range(30)], [f"{k}" if k < 10 else f"other {k}" for k in range(30)]]
    files = [
        make(name, [*value_rows("rouge1", one), *value_rows("rougeL", [None, *one[1:]], text)],
             metrics={"rougeL": float(one[1:].mean()), "rouge1": 0.9})
        for name, one, text in zip(("one", "two"), values.tolist() and list(values), said, strict=True)
    ]  # fmt: skip
    task = compared(*files)
    assert task["primary"] == ["rougeL"]
    difference = task["metrics"]["rougeL"]["differences"]["b"]
    assert difference["value"] == pytest.approx((values[1] - values[0])[1:].mean())
    weights = study_weights([f"s{k:03d}" for k in range(30)], resamples=40)[:, 1:]
    sampled = (weights @ (values[1] - values[0])[1:]) / weights.sum(axis=1)
    assert difference["ci95"] == pytest.approx(np.quantile(sampled, [0.025, 0.975]))
    assert task["agreement"]["b"]["flip_rate"]["value"] == pytest.approx(20 / 30)
    assert task["metrics"]["rougeL"]["runs"]["a"]["reported"] is None
    assert task["metrics"]["rouge1"]["runs"]["a"]["reported"] == 0.9  # the run itself said another value


def test_whether_texts_changed_is_unknown_where_files_do_not_tell(make: Callable[..., RunFiles]) -> None:
    files = [make(name, value_rows("acc", [0.0, 1.0] * 9), metrics={"acc": 0.5}) for name in ("one", "two")]
    flips = compared(*files)["agreement"]["b"]["flip_rate"]
    assert (flips["value"], flips["reason"]) == (None, "no answer is known of both")


def test_robustness_is_that_of_the_task_and_differences_are_paired(make: Callable[..., RunFiles]) -> None:
    conditions = Conditions({"blur": ["blur_1", "blur_5"]}, others=["other_image"])
    files, reported = [], []
    for k, strength in enumerate((3.0, 2.0)):
        margins = {
            name: strength * np.nan_to_num(TRUTH) * fade + RNG.standard_normal(TRUTH.shape)
            for name, fade in zip(conditions.names, (1.0, 0.8, 0.4, 0.0), strict=True)
        }
        found = robustness_estimates(
            {name: macro_auroc(TRUTH, one, [[0, 1]]) for name, one in margins.items()},
            STUDIES, [Measure("auroc", floor=0.5, least_clean=0.55)], conditions, resamples=40,
        )  # fmt: skip
        reported.append(found)
        rows = [
            {**row, "label": row["label"] if name == "clean" else f"{row['label']}@{name}"}
            for name, one in margins.items()
            for row in label_rows(one)
        ]
        labels = {key: {"value": value} for key, value in THRESHOLDS.items()}
        files.append(
            make(
                f"run{k}", rows, conditions=list(conditions.names), groups={"blur": ["blur_1", "blur_5"]},
                measures=["auroc"], robustness={name: one.to_dict() for name, one in found.items()},
                thresholds={"labels": labels},
            )
        )  # fmt: skip
    task = compared(*files)
    assert task["primary"] == ["auroc_clean", "auroc_retention", "flip_rate"]
    for name in ("auroc_clean", "auroc_drop", "auroc_retention"):
        for run, own in zip("ab", reported, strict=True):
            assert task["metrics"][name]["runs"][run]["value"] == pytest.approx(own[name].value, abs=1e-12)
            assert task["metrics"][name]["runs"][run]["ci95"] == pytest.approx(own[name].ci95, abs=1e-12)
    retention = task["metrics"]["auroc_retention"]
    both = [retention["runs"][run]["value"] for run in "ab"]
    assert retention["differences"]["b"]["value"] == pytest.approx(both[1] - both[0])
    assert retention["ratios"]["b"]["value"] == pytest.approx(both[1] / both[0])
    assert task["metrics"]["flip_rate"]["runs"]["a"]["value"] > 0


def test_runs_that_cannot_be_paired_are_left_out_with_the_reason(make: Callable[..., RunFiles]) -> None:
    flipped = TRUTH.copy()
    flipped[0, 0] = 1 - flipped[0, 0]
    rows = label_rows(GOOD)
    reference = make("reference", rows, label_source="rules")
    cases = {
        "documents": (make("1", rows[: 3 * 100], label_source="rules"), "other documents: 100, and 240 in the ref"),
        "labels": (make("2", [r for r in rows if r["label"] != "Rare"], label_source="rules"), "other labels: Rare"),
        "truth": (make("3", label_rows(GOOD, flipped), label_source="rules"), "other truth"),
        "source": (make("4", rows, label_source="mesh"), "other label source: mesh, and rules in the reference"),
        "version": (make("5", rows, label_source="rules", version=2), "other task version: 2, and 1 in the reference"),
        "split": (make("6", rows, label_source="rules", split="train"), "other split: train, and test"),
        "data": (make("7", rows, label_source="rules", dataset={"name": "d", "sha256": "2"}), "other data .hash"),
        "holes": (
            make("8", [{**rows[0], "margin": None}, *rows[1:]], label_source="rules"),
            "lacks scores of Edema on some documents",
        ),
        "none": (make("9", None, label_source="rules"), "no scores.parquet beside results_"),
        "task": (make("10", rows, task="u"), "it did not run this task"),
        "good": (make("11", label_rows(POOR), label_source="rules"), None),
    }
    block = compare_runs({"ref": reference, **{k: run for k, (run, _) in cases.items()}}, reference="ref", resamples=5)
    refused = block["tasks"]["t"]["refused"]
    assert "good" not in refused
    assert block["tasks"]["t"]["metrics"]["auroc"]["differences"].keys() == {"good"}
    for name, (_, message) in cases.items():
        if message is not None:
            assert re.search(message, refused[name]), (name, refused[name])
    table = comparison_table(block)
    assert "other split: train, and test in the reference" in table


def test_a_comparison_needs_a_reference_and_another_run(make: Callable[..., RunFiles]) -> None:
    run = make("one", label_rows(GOOD))
    for runs, reference in (({"a": run}, "a"), ({"a": run, "b": run}, "c"), ({}, "a")):
        with pytest.raises(UserError, match="Expected several runs"):
            compare_runs(runs, reference=reference)


def test_the_table_shows_what_was_found_and_numbers_what_was_not(make: Callable[..., RunFiles]) -> None:
    cost = {"quantization": {"name": "int8", "share": 0.95}, "weights_bytes": 2**21}
    block = compare_runs(
        {"fp32": make("one", label_rows(GOOD)), "int8": make("two", label_rows(POOR), model=cost)},
        reference="fp32", resamples=40,
    )  # fmt: skip
    table = comparison_table(block)
    assert "differ in precision, quantization" in table
    assert "quantised: int8 95.0%" in table
    assert "Not measured in any run: Latency ms, Memory MiB." in table
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    first, second = (dict(zip(lines[0], line, strict=True)) for line in lines[2:])
    assert (first["Task"], first["Run"], first["Difference [95% interval]"]) == ("t", "fp32", "")
    difference = block["tasks"]["t"]["metrics"]["auroc"]["differences"]["int8"]
    low, high = difference["ci95"]
    assert second["Difference [95% interval]"] == f"{difference['value']:+.4f} [{low:+.4f}, {high:+.4f}]"
    assert (first["Weights MiB"], second["Weights MiB"]) == ("n/a (1)", "2")
    assert table.rstrip().endswith("(1) no efficiency task was run")
    assert max(map(len, table.splitlines())) <= 200


def test_what_is_computed_from_scores_is_what_the_run_itself_reported(results: Any, tmp_path: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    own = {key: value for key, value in results.items() if key != "samples"}
    path = tmp_path / f"results_{DATE}.json"
    path.write_text(json.dumps(own, default=handle_non_serializable), encoding="utf-8")
    write_scores(path.parent / f"run_{DATE}" / "scores.parquet", results.scores)
    run = read_run(path)
    block = compare_runs({"a": run, "b": run}, reference="a", resamples=20)
    kinds = {"syn_zeroshot": "labels", "syn_view": "options", "syn_retrieval": "search"}
    assert {task: found["kind"] for task, found in block["tasks"].items()} == kinds
    for task, found in block["tasks"].items():
        reported = run.tasks[task]["metrics"]
        same = found["metrics"].keys() & reported.keys()
        assert set(found["primary"]) <= same
        for metric in same:
            level = found["metrics"][metric]["runs"]["b"]
            assert level["value"] == pytest.approx(reported[metric]["value"], abs=1e-12)
            assert level["reported"] is None


def test_details_that_were_edited_by_hand_are_refused_in_one_line(make: Callable[..., RunFiles]) -> None:
    files = [make(name, label_rows(GOOD), robustness={}, measures="auroc") for name in ("one", "two")]
    with pytest.raises(UserError, match="has not the shape that it is written in") as caught:
        compared(*files)
    assert "\n" not in str(caught.value)


def test_what_may_differ_is_named(make: Callable[..., RunFiles]) -> None:
    right, acc = [1.0] * 8 + [0.0] * 8, {"acc": 0.5}
    clean = make("one", value_rows("acc", right, ["a"] * 16), metrics=acc)
    changed = make("two", value_rows("acc", right, ["a"] * 12 + ["b"] * 4), metrics=acc, perturbation={"name": "x"})
    assert "perturbation" in compared(clean, changed)["refused"]["b"]
    found = compared(clean, changed, across=("perturbation",))
    assert found["refused"] == {} and found["agreement"]["b"]["flip_rate"]["value"] == 0.25

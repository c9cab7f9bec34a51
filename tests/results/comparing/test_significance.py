"""Two runs of one task: verdicts, corrected tests, and the studies on which they disagree."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.significance import holm, mcnemar
from medvlm_harness.results.comparing.significance import assess
from medvlm_harness.results.comparing.significance_table import significance_rows, significance_table
from medvlm_harness.results.run_files import RunFiles

Make = Callable[..., RunFiles]
RNG = np.random.default_rng(11)
LABELS = ("Edema", "Fracture", "Rare")
TRUTH = np.stack([RNG.random(200) < 0.4, RNG.random(200) < 0.15, np.arange(200) < 3], axis=1).astype(float)
NOISE = RNG.standard_normal(TRUTH.shape)
GOOD, POOR = 2 * TRUTH + NOISE, 0.2 * TRUTH + NOISE + 0.3 * RNG.standard_normal(TRUTH.shape)


def labelled(margin: Any) -> list[dict[str, Any]]:
    return [
        {
            "study": f"s{k:03}", "image": f"{k}.png", "label": label, "target": int(TRUTH[k, j]),
            "margin": margin[k, j], "probability": 1 / (1 + np.exp(-margin[k, j])),
        }
        for k in range(len(TRUTH))
        for j, label in enumerate(LABELS)
    ]  # fmt: skip


def chosen(right: Any) -> list[dict[str, Any]]:
    return [{"study": f"s{k:03}", "label": "acc", "value": float(one)} for k, one in enumerate(right)]


def by_metric(block: dict[str, Any]) -> dict[str, dict[str, Any]]:
    json.dumps(block, allow_nan=False)
    return {row["metric"]: row for row in block["tests"]}


def test_a_worse_run_is_called_worse_with_its_effect_and_its_labels(make: Make) -> None:
    block = assess(make("one", labelled(GOOD)), make("two", labelled(POOR)), resamples=200)
    found = by_metric(block)
    assert found["auroc"]["primary"] and found["auroc"]["verdict"] == "worse"
    lost = np.mean([roc_auc_score(TRUTH[:, j], POOR[:, j]) - roc_auc_score(TRUTH[:, j], GOOD[:, j]) for j in (0, 1)])
    assert found["auroc"]["difference"] == pytest.approx(lost)
    assert found["auroc_edema"]["test"] == "DeLong" and found["auroc_edema"]["verdict"] == "worse"
    assert found["auroc_edema"]["run"] == pytest.approx(roc_auc_score(TRUTH[:, 0], POOR[:, 0]))
    assert "auroc_rare" not in found  # three positives
    others = [row for row in block["tests"] if not row["primary"]]
    assert [row["p_adjusted"] for row in others] == pytest.approx(
        [one if one == one else None for one in holm([np.nan if r["p"] is None else r["p"] for r in others]).tolist()]
    )
    said = block["disagreements"]["t"]
    assert said == sorted(said, key=lambda row: -row["distance"]) and {row["right"] for row in said} == {
        "reference",
        "run",
    }
    decided = (GOOD >= 0) != (POOR >= 0)  # no thresholds were fitted: a probability of 0.5
    assert len(said) == decided.sum()


def test_a_margin_asks_whether_the_loss_matters(make: Make) -> None:
    good = make("one", labelled(GOOD))
    little = make("two", labelled(GOOD + 0.05 * RNG.standard_normal(GOOD.shape)))
    poor = make("three", labelled(POOR))
    assert by_metric(assess(good, little, margin=0.02, resamples=200))["auroc"]["verdict"] == "not worse"
    assert by_metric(assess(good, poor, margin=0.02, resamples=200))["auroc"]["verdict"] == "worse"
    assert by_metric(assess(good, poor, margin=0.9, resamples=200))["auroc"]["verdict"] == "not worse"


def test_a_run_does_not_differ_from_itself(make: Make) -> None:
    block = assess(make("one", labelled(GOOD)), make("two", labelled(GOOD)), resamples=100)
    assert {row["verdict"] for row in block["tests"]} == {"no difference shown"}
    assert {row["p"] for row in block["tests"]} == {1.0} and block["disagreements"]["t"] == []


def test_choices_are_tested_by_mcnemar_where_they_are_right_or_wrong(make: Make) -> None:
    first, second = RNG.random(200) < 0.8, RNG.random(200) < 0.5
    tied = np.where(second, 1, 0.25)  # of four options that tie, right by a quarter
    answers = {"a": first, "b": second, "c": tied}
    runs = [make(name, chosen(right), metrics={"acc": None}) for name, right in answers.items()]
    row = by_metric(assess(runs[0], runs[1], resamples=100))["acc"]
    assert row["test"] == "McNemar" and row["p"] == pytest.approx(mcnemar(first, second)) and row["verdict"] == "worse"
    assert by_metric(assess(runs[0], runs[2], resamples=100))["acc"]["test"] == "bootstrap"


def test_only_the_metrics_that_are_asked_for_are_corrected_for(make: Make) -> None:
    runs = make("one", labelled(GOOD)), make("two", labelled(POOR))
    block = assess(*runs, metrics=["t:auroc_edema", "t:auroc"], resamples=100)
    assert [(row["metric"], row["primary"]) for row in block["tests"]] == [("auroc", True), ("auroc_edema", False)]
    assert block["tests"][1]["p_adjusted"] == block["tests"][1]["p"]
    with pytest.raises(UserError, match=r"'t:auroc_edma'.*Did you mean t:auroc_edema"):
        assess(*runs, metrics=["t:auroc_edma"], resamples=100)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dataset": {"name": "e", "sha256": "1"}}, "other data set: e"),
        ({"dataset": {"name": "d", "sha256": "2"}}, "hash of the records"),
        ({"split": "validation"}, "other split: validation"),
        ({"label_source": "mesh"}, "other label source"),
        ({"version": 2}, "other task version: 2"),
    ],
)
def test_other_data_split_truth_or_version_is_refused_by_name(make: Make, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        assess(make("one", labelled(GOOD)), make("two", labelled(GOOD), **changed))


def test_another_resolution_is_refused_unless_it_is_what_is_compared(make: Make) -> None:
    plain = make("one", labelled(GOOD), model={"preprocessing": "published"})
    small = make("two", labelled(POOR), model={"preprocessing": "pad+64px"})
    with pytest.raises(UserError, match=r"different resolution.*pad\+64px.*--across preprocessing"):
        assess(plain, small)
    assert assess(plain, small, across=["preprocessing"], resamples=100)["differs"] == ["precision", "preprocessing"]


def test_what_has_no_answers_is_undecided_and_says_why(make: Make) -> None:
    with pytest.raises(UserError, match=r"cannot be compared.*no scores.parquet"):
        assess(make("one", labelled(GOOD)), make("two", None))


def test_tables_name_the_verdict_and_the_studies(make: Make) -> None:
    block = assess(make("one", labelled(GOOD)), make("two", labelled(POOR)), resamples=100)
    text = significance_table(block)
    first = block["disagreements"]["t"][0]
    assert f"{first['study']} {first['label']}: {first['reference']}, {first['run']}" in text
    row = next(line for line in text.splitlines() if line.startswith("| t "))
    assert row.split("|")[2].strip() == "auroc" and row.split("|")[-2].strip() == "worse"
    rows = significance_rows(block)
    assert len(rows) == len(block["tests"]) and {"low", "high"} <= rows[0].keys()


def test_models_of_another_input_size_are_refused_unless_that_is_compared(make: Make) -> None:
    cards = [
        {"name": "a", "preprocessing": "PreprocessCfg(size=(128, 128), mean=[0.48], fill_color=0)"},
        {"name": "b", "preprocessing": '{ "crop_size": { "height": 224, "width": 224 }, "resample": 3 }'},
        {"name": "c", "preprocessing": "resized to (128, 128)"},
    ]
    first, second, unknown = (
        make(name, labelled(GOOD), model={"card": card}) for name, card in zip("xyz", cards, strict=True)
    )
    with pytest.raises(UserError, match=r"128 pixels and 224 pixels.*--across preprocessing"):
        assess(first, second)
    assert assess(first, second, across=["preprocessing"], resamples=100)["tests"]
    assert assess(first, unknown, resamples=100)["tests"]  # its library does not say


def test_p_and_interval_agree(make: Make) -> None:
    for k in range(5):
        run = make(f"run{k}", labelled(GOOD - 0.1 * k * TRUTH + 0.3 * RNG.standard_normal(GOOD.shape)))
        for row in assess(make(f"one{k}", labelled(GOOD)), run, resamples=100)["tests"]:
            if row["p"] is not None:
                low, high = row["ci95"]
                assert (row["p"] < 0.05) == (low > 0 or high < 0)


def test_labels_of_one_class_are_undefined_with_the_reason(make: Make) -> None:
    rows = [{**row, "target": 1} for row in labelled(GOOD)]
    found = by_metric(assess(make("one", rows), make("two", [{**row, "margin": 0.0} for row in rows]), resamples=100))
    assert found["auroc"]["difference"] is None and "enough positives" in found["auroc"]["reason"]
    assert found["auroc"]["verdict"] == "undecided" and not any(name.startswith("auroc_") for name in found)


def test_one_study_shows_no_difference_however_far_apart(make: Make) -> None:
    runs = [
        make(name, [{"study": "s", "label": "rougeL", "value": value}], metrics={"rougeL": value})
        for name, value in (("one", 1.0), ("two", 0.0))
    ]
    for margin in (None, 0.02):
        row = by_metric(assess(*runs, margin=margin, resamples=100))["rougeL"]
        assert row["difference"] == -1 and row["p"] is None and row["verdict"] == "undecided"
        assert row["reason"] == "the sample shows no variance"


def test_scores_that_are_not_numbers_are_refused_by_name(make: Make) -> None:
    rows = labelled(GOOD)
    rows[0]["margin"] = float("nan")
    with pytest.raises(UserError, match="lacks scores of Edema on some documents"):
        assess(make("one", labelled(GOOD)), make("two", rows))


def test_the_use_of_the_image_is_compared_by_what_the_image_adds(make: Make) -> None:
    def under(*scores: Any) -> list[dict[str, Any]]:
        return [
            {**row, "label": row["label"] + suffix}
            for suffix, score in zip(("", "@other"), scores, strict=True)
            for row in labelled(score)
        ]

    details = {"conditions": ["true", "other"]}
    looks = make("one", under(GOOD, NOISE), metrics={"auroc_true_minus_other": 0.4}, **details)
    guesses = make("two", under(GOOD, GOOD), metrics={"auroc_true_minus_other": 0.0}, **details)
    block = assess(looks, guesses, resamples=100)
    found = by_metric(block)
    assert list(found) == ["auroc_true", "auroc_other", "auroc_true_minus_other"]
    added = np.mean([roc_auc_score(TRUTH[:, j], GOOD[:, j]) - roc_auc_score(TRUTH[:, j], NOISE[:, j]) for j in (0, 1)])
    primary = found["auroc_true_minus_other"]
    assert primary["primary"] and primary["difference"] == pytest.approx(-added) and primary["verdict"] == "worse"
    assert found["auroc_true"]["difference"] == 0 and block["disagreements"]["t"] == []


def test_a_task_that_is_asked_for_and_refused_says_why(make: Make) -> None:
    good, poor = make("one", labelled(GOOD)), make("two", labelled(POOR), split="validation")
    with pytest.raises(UserError, match="other split: validation"):
        assess(good, poor, metrics=["t:auroc"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_with_a_number_that_is_none_is_refused_by_its_place(make: Make, value: float) -> None:
    with pytest.raises(UserError, match=r"metrics\.auroc\.value: expected a finite number, but got (nan|inf)"):
        make("one", labelled(GOOD), metrics={"auroc": value})


def test_what_a_file_reports_otherwise_is_told(make: Make) -> None:
    runs = make("one", labelled(GOOD), metrics={"auroc": None}), make("two", labelled(POOR), metrics={"auroc": 0.5})
    block = assess(*runs, resamples=100)
    assert by_metric(block)["auroc"]["reported"] == {"A": None, "B": 0.5}
    assert "auroc: B itself reported 0.5000" in significance_table(block)

"""Two runs of one task: verdicts, corrected tests, and the studies on which they disagree."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.significance import holm, mcnemar
from medvlm_harness.results.run_files import RunFiles
from medvlm_harness.results.significance import assess
from medvlm_harness.results.significance_table import significance_rows, significance_table

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
    block = assess(*runs, metrics=["t:auroc_edema"], resamples=100)
    assert [row["metric"] for row in block["tests"]] == ["auroc", "auroc_edema"]
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

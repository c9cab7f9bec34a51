from __future__ import annotations

from typing import Any

import pytest

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.table import interval_table

DATASET = {"name": "iu_cxr", "source": "kaggle"}


def block(**changes: Any) -> dict[str, Any]:
    metrics = {
        "auroc": Estimate(0.75, 0.02, (0.7, 0.8), 615, floor=0.5, ceiling=1.0),
        "auroc_edema": Estimate(
            0.6, 0.1, (0.4, 0.79999), 600, positives=9, floor=0.5, reason="fewer than 10 positives"
        ),
        "auroc_fracture": Estimate.undefined("only one class", n=615, positives=0),
    }
    task = {
        "dataset": DATASET,
        "split": "test",
        "documents": 615,
        "scored": 615,
        "label_source": "chexpert_labeler",
        "counts": {"studies": 590, "images": 615, "images_without_target": 0},
        "contamination": {"note": None},
        "metrics": {name: estimate.to_dict() for name, estimate in metrics.items()},
        **changes,
    }
    return {"tasks": {"t": task}, "unsupported": {"other": "m cannot embed an image"}}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_each_number_stands_beside_its_interval_support_floor_and_ceiling() -> None:
    header, rule, *rows = cells(interval_table(block()))
    assert header == ["Task", "Metric", "Value", "95% interval", "n", "Positives", "Floor", "Ceiling", "Note"]
    assert rows[0] == ["t", "auroc", "0.7500", "0.7000 to 0.8000", "615", "", "0.5000", "1.0000", ""]
    assert rows[1] == ["", "auroc_edema", "0.6000", "0.4000 to 0.8000", "600", "9", "0.5000", "", rows[1][-1]]
    assert rows[1][-1] == "fewer than 10 positives"
    assert set("".join(rule)) == {"-"}


def test_undefined_is_a_word_with_its_reason_and_never_zero() -> None:
    row = cells(interval_table(block()))[4]
    assert row == ["", "auroc_fracture", "undefined", "", "615", "0", "", "", "only one class"]


def test_a_refused_task_has_a_row() -> None:
    assert cells(interval_table(block()))[-1] == ["other", "n/a", *[""] * 6, "m cannot embed an image"]


def test_all_lines_of_the_table_are_of_one_width() -> None:
    lines = [line for line in interval_table(block()).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1


def test_the_line_above_says_what_the_data_are() -> None:
    line = interval_table(block()).splitlines()[0]
    assert line == "t: iu_cxr (kaggle), split test; labels chexpert_labeler; 590 studies; 615 images"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scored": 20}, "LIMITED: only 20 of 615 scored"),
        ({"contamination": {"note": "scored on test, which it was trained on"}}, "which it was trained on"),
        ({"truncated_share": {"report": 0.125, "findings": None}}, "texts cut by the tokenizer: report 12.5%"),
        ({"counts": {"studies_without_report": 3}}, "3 studies without report"),
    ],
)
def test_what_weakens_the_numbers_stands_there_too(changes: dict[str, Any], expected: str) -> None:
    line = interval_table(block(**changes)).splitlines()[0]
    assert expected in line
    assert expected not in interval_table(block())


def test_lm_evals_table_is_followed_by_ours(results: Any) -> None:
    from lm_eval import utils

    plain = utils.make_table({key: value for key, value in results.items() if key != "medvlm"})
    assert "Stderr" in plain and "95% interval" not in plain
    table = utils.make_table(results)
    assert table.startswith(plain)
    assert table.count("95% interval") == 1
    assert "i2t_recall@1_label_overlap" in table.partition("95% interval")[2]


def of_text(**changes: Estimate) -> str:
    metrics = {
        "rougeL": Estimate(0.3, 0.1, (0.2, 0.4), 9, floor=0.5, extra={"floors": {"constant": 0.5, "copy": 0.125}}),
        "omission": Estimate(0.2, 0.1, (0.1, 0.3), 9, extra={"reference": 0.15, "lift": 0.05}),
        "omission_lift": Estimate(0.05, 0.1, (-0.1, 0.1), 9),
        **changes,
    }
    return interval_table(block(metrics={name: estimate.to_dict() for name, estimate in metrics.items()}))


def test_every_kind_of_floor_is_named_where_there_are_several() -> None:
    assert cells(of_text())[2][-1] == "constant 0.5000, copy 0.1250"


def test_checks_stand_in_one_row_beside_the_human_rate() -> None:
    header, _, row = cells(of_text().partition("Factuality")[2])
    assert header == ["Task", "Filter", "omission"]
    assert row == ["t", "none", "0.200, 0.150 (+0.050)"]
    assert "Factuality" not in interval_table(block())


def test_an_undefined_check_says_so() -> None:
    undefined = Estimate.undefined("no pair", n=0).to_dict() | {"extra": {"reference": None, "lift": None}}
    whole = block(metrics={"laterality_conflict": undefined})
    assert cells(interval_table(whole).partition("Factuality")[2])[2] == ["t", "none", "undefined"]


def test_a_second_filter_has_a_row_of_factuality_and_of_what_it_changed_alone() -> None:
    filtered = Estimate(0.2, 0.1, (0.1, 0.3), 9, extra={"reference": 0.15, "lift": 0.05})
    table = of_text(**{"rougeL,no_prior": Estimate(0.4, 0.1, (0.2, 0.4), 9), "omission,no_prior": filtered})
    numbers, _, checks = table.partition("Factuality")
    assert [row[1] for row in cells(numbers)[2:]] == [
        *("rougeL", "omission", "omission_lift", "rougeL,no_prior"),
        "n/a",
    ]
    assert [row[:2] for row in cells(checks)[2:]] == [["t", "none"], ["t", "no_prior"]]


# --- subgroups


def with_subgroups() -> dict[str, Any]:
    rate = Estimate(0.25, 0.1, (0.1, 0.4), 50).to_dict()
    groups = {
        "F": {"n": 90, "positives": 40, "prevalence": 0.4, "auroc": rate, "fpr": rate, "fnr": rate},
        "M": {"n": None, "positives": None, "prevalence": None, "reason": "insufficient: fewer than 20 positives"},
    }
    labels = {"no_finding": {"groups": groups, "gaps": {}}, "edema": {"groups": groups, "gaps": {}}}
    metrics = {
        "auroc": Estimate(0.75, 0.02, (0.7, 0.8), 615, extra={"labels": ["a"], "left_out_positives": {"b": 3}}),
        "auroc_gap_sex": Estimate(0.125, 0.1, (-0.1, 0.3), 615, extra={"labels": ["a", "b"]}),
        "fpr_gap_sex": Estimate.undefined("no label has two subgroups of 20", n=615),
        "fnr_gap_sex": Estimate.undefined("no validation", n=615),
        "equalized_odds_difference_sex": Estimate.undefined("insufficient: 1 subgroup(s)", n=615),
        "auroc_gap": Estimate(0.5, 0.1, (0.4, 0.6), 615),  # a label of that name
    }
    its = {name: estimate.to_dict() for name, estimate in metrics.items()}
    return block(metrics=its, subgroups={"sex": labels})


def test_gaps_stand_in_one_row_per_attribute_and_not_among_the_metrics() -> None:
    numbers, _, rest = interval_table(with_subgroups()).partition("Subgroups: the highest")
    assert [row[1] for row in cells(numbers)[2:]] == ["auroc", "auroc_gap", "n/a"]
    header, _, row = cells(rest.partition("Subgroups: No Finding")[0])
    assert header[:4] == ["Task", "Attribute", "Labels", "AUROC"]
    assert row == ["t", "sex", "2", "0.125 (-0.100 to 0.300)", "insufficient", "undefined", "insufficient", ""]


def test_subgroups_stand_there_with_no_finding_and_without_counts_that_are_not_shown() -> None:
    header, _, *rows = cells(interval_table(with_subgroups()).partition("Subgroups: No Finding")[2])
    assert header[2:6] == ["Subgroup", "n", "Positives", "AUROC"]
    assert rows == [
        ["t", "sex", "F", "90", "40", *["0.250 (0.100 to 0.400)"] * 3],
        ["t", "sex", "M", "", "", *["insufficient"] * 3],
    ]
    assert "Subgroups" not in interval_table(block())


def test_a_mean_says_of_how_many_labels_it_is() -> None:
    assert cells(interval_table(with_subgroups()))[2][-1] == "1 of 2 labels"

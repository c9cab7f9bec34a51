from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import pytest

from medvlm_harness.results.stability import Condition, stability, stability_table

SEEDS = [Condition(0), Condition(1), Condition(2)]
CROSSED = [Condition(seed, prompts) for prompts in ("task", "published") for seed in (0, 1)]


def run(**values: float | None) -> dict[str, Any]:
    """Results of one run of a task `t`, each interval 0.1 to both sides."""
    metrics = {
        name: {
            "value": value,
            "ci95": None if value is None else [value - 0.1, value + 0.1],
            "reason": "only one class" if value is None else None,
        }
        for name, value in values.items()
    }
    return {"results": {"t": {"alias": "t"}}, "medvlm": {"tasks": {"t": {"metrics": metrics}}}}


def spread(conditions: Sequence[Condition], values: Sequence[float | None]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = stability(conditions, [run(auroc=value) for value in values])["tasks"]["t"]["auroc"]
    return found


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_the_spread_by_hand() -> None:
    found = spread(SEEDS, [0.1, 0.2, 0.6])
    assert found["values"] == [0.1, 0.2, 0.6]
    assert found["mean"] == pytest.approx(0.3, abs=1e-12)
    assert found["sd"] == pytest.approx(sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2), abs=1e-12)
    assert (found["min"], found["max"]) == (0.1, 0.6)
    assert found["ci95"] == [[v - 0.1, v + 0.1] for v in (0.1, 0.2, 0.6)]
    assert found["sd_seeds"] is found["sd_prompts"] is found["reason"] is None


def test_seeds_and_prompts_are_told_apart() -> None:
    found = spread(CROSSED, [0.5, 0.7, 0.1, 0.3])  # a seed moves it by 0.2, a wording by 0.4
    assert found["sd_seeds"] == pytest.approx(0.2 / sqrt(2), abs=1e-12)
    assert found["sd_prompts"] == pytest.approx(0.4 / sqrt(2), abs=1e-12)
    assert found["sd"] == pytest.approx(sqrt((0.1**2 + 0.3**2 + 0.3**2 + 0.1**2) / 3), abs=1e-12)


def test_pooling_takes_the_mean_of_the_variances() -> None:
    found = spread(CROSSED, [0.5, 0.5, 0.1, 0.3])
    assert found["sd_seeds"] == pytest.approx(sqrt((0 + 0.02) / 2), abs=1e-12)


def test_equal_values_spread_by_exactly_nothing() -> None:
    found = spread(SEEDS, [0.1, 0.1, 0.1])  # whose sum is not 0.3
    assert (found["mean"], found["sd"]) == (0.1, 0.0)


def test_what_is_undefined_in_one_run_has_no_spread_and_says_where() -> None:
    block = stability(SEEDS, [run(auroc=value) for value in (0.1, None, 0.6)])
    found = block["tasks"]["t"]["auroc"]
    assert found["values"] == [0.1, None, 0.6]
    assert found["mean"] is found["sd"] is found["min"] is found["max"] is None
    assert found["reason"] == "seed 1: only one class"
    row = cells(stability_table(block))[2]
    assert row[2:6] == ["0.1000 undefined 0.6000", "undefined", "undefined", ""]
    assert row[-1] == "seed 1: only one class"


def test_a_metric_that_a_run_lacks_is_no_zero() -> None:
    found = stability(SEEDS[:2], [run(auroc=0.1, f1=0.2), run(auroc=0.1)])["tasks"]["t"]
    assert found["f1"]["values"] == [0.2, None]
    assert found["f1"]["reason"] == "seed 1: no value"


def test_of_tasks_that_are_not_ours_the_scalars_count() -> None:
    def of(acc: float) -> dict[str, Any]:
        scalars = {"alias": "arc", "acc,none": acc, "acc_stderr,none": 0.01, "nan,none": float("nan"), "sample_len": 9}
        return {"results": {"arc": scalars, "n/a": {"unsupported,none": "it cannot"}}}

    block = stability(SEEDS[:2], [of(0.5), of(0.75)])
    assert list(block["tasks"]) == ["arc"]
    assert block["tasks"]["arc"].keys() == {"acc,none", "nan,none"}
    assert block["tasks"]["arc"]["acc,none"]["mean"] == 0.625
    assert cells(stability_table(block))[2][6] == ""  # no interval
    json.dumps(block, allow_nan=False)


def test_the_table_has_what_differs_beside_the_first_interval_and_counts_the_rest() -> None:
    runs = [run(auroc=value, blank=0.5, mean=0.7) for value in (0.4, 0.5, 0.6)]
    table = stability_table(stability(SEEDS, runs, seeded=["--seed", "--metadata substitution_seed"]))
    _, _, *rows = cells(table)
    values = ["0.4000 0.5000 0.6000", "0.5000", "0.1000", "0.4000 to 0.6000", "0.3000 to 0.5000", ""]
    assert rows == [["t", "auroc", *values]]
    assert table.startswith("3 runs: seed 0; seed 1; seed 2.\n")
    assert "A spread over 3 runs is no confidence interval" in table
    assert "The seed went to --seed, --metadata substitution_seed." in table
    assert table.endswith("The other 2 metrics are the same in all runs.\n")


def test_the_table_of_both_options_has_both_spreads() -> None:
    block = stability(CROSSED, [run(auroc=value) for value in (0.5, 0.7, 0.1, 0.3)])
    assert (block["seeds"], block["prompt_sets"]) == ([0, 1], ["task", "published"])
    head, _, row = cells(stability_table(block))
    named = dict(zip(head, row, strict=True))
    assert (named["SD"], named["SD over seeds"], named["SD over prompts"]) == ("0.2582", "0.1414", "0.2828")
    assert "seed 0, prompts task; seed 1, prompts task; seed 0, prompts published" in stability_table(block)


def test_without_a_difference_there_is_no_table() -> None:
    table = stability_table(stability(SEEDS, [run(auroc=0.5, other=None)] * 3))
    assert cells(table) == []
    assert "All 2 metrics are the same in all runs." in table


@pytest.mark.parametrize("conditions", [SEEDS[:1], SEEDS[:2], [Condition(0)] * 3], ids=["one", "fewer", "equal"])
def test_each_run_has_a_condition_of_its_own(conditions: list[Condition]) -> None:
    with pytest.raises(ValueError, match="Expected several runs"):
        stability(conditions, [run(auroc=0.5)] * (1 if len(conditions) == 1 else 3))

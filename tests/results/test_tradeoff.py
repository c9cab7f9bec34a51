from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.results.run_files import RunFiles
from medvlm_harness.results.tradeoff import tradeoff, tradeoff_plot, tradeoff_table

MIB = 2**20


def run(
    auroc: float | None,
    latency: float | None,
    ram: float | None,
    weights: float | None,
    *,
    ece: float | None = 0.1,
    model: Mapping[str, Any] | None = None,
) -> RunFiles:
    def estimate(value: float | None) -> dict[str, Any]:
        interval = None if value is None else [value - 0.04, value + 0.04]
        return {"value": value, "ci95": interval, "reason": None if value is not None else "nothing labelled"}

    costs = {"latency_p50": latency, "peak_ram_mib": ram, "weights_memory_mib": weights, "vram_allocated_mib": None}
    tasks: dict[str, Any] = {"t": {"dataset": {}, "metrics": {"auroc": estimate(auroc), "ece": estimate(ece)}}}
    if latency is not None:
        tasks["d_efficiency"] = {"dataset": {}, "metrics": {name: estimate(value) for name, value in costs.items()}}
    block = {"schema_version": 1, "model": model or {}, "tasks": tasks}
    results = {"results": {}, "higher_is_better": {"t": {"auroc": True, "ece": False}}, "medvlm": block}
    return RunFiles(Path("results.json"), results, None)


RUNS = {
    "fp32": run(0.80, 12.0, 900, 46, ece=0.05),
    "bf16": run(0.80, 6.0, 800, 23, ece=0.06),
    "int8-dynamic": run(0.78, 9.0, 850, 14, ece=0.09),
    "nf4": run(0.74, 30.0, 700, 9, ece=0.14),
}


def test_fronts_by_hand() -> None:
    rows = {row["run"]: row for row in tradeoff(RUNS, metric="t:auroc")}
    on = {
        cost: {name for name, row in rows.items() if row[f"on_front_{cost}"]}
        for cost in ("latency_p50", "peak_ram_mib")
    }
    assert on == {"latency_p50": {"bf16"}, "peak_ram_mib": {"bf16", "nf4"}}
    assert {name for name, row in rows.items() if row["on_front_weights_memory_mib"]} == {"bf16", "int8-dynamic", "nf4"}
    assert {name for name, row in rows.items() if row["on_front"]} == {"bf16", "int8-dynamic", "nf4"}
    assert (rows["nf4"]["low"], rows["nf4"]["colour_metric"], rows["nf4"]["colour"]) == (0.70, "t:ece", 0.14)


def test_of_a_metric_where_less_is_better_the_front_turns_round() -> None:
    rows = tradeoff(RUNS, metric="t:ece", costs=["latency_p50"])
    assert [row["run"] for row in rows if row["on_front"]] == ["bf16", "fp32"][::-1]


def test_what_a_run_lacks_keeps_it_off_the_fronts_that_need_it_and_is_said() -> None:
    counted = {"weights_bytes": 5 * MIB}
    runs = {**RUNS, "unmeasured": run(0.9, None, None, None, model=counted), "undefined": run(None, 1, 1, 1)}
    rows = {row["run"]: row for row in tradeoff(runs, metric="t:auroc")}
    unmeasured, undefined = rows["unmeasured"], rows["undefined"]
    assert (unmeasured["weights_memory_mib"], unmeasured["weights_memory_mib_source"]) == (
        5,
        "model.weights_bytes",
    )
    assert unmeasured["on_front_weights_memory_mib"]
    assert not (unmeasured["on_front_latency_p50"] or unmeasured["on_front"] or undefined["on_front_latency_p50"])
    assert "latency_p50: no efficiency task was run" in unmeasured["reason"]
    assert undefined["reason"].startswith("t:auroc: nothing labelled")
    assert rows["bf16"]["on_front_latency_p50"]


def test_memory_is_that_of_the_gpu_where_one_was_used() -> None:
    gpu = run(0.8, 1.0, 900, 46)
    gpu.results["medvlm"]["tasks"]["d_efficiency"]["metrics"]["vram_allocated_mib"] = {
        "value": 300, "ci95": None, "reason": None,
    }  # fmt: skip
    rows = tradeoff({"gpu": gpu, "cpu": RUNS["fp32"]}, metric="t:auroc")
    assert [row["vram_allocated_mib"] for row in rows] == [300, None]
    assert rows[0]["on_front"]
    assert not rows[1]["on_front"]  # RAM is not compared with it


def test_wrong_names_are_refused() -> None:
    for arguments, message in (
        ({"metric": "auroc"}, "Expected a metric as task:metric"),
        ({"metric": "t:f1"}, "none has t:f1"),
        ({"metric": "t:auroc", "costs": ["watts"]}, "got watts"),
    ):
        with pytest.raises(UserError, match=message):
            tradeoff(RUNS, **arguments)  # type: ignore[arg-type]


def test_the_table_is_sorted_and_marks_the_front() -> None:
    rows = tradeoff({**RUNS, "unmeasured": run(0.9, None, None, None)}, metric="t:auroc")
    lines = [line.split("|") for line in tradeoff_table(rows).splitlines() if line.startswith("|")]
    names = [line[1].strip() for line in lines[2:]]
    assert names == ["unmeasured", "fp32", "**bf16**", "**int8-dynamic**", "**nf4**"]
    assert lines[4][2].strip() == "0.8000 [0.7600, 0.8400]"
    assert "n/a of unmeasured: latency_p50: no efficiency task was run" in tradeoff_table(rows)


def test_the_plot_has_a_panel_per_cost_and_its_numbers_beside_it(tmp_path: Path) -> None:
    rows = tradeoff(RUNS, metric="t:auroc")
    beside = tradeoff_plot(rows, tmp_path / "tradeoff.svg")
    with beside.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [one["run"] for one in read] == list(RUNS)
    assert [float(one["latency_p50"]) for one in read] == [12, 6, 9, 30]
    drawn = (tmp_path / "tradeoff.svg").read_text(encoding="utf-8")
    for text in ("Latency, median per study (ms)", "Peak memory, RAM (MiB)", "Weights in memory (MiB)"):
        assert f">{text}</text>" in drawn
    assert all(drawn.count(f">{name}</text>") == 3 for name in RUNS)  # once in each panel
    tradeoff_plot(rows, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text(encoding="utf-8") == drawn


def test_what_nobody_measured_is_an_empty_panel_that_says_so(tmp_path: Path) -> None:
    rows = tradeoff({"a": run(0.8, None, None, None), "b": run(0.7, None, None, None, ece=None)}, metric="t:auroc")
    tradeoff_plot(rows, tmp_path / "tradeoff.svg")
    assert (tmp_path / "tradeoff.svg").read_text(encoding="utf-8").count("no efficiency task was run") == 3

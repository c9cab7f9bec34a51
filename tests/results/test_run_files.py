from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.results.run_files import find_runs, read_run
from medvlm_harness.results.scores import write_scores

OLD, NEW = "2026-01-02T03-04-05.000006", "2026-11-30T23-29-36"  # a full second has no fraction
ESTIMATE = {"value": 0.5, "ci95": [0.4, 0.6], "reason": None}
BLOCK: dict[str, Any] = {
    "schema_version": 1,
    "model": {"card": {"name": "m"}},
    "tasks": {"t": {"dataset": {"name": "d"}, "metrics": {"auroc": ESTIMATE}}},
    "unsupported": {},
}


def write(folder: Path, date: str, results: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{date}.json"
    path.write_text(json.dumps({"results": {}, "medvlm": BLOCK} if results is None else results), encoding="utf-8")
    return path


def test_runs_are_found_newest_first_with_their_scores(tmp_path: Path) -> None:
    old, new = write(tmp_path / "z" / "model", OLD), write(tmp_path / "a" / "model", NEW)
    write_scores(old.parent / f"run_{OLD}" / "scores.parquet", [])
    write(tmp_path / "a" / "model", OLD).rename(tmp_path / "a" / "model" / f"stability_{OLD}.json")
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / f"samples_t_{NEW}.jsonl").write_text("{}")
    first, second = find_runs(tmp_path)
    assert (first.path, first.scores) == (new, None)
    assert (second.path, second.scores) == (old, old.parent / f"run_{OLD}" / "scores.parquet")
    assert second.tasks["t"]["metrics"]["auroc"]["value"] == 0.5


def test_a_name_that_the_user_chose_is_found_too(tmp_path: Path) -> None:
    path = write(tmp_path, NEW).rename(tmp_path / f"mine_{NEW}.json")  # --output_path mine.json
    write_scores(tmp_path / f"run_{NEW}" / "scores.parquet", [])
    (run,) = find_runs(tmp_path)
    assert (run.path, run.scores) == (path, tmp_path / f"run_{NEW}" / "scores.parquet")


def test_a_run_of_other_tasks_is_read_and_says_that_it_has_no_block(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, OLD, {"results": {"arc": {"acc,none": 0.3}}}))
    with pytest.raises(UserError, match="has no block `medvlm`"):
        _ = run.medvlm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "the file: expected a mapping, but got"),
        ({"results": 3}, "results: expected a mapping, but got 3"),
        ({"results": {}, "medvlm": {"schema_version": 99}}, "schema_version: expected 1 or 2, but got 99"),
        ({"results": {}, "medvlm": []}, "medvlm: expected a mapping"),
        ({"results": {}, "medvlm": {**BLOCK, "tasks": []}}, "medvlm.tasks: expected a mapping"),
        ({"results": {}, "medvlm": {**BLOCK, "model": None}}, "medvlm.model: expected a mapping, but got None"),
        ({"results": {}, "medvlm": {**BLOCK, "tasks": {"t": {"metrics": {}}}}}, "medvlm.tasks.t.dataset is missing"),
        *(
            ({"results": {}, "medvlm": {**BLOCK, "tasks": {"t": {"dataset": {}, "metrics": metrics}}}}, message)
            for metrics, message in (
                (None, "metrics: expected a mapping"),
                ({"a": 0.5}, "metrics.a: expected a mapping"),
                ({"a": {**ESTIMATE, "value": "x"}}, "metrics.a.value: expected a valid number, but got 'x'"),
                ({"a": {**ESTIMATE, "value": float("nan")}}, "metrics.a.value: expected a finite number, but got nan"),
                ({"a": {**ESTIMATE, "ci95": [1]}}, "metrics.a.ci95: expected List should have at least 2 items"),
                ({"a": {**ESTIMATE, "p_value": 1}}, "metrics.a.p_value: expected Extra inputs are not permitted"),
            )
        ),
    ],
)
def test_json_of_another_shape_is_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path, OLD, change)
    with pytest.raises(UserError, match=message) as caught:
        find_runs(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "\xff", "[" * 100_000])
def test_what_is_no_json_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / f"results_{OLD}.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_run(path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none is none|is none"):
        find_runs(tmp_path / "none")
    assert find_runs(tmp_path) == []

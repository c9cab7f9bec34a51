"""What is made of the cells that are done; their runs are written here instead of computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvlm_harness.results.scores import write_scores
from medvlm_harness.sweeps.cells import make_cells
from medvlm_harness.sweeps.comparison import compare_cells
from medvlm_harness.sweeps.declaration import Sweep
from medvlm_harness.sweeps.state import CellFolder, Outcome, write_record

DATE = "2026-01-02T03-04-05.000006"
SWEEP = """
name: s
tasks: [t]
models: [{name: one, model: m}, {name: two, model: m, args: {pretrained: x}}]
axes: {reports: {clean: {}, typos: {metadata: {perturbation: {name: typos}}}}}
compare: {references: [{model: one}, {reports: clean}]}
"""
RIGHT = np.random.default_rng(0).random(200) < 0.6
Finish = Callable[..., None]


@pytest.fixture
def finish(tmp_path: Path) -> Finish:
    """Write what a cell leaves that is done: 200 choices, of which the first `others` are the other one."""

    def write(name: str, key: str, *, others: int = 0, perturbation: Any = None, acc: float = 0.5) -> None:
        cell = CellFolder(tmp_path, name, key)
        path = cell.run / "m" / f"results_{DATE}.json"
        path.parent.mkdir(parents=True)
        right = np.where(np.arange(200) < others, ~RIGHT, RIGHT)
        estimate = {"value": acc, "ci95": [acc - 0.1, acc + 0.1], "reason": None}
        details = {"dataset": {"name": "d", "sha256": "1"}, "split": "test", "version": 1, "perturbation": perturbation}
        task = {**details, "metrics": {"acc": estimate}}
        block = {
            "schema_version": 1,
            "model": {"card": {"name": "m", "parameters": 1234}},
            "tasks": {"t": task},
            "unsupported": {"v": "m cannot see"},
        }
        path.write_text(json.dumps({"results": {}, "medvlm": block, "higher_is_better": {}}), encoding="utf-8")
        rows = [
            {"task": "t", "study": f"s{k:03}", "label": "acc", "value": float(one), "answer": str(int(one))}
            for k, one in enumerate(right)
        ]
        write_scores(path.parent / f"run_{DATE}" / "scores.parquet", rows)
        cell.ended(Outcome(key, 0, None, str(path.relative_to(cell.path)), "here", 0.0, 1.0, None))

    return write


def cells_of(table: str) -> dict[tuple[str, str], dict[str, str]]:
    """Task and cell -> heading -> what stands there."""
    lines = [[one.strip() for one in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    head, _, *rows = lines
    return {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}


def record(sweep: Sweep, folder: Path) -> dict[str, str]:
    cells = make_cells(sweep)
    write_record(folder, sweep, cells)
    return {cell.name: cell.key for cell in cells}


def test_one_table_has_scores_paired_differences_and_flips(
    sweep_of: Callable[..., Sweep], finish: Finish, tmp_path: Path
) -> None:
    keys = record(sweep_of(SWEEP), tmp_path)
    finish("one-clean", keys["one-clean"], acc=0.6)
    finish("one-typos", keys["one-typos"], others=20, perturbation={"name": "typos"})
    finish("two-clean", keys["two-clean"], others=30, acc=0.7)
    finish("two-typos", keys["two-typos"], others=70, perturbation={"name": "typos"})
    compared = compare_cells(tmp_path)
    assert compared is not None
    rows = cells_of(compared.table)
    one, two = rows["t", "one-clean"], rows["t", "two-clean"]
    assert {name for _, name in rows} == {"one-clean", "two-clean"}  # the others are their columns
    assert one["Value [95%]"] == "0.600 [0.500, 0.700]" and one["Less one [95%]"] == ""
    difference = float((RIGHT[:30] == 0).sum() - (RIGHT[:30] == 1).sum()) / 200
    assert two["Less one [95%]"].startswith(f"{difference:+.3f} [")
    assert one["Flips, typos [95%]"].startswith("0.100 [")
    assert two["Flips, typos [95%]"].startswith("0.200 [")
    assert one["Parameters"] == "1,234"
    assert rows["v", "one-clean"]["Value [95%]"] == "n/a (1)" and "(1) m cannot see" in compared.table
    assert {path.name for path in compared.files} == {"comparison.json", "comparison.md"}
    groups = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["groups"]
    places = [(group["reference"], group["place"]) for group in groups]
    assert ({"model": "one"}, {"reports": "clean"}) in places and ({"reports": "clean"}, {"model": "two"}) in places


@pytest.mark.parametrize("done", [(), ("one-clean",), ("two-clean", "two-typos")])
def test_without_two_cells_and_their_reference_nothing_is_compared(
    done: Sequence[str], sweep_of: Callable[..., Sweep], finish: Finish, tmp_path: Path
) -> None:
    keys = record(sweep_of(SWEEP.replace(", {reports: clean}]", "]")), tmp_path)
    for name in done:
        finish(name, keys[name])
    assert compare_cells(tmp_path) is None


def test_a_sweep_without_references_compares_all_with_its_first_cell(
    sweep_of: Callable[..., Sweep], finish: Finish, tmp_path: Path
) -> None:
    keys = record(sweep_of(SWEEP.partition("compare")[0]), tmp_path)
    for name in ("one-clean", "two-clean", "two-typos"):
        finish(name, keys[name])
    compared = compare_cells(tmp_path)
    assert compared is not None and compared.table.startswith("Compared with one-clean: ")
    assert "two-typos" in compared.table

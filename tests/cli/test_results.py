"""`medvlm results`, from the command line; what it finds is tested beside the code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_one_line_per_file_and_the_exit_status_tell(
    medvlm: Callable[..., Any], demo_runs: dict[str, Path], tmp_path: Path
) -> None:
    for name, path in demo_runs.items():
        shutil.copytree(path.parent, tmp_path / "runs" / name)
    status, out, err = medvlm("results", "validate", "runs")
    assert (status, err) == (0, "")
    assert [line.rpartition(": ")[2] for line in out.splitlines()] == ["ok", "ok"]
    edited = tmp_path / "runs" / "tiny" / demo_runs["tiny"].name
    edited.write_text(
        edited.read_text(encoding="utf-8").replace('"precision": "fp32"', '"precision": "bf16"'), encoding="utf-8"
    )
    status, out, err = medvlm("results", "validate", "runs")
    assert (status, err) == (1, "")
    (wrong,) = [line for line in out.splitlines() if ": WRONG: " in line]
    assert wrong.endswith(f"{edited.name} was changed after the run: medvlm.model")
    status, out, err = medvlm("results", "validate", str(edited), "--json")
    (verdict,) = json.loads(out)
    assert (status, verdict["valid"], len(verdict["problems"])) == (1, False, 1)


def test_wrong_input_is_one_line(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert medvlm("results", "validate", "empty").error == "Expected results files, but there are none in empty."
    status, out, _ = medvlm("results", "validate", "missing.json")
    assert (status, out.count("\n")) == (1, 1)
    assert "missing.json: WRONG: it cannot be read" in out


def test_the_schema_is_printed(medvlm: Callable[..., Any]) -> None:
    assert json.loads(medvlm("results", "schema").out)["$defs"]["Block"]["additionalProperties"] is False

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.cli.report import Format

ESTIMATE: dict[str, Any] = {
    **{"value": 0.7, "stderr": 0.02, "ci95": [0.65, 0.75], "n": 50, "positives": None},
    **{"floor": 0.5, "ceiling": 1.0, "method": "bootstrap over studies", "reason": None, "extra": {}},
}


def results(name: str, value: float) -> dict[str, Any]:
    """A small run of one task, without scores."""
    details = {
        **{"dataset": {"name": "d", "source": "csv", "sha256": "1" * 64}, "split": "test", "version": 1},
        **{"documents": 50, "scored": 50, "contamination": {"splits_seen": [], "note": None}},
        "metrics": {"auroc": {**ESTIMATE, "value": value, "ci95": [value - 0.05, value + 0.05]}},
    }
    model = {"card": {"name": name, "family": "dual encoder"}, "weights_sha256": "2" * 64, "precision": "fp32"}
    block = {"schema_version": 1, "model": model, "tasks": {"d_zeroshot": details}, "unsupported": {}}
    return {"results": {}, "higher_is_better": {}, "medvlm": block}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for k, name in enumerate(("first", "second")):
        (folder / name).mkdir(parents=True)
        path = folder / name / f"results_2026-01-0{k + 1}T00-00-00.000001.json"
        path.write_text(json.dumps(results(name, 0.6 + 0.2 * k)), encoding="utf-8")
    return folder


WRITES = {
    Format.html: ("report.html", "0.800"),
    Format.md: ("report.md", "| second | 0.800 [0.750, 0.850], floor 0.500 ★"),
    Format.latex: ("report.tex", r"{second} & {\textbf{0.800} {\scriptsize [0.750, 0.850]}}"),
    Format.csv: ("report_tables/accuracy_findings.csv", "second,0.8,0.75,0.85"),
}


@pytest.mark.parametrize("form", WRITES)
def test_each_format_is_written_where_it_says(medvlm: Callable[..., Any], runs: Path, form: Format) -> None:
    done = medvlm("report", runs, "--format", form.value)
    file, holds = WRITES[form]
    assert done.status == 0
    assert file.partition("/")[0] in done.out
    assert holds in re.sub(
        r"0\.\d{10,}", lambda found: f"{float(found[0]):.3g}", Path(file).read_text(encoding="utf-8")
    )


def test_a_folder_gives_all_its_runs_and_a_file_one(medvlm: Callable[..., Any], runs: Path) -> None:
    (one,) = runs.glob("first/*.json")
    assert medvlm("report", one, "-o", "one.html", "--title", "Only the first").status == 0
    text = Path("one.html").read_text(encoding="utf-8")
    assert "Only the first" in text and "1 run of 1 model" in text
    assert medvlm("report", runs, "-o", "all.html").status == 0
    assert "2 runs of 2 models" in Path("all.html").read_text(encoding="utf-8")


def test_wrong_input_is_refused_in_a_line(medvlm: Callable[..., Any], runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "found none in" in medvlm("report", tmp_path / "empty").refusal
    assert "cannot be read" in medvlm("report", tmp_path / "no.json").refusal
    assert "one of them twice" in medvlm("report", runs, runs).refusal
    assert "to be a file" in medvlm("report", runs, "-o", tmp_path / "empty").refusal
    (tmp_path / "file").touch()
    assert "to be a folder" in medvlm("report", runs, "--format", "csv", "-o", tmp_path / "file").refusal

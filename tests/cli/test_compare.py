"""`medvlm compare`: what it prints and writes, and its exit status."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from medvlm_harness.cli import app, main
from medvlm_harness.errors import UserError
from medvlm_harness.results.run_files import RunFiles

RNG = np.random.default_rng(5)
TRUTH = (RNG.random(150) < 0.4).astype(int)


def rows(signal: float) -> list[dict[str, Any]]:
    margin = signal * TRUTH + RNG.standard_normal(150)
    return [
        {
            "study": f"s{k}",
            "image": f"{k}.png",
            "label": "Edema",
            "target": int(TRUTH[k]),
            "margin": one,
            "probability": 0.5 + 0.4 * np.sign(one),
        }
        for k, one in enumerate(margin.tolist())
    ]


@pytest.fixture
def runs(make: Callable[..., RunFiles]) -> tuple[Path, Path]:
    """A good run and a poor one."""
    return make("good", rows(2)).path, make("poor", rows(0)).path


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments), "--resamples", "100"])


def test_a_worse_run_fails_where_that_is_asked(runs: tuple[Path, Path]) -> None:
    good, poor = runs
    told = compare(good, poor)
    assert told.exit_code == 0 and "| worse " in told.stdout
    failed = compare(good, poor, "--fail-if-worse")
    assert failed.exit_code == 1 and "B is worse: t:auroc" in failed.stderr
    assert compare(poor, good, "--fail-if-worse").exit_code == 0
    assert compare(good, poor, "--fail-if-worse", "--margin", "0.9").exit_code == 0


def test_a_folder_stands_for_its_newest_run(runs: tuple[Path, Path]) -> None:
    good, poor = runs
    assert str(poor) in compare(good.parent, poor.parent).stdout


def test_what_is_written_holds_all(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for suffix in ("md", "json", "csv"):
        assert compare(*runs, "-o", tmp_path / "out" / f"c.{suffix}").exit_code == 0
    block = json.loads((tmp_path / "out" / "c.json").read_text())
    assert block["disagreements"]["t"][0]["study"] and block["tests"][0]["verdict"] == "worse"
    with (tmp_path / "out" / "c.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["metric"] for row in table] == [row["metric"] for row in block["tests"]]
    assert (tmp_path / "out" / "c.md").read_text().startswith("A: m, good")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--margin", "0"], "--margin above 0"),
        (["-o", "c.txt"], r"--output to end in .md, .json, .csv, but got c.txt"),
        (["--across", "split"], "--across to be one of preprocessing, perturbation, but got split"),
    ],
)
def test_wrong_options_are_refused(runs: tuple[Path, Path], options: list[str], said: str) -> None:
    found = compare(*runs, *options)
    assert isinstance(found.exception, UserError)
    with pytest.raises(UserError, match=said):
        raise found.exception


def test_a_run_is_not_compared_with_itself(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert "both are" in str(compare(runs[0], runs[0].parent).exception)
    assert "has none" in str(compare(runs[0], tmp_path / "nothing").exception) or "is none" in str(
        compare(runs[0], tmp_path / "nothing").exception
    )


def test_a_broken_file_or_a_run_without_scores_is_refused(
    runs: tuple[Path, Path], make: Callable[..., RunFiles]
) -> None:
    good, poor = runs
    bare = compare(good, make("bare", None).path).exception
    assert isinstance(bare, UserError) and "no scores.parquet" in str(bare)
    poor.write_text(poor.read_text()[:-20])
    broken = compare(good, poor).exception
    assert isinstance(broken, UserError) and "cannot be read" in str(broken)


def test_what_is_refused_ends_with_status_2(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["medvlm", "compare", str(runs[0]), str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "nothing" in capsys.readouterr().err


def test_a_gate_on_named_metrics_looks_at_no_others(runs: tuple[Path, Path]) -> None:
    assert compare(*runs, "--fail-if-worse", "--metric", "t:auroc").exit_code == 1
    without = compare(*runs, "--fail-if-worse", "--metric", "t:auroc_edema").exception
    assert isinstance(without, UserError) and "primary metric among --metric" in str(without)

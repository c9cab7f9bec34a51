"""`medvlm sweep`: what it prints, what it leaves, and its exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.sweeps import execution

SWEEP = """
name: rounding
summary: a test
tasks: [iu_cxr_view]
models:
  - {name: tiny, model: medvlm-tiny}
  - {name: lost, model: medvlm-clip, args: {pretrained: "${WEIGHTS}"}}
axes: {precision: [fp32, bf16]}
exclude: [{model: lost, precision: bf16}]
environment: {OMP_NUM_THREADS: 1}
executor: {kind: debug}
compare: {references: [{precision: fp32}], accuracy: "iu_cxr_view:auroc"}
"""
# Instead of a run: what it writes in half of the time that torch takes to be imported.
PROGRAM = """
import sys
if "pretrained=/no/weights" in " ".join(sys.argv):
    sys.exit("error: there is nothing at /no/weights.")
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_path") + 1])
folder.mkdir(parents=True)
(folder / "results_1.json").write_text("{}")
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SWEEP, encoding="utf-8")
    return path


def test_the_shipped_sweeps_are_listed_with_what_they_need(medvlm: Callable[..., Any]) -> None:
    status, out, _ = medvlm("sweep", "list")
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["architecture"]]
    for name in ("ENCODER", "ENCODER_DECODER", "DECODER", "DUAL"):
        assert f"--set {name}=..." in line


def test_two_real_runs_are_compared_by_one_command(
    medvlm: Callable[..., Any], sweep: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    given = (sweep, "--set", "WEIGHTS=/no/weights", "--output", "out", "--only", "tiny-*")
    status, out, err = medvlm("sweep", "run", *given)
    assert status == 0, err
    assert "[1/2] tiny-fp32: done" in out and "[2/2] tiny-bf16: done" in out
    assert "Compared with tiny-fp32" in out
    written = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {"comparison.json", "comparison.md", "tradeoff.png", "tradeoff.csv"} <= written
    block = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    (group,) = block["groups"]
    assert (group["reference"], group["place"]) == ({"precision": "fp32"}, {"model": "tiny"})
    assert "tiny-bf16" in group["comparison"]["tasks"]["iu_cxr_view"]["metrics"]["balanced_accuracy"]["differences"]
    status, again, _ = medvlm("sweep", "run", *given)
    assert status == 0 and "2 cells, 0 to run" in again
    assert medvlm("sweep", "table", "out").out == out[out.index("Compared with") :]


def test_a_cell_that_fails_is_shown_with_its_reason_and_the_status_tells(
    medvlm: Callable[..., Any], sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setattr(execution, "COMMAND", (sys.executable, "-S", str(program)))
    given = (sweep, "--set", "WEIGHTS=/no/weights", "--output", "out", "--only", "lost-fp32")
    status, out, err = medvlm("sweep", "run", *given)
    assert status == 1
    assert "[1/1] lost-fp32: failed (0 s): error: there is nothing at /no/weights." in out
    assert "1 cells: 1 failed" in out and "lost-fp32: failed" in err
    status, out, _ = medvlm("sweep", "status", "out")
    assert status == 0
    states = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    assert states["tiny-fp32"] == ["waiting"] and states["lost-fp32"][0] == "failed"
    assert "error: there is nothing at /no/weights." in " ".join(states["lost-fp32"])
    status, out, _ = medvlm("sweep", "run", *given)
    assert status == 1 and "1 cells, 0 to run" in out
    status, out, _ = medvlm("sweep", "run", *given, "--retry-failed")
    assert status == 1 and "1 cells, 1 to run" in out


def test_the_plan_shows_each_cell_and_its_command(medvlm: Callable[..., Any], sweep: Path) -> None:
    status, out, err = medvlm("sweep", "plan", sweep, "--set", "WEIGHTS=/no/weights", "--limit", "8")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["tiny-bf16", "tiny", "bf16", "iu_cxr_view", "waiting"] in rows
    (command,) = [line for line in out.splitlines() if "pretrained=/no/weights" in line]
    expected = "OMP_NUM_THREADS=1 medvlm run --model medvlm-clip --model_args pretrained=/no/weights,precision=fp32"
    assert command.startswith(f"{expected} --tasks iu_cxr_view --limit 8 --output_path ")
    assert out.splitlines()[-1] == "3 cells: 3 waiting"


@pytest.mark.parametrize(
    ("changed", "options", "expected"),
    [
        ({}, (), "mine.yaml needs 1 more value: --set WEIGHTS=..."),
        ({}, ("--set", "WEIGHTS"), "Expected --set NAME=VALUE, but got 'WEIGHTS'"),
        ({"iu_cxr_view": "iu_cxr_veiw"}, (), "Did you mean iu_cxr_view"),
        ({"medvlm-tiny": "medvlm-tinny"}, (), "Unknown model 'medvlm-tinny'. Did you mean medvlm-tiny"),
        (
            {"{precision: [fp32, bf16]}": "{quantisation: [fp32, bf16]}", "precision: ": "quantisation: "},
            (),
            "tiny-fp32",
        ),
        ({"pretrained": "weights"}, (), "lost-fp32: Unknown option 'weights' of model medvlm-clip"),
        ({"kind: debug": "kind: slurm"}, (), "expected `minutes:` of a cell under Slurm"),
        ({}, ("--only", "tinny-*"), "No cell is called 'tinny-*'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    medvlm: Callable[..., Any],
    sweep: Path,
    tmp_path: Path,
    changed: dict[str, str],
    options: tuple[str, ...],
    expected: str,
) -> None:
    text = sweep.read_text(encoding="utf-8")
    for old, new in changed.items():
        text = text.replace(old, new)
    sweep.write_text(text, encoding="utf-8")
    given = () if "WEIGHTS" in expected else ("--set", "WEIGHTS=/no/weights")
    assert expected in medvlm("sweep", "run", sweep, *given, *options).refusal
    assert not (tmp_path / "sweeps").exists()


def test_a_folder_without_a_sweep_is_refused(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    assert "has no sweep.json" in medvlm("sweep", "status", tmp_path).refusal
    assert "has no sweep.json" in medvlm("sweep", "table", tmp_path).refusal

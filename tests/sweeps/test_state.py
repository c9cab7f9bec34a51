from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.sweeps.cells import make_cells
from medvlm_harness.sweeps.declaration import Sweep
from medvlm_harness.sweeps.state import (
    SILENT,
    CellFolder,
    Outcome,
    Process,
    failure,
    locked,
    read_record,
    write_record,
)

OUTCOME = Outcome("k", 0, None, "run/results_1.json", "here", 0.0, 3.0, 50.0)


@pytest.fixture
def cell(tmp_path: Path) -> CellFolder:
    """A cell that nothing was done for."""
    made = CellFolder(tmp_path, "cell", "k")
    made.path.mkdir(parents=True)
    return made


@pytest.fixture
def dead() -> Process:
    """One that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    noted = Process.of(process.pid)
    process.wait()
    return noted


def test_a_process_is_alive_while_it_is_that_one(dead: Process) -> None:
    own = Process.of(os.getpid())
    assert own.alive() and not dead.alive()
    assert not replace(own, born=1.0).alive()  # another had its number


def test_a_process_that_nobody_has_waited_for_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    noted = Process.of(process.pid)
    assert noted.alive()
    process.kill()
    end = time.monotonic() + 10
    while noted.alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert not noted.alive()
    process.communicate()


def test_a_cell_goes_from_waiting_to_done(cell: CellFolder) -> None:
    assert cell.state().status == "waiting"
    cell.submitted("local", str(os.getpid()))
    assert cell.state().status == "running"
    cell.started([Process.of(os.getpid())])
    assert cell.state().status == "running"
    cell.run.mkdir()
    (cell.run / "results_1.json").touch()
    cell.ended(OUTCOME)
    state = cell.state()
    assert (state.status, state.seconds, state.peak_ram_mib) == ("done", 3.0, 50.0)


def test_the_outcome_of_another_key_counts_for_nothing(cell: CellFolder) -> None:
    cell.ended(replace(OUTCOME, key="other"))
    assert cell.state().status == "waiting"


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (replace(OUTCOME, exit_code=2, reason="error: x"), "failed"),
        (replace(OUTCOME, exit_code=-9, reason="ended by SIGKILL"), "interrupted"),
        (replace(OUTCOME, exit_code=None, reason="stopped after 5 minutes"), "interrupted"),
        (OUTCOME, "waiting"),  # its results are gone
    ],
)
def test_how_a_cell_ended_decides_its_state(cell: CellFolder, outcome: Outcome, status: str) -> None:
    cell.ended(outcome)
    assert cell.state().status == status


def test_a_cell_whose_processes_are_gone_is_interrupted(cell: CellFolder, dead: Process) -> None:
    cell.started([dead, dead])
    assert cell.state().status == "interrupted"
    cell.started([dead, Process.of(os.getpid())])
    assert cell.state().status == "running"


def test_a_cell_elsewhere_is_at_work_while_it_gives_signs(cell: CellFolder) -> None:
    elsewhere = Process("another-machine", 1, 0.0)
    cell.started([elsewhere])
    assert cell.state().status == "running"
    silent = time.time() - SILENT - 1
    os.utime(cell.path / "running.json", (silent, silent))
    assert cell.state().status == "interrupted"
    cell.beat()
    assert cell.state().status == "running"


def test_an_attempt_finds_nothing_of_the_one_before(cell: CellFolder) -> None:
    cell.run.mkdir()
    (cell.run / "results_0.json").touch()
    cell.submitted("slurm", "7")
    cell.ended(OUTCOME)
    cell.clear()
    assert cell.state().status == "waiting" and list(cell.path.iterdir()) == []


def test_a_damaged_file_is_named(cell: CellFolder) -> None:
    (cell.path / "outcome.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"outcome\.json is damaged: delete it"):
        cell.state()


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("INFO x\nerror: no file.\n       Look there.\nmore\n", "error: no file. Look there."),
        ("error: first\nerror: second\n", "error: second"),
        ("Traceback\n  File x\nKeyError: 'y'\n\n", "KeyError: 'y'"),
        ("", "it printed nothing"),
    ],
)
def test_the_reason_is_the_last_error_line_or_the_last_line(tmp_path: Path, printed: str, reason: str) -> None:
    path = tmp_path / "stderr.txt"
    path.write_text(printed, encoding="utf-8")
    assert failure(path) == reason


def test_a_folder_is_one_sweeps(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    sweep = sweep_of("name: s\ntasks: [t]\nmodels: [{model: m}]\ncompare: {references: [{model: m}]}")
    write_record(tmp_path, sweep, make_cells(sweep))
    recorded = read_record(tmp_path)
    assert recorded.name == "s" and recorded.compare.references == ({"model": "m"},)
    assert [name for name, _ in recorded.folders(tmp_path)] == ["m"]
    assert recorded.cells[0]["command"].startswith("medvlm run --model m --tasks t --output_path ")
    with pytest.raises(UserError, match="holds the sweep s"):
        write_record(tmp_path, replace(sweep, name="other"), [])
    with pytest.raises(UserError, match=r"has no sweep\.json"):
        read_record(tmp_path / "nowhere")


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    with locked(tmp_path), pytest.raises(UserError, match="is being run already"), locked(tmp_path):
        pass

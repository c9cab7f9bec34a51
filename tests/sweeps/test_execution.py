"""Cells run, fail, are killed and go on; what runs in them is a program of a few lines."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.sweeps import execution
from medvlm_harness.sweeps.cells import Cell, make_cells
from medvlm_harness.sweeps.declaration import Sweep
from medvlm_harness.sweeps.executor import Executor
from medvlm_harness.sweeps.state import CellFolder, CellState, controller, locked

PATIENCE = 30  # seconds, for what takes two


def grid(does: Sequence[str], wait: Path | None = None) -> str:
    """A model for each; what stands behind a dot only tells two apart."""
    waits = "" if wait is None else f", wait: {wait}"
    models = "".join(
        f"  - {{name: '{one}', model: m, args: {{does: {one.partition('.')[0]}, called: a{k}{waits}}}}}\n"
        for k, one in enumerate(does)
    )
    return f"name: s\ntasks: [t]\nenvironment: {{OMP_NUM_THREADS: 2}}\nmodels:\n{models}"


def run(cells: Sequence[Cell], folder: Path, kind: str = "debug", parallel: int = 1, retry: bool = False) -> list[str]:
    """Run what is left; the names of the cells that ended, in that order."""
    ended: list[str] = []
    left = execution.to_run(cells, folder, retry_failed=retry)
    executor = Executor(kind=kind, parallel=parallel, minutes=5)  # type: ignore[arg-type]
    execution.run_cells(left, folder, executor, lambda cell, _: ended.append(cell.name))
    return ended


def states(cells: Sequence[Cell], folder: Path) -> dict[str, CellState]:
    return {cell.name: files(cell, folder).state() for cell in cells}


def files(cell: Cell, folder: Path) -> CellFolder:
    return CellFolder(folder, cell.name, cell.key)


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def test_each_cell_ends_in_its_own_way_and_none_stops_the_rest(
    program: Path, sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    cells, folder = make_cells(sweep_of(grid(["fail", "die", "nothing", "work"]))), tmp_path / "out"
    assert run(cells, folder) == ["fail", "die", "nothing", "work"]
    found = states(cells, folder)
    assert {name: state.status for name, state in found.items()} == {
        "fail": "failed",
        "die": "interrupted",
        "nothing": "failed",
        "work": "done",
    }
    assert found["fail"].reason == "error: nothing is there. Look elsewhere."
    assert found["die"].reason == "ended by SIGKILL: out of memory?"
    assert found["nothing"].reason == "it wrote no results: it printed nothing"
    assert found["work"].reason is None and (found["work"].seconds or 0) > 0
    assert found["work"].peak_ram_mib is None  # this process is larger, and a child counts as large as its parent
    work = files(cells[-1], folder)
    assert work.stdout.read_text(encoding="utf-8").split() == ["variable", "2", "None"]
    assert work.results() == work.run / "model" / "results_1.json"


def test_only_what_is_not_done_runs_again(program: Path, sweep_of: Callable[..., Sweep], tmp_path: Path) -> None:
    cells, folder = make_cells(sweep_of(grid(["fail", "die", "work"]))), tmp_path / "out"
    run(cells, folder)
    assert run(cells, folder) == ["die"]  # what was killed goes on; what failed would fail again
    assert run(cells, folder, retry=True) == ["fail", "die"]
    program.write_text(program.read_text(encoding="utf-8").replace('== "fail"', '== "work"'), encoding="utf-8")
    changed = make_cells(sweep_of(grid(["fail", "die", "work"]) + "limit: 3\n"))
    assert run(changed, folder) == ["fail", "die", "work"]  # another sweep: nothing of it is done
    assert states(cells, folder)["work"].status == "done"


def test_results_that_were_deleted_are_made_again(
    program: Path, sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    cells, folder = make_cells(sweep_of(grid(["work"]))), tmp_path / "out"
    run(cells, folder)
    results = files(cells[0], folder).results()
    assert results is not None
    results.unlink()
    assert states(cells, folder)["work"] == CellState("waiting", "its results are no longer there", *[None] * 2)
    assert run(cells, folder) == ["work"]


@pytest.fixture
def controlled(program: Path, sweep_of: Callable[..., Sweep], tmp_path: Path) -> tuple[list[Cell], Path, list[str]]:
    """Two cells that wait for the file `go`; the folder; and a command that runs both at once on this machine."""
    cells = make_cells(sweep_of(grid(["work", "work.2"], wait=tmp_path / "go")))
    (tmp_path / "cells.pickle").write_bytes(pickle.dumps(cells))
    script = tmp_path / "controller.py"
    script.write_text(
        f"""
import pickle, signal, sys
from pathlib import Path
from medvlm_harness.sweeps import execution
from medvlm_harness.sweeps.executor import Executor
from medvlm_harness.sweeps.state import locked
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
execution.COMMAND = (sys.executable, "-S", {str(program)!r})
cells = pickle.loads(Path({str(tmp_path / "cells.pickle")!r}).read_bytes())
folder = Path({str(tmp_path / "out")!r})
finished = lambda cell, state: print(cell.name, state.status)
with locked(folder):
    execution.run_cells(cells, folder, Executor(parallel=2, minutes=5), finished)
""",
        encoding="utf-8",
    )
    return cells, tmp_path / "out", [sys.executable, str(script)]


def at_work(cells: Sequence[Cell], folder: Path) -> bool:
    return all(files(cell, folder).processes() for cell in cells)


def test_a_killed_sweep_leaves_its_cells_at_work_and_the_next_one_waits_for_them(
    controlled: tuple[list[Cell], Path, list[str]], tmp_path: Path
) -> None:
    cells, folder, command = controlled
    seen = {**os.environ, "CUDA_VISIBLE_DEVICES": "5"}  # which submitit hides from local jobs
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=seen)
    until(lambda: at_work(cells, folder))
    assert controller(folder) is not None
    with pytest.raises(UserError, match=f"is being run already \\(process {process.pid} "), locked(folder):
        pass
    process.kill()
    process.wait()
    assert controller(folder) is None
    assert {state.status for state in states(cells, folder).values()} == {"running"}
    before = [files(cell, folder).processes() for cell in cells]
    (tmp_path / "go").touch()
    with locked(folder):
        assert sorted(run(cells, folder, kind="local", parallel=2)) == ["work", "work.2"]
    found = states(cells, folder)
    assert {state.status for state in found.values()} == {"done"}
    assert 128 < (found["work"].peak_ram_mib or 0) < 200
    assert files(cells[0], folder).stdout.read_text(encoding="utf-8").split() == ["variable", "2", "5"]
    assert [files(cell, folder).processes() for cell in cells] == before  # they were not started a second time


def test_ctrl_c_stops_the_cells_and_says_so(controlled: tuple[list[Cell], Path, list[str]], tmp_path: Path) -> None:
    cells, folder, command = controlled
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    until(lambda: at_work(cells, folder))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    assert process.wait(PATIENCE) == -signal.SIGINT
    found = states(cells, folder)
    assert {state.status for state in found.values()} == {"interrupted"}
    assert {state.reason for state in found.values()} == {"ended by SIGTERM"}
    assert not any(one.alive() for cell in cells for one in files(cell, folder).processes()[1:])
    (tmp_path / "go").touch()
    assert run(cells, folder) == ["work", "work.2"]


def test_a_job_that_is_killed_leaves_its_run_which_counts_as_running_until_it_ends(
    controlled: tuple[list[Cell], Path, list[str]], tmp_path: Path
) -> None:
    cells, folder, command = controlled
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    until(lambda: at_work(cells, folder))
    job, its_run = files(cells[0], folder).processes()
    os.kill(job.pid, signal.SIGKILL)
    until(lambda: not job.alive())
    assert states(cells, folder)["work"].status == "running"
    os.kill(its_run.pid, signal.SIGKILL)
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=PATIENCE)
    assert sorted(out.splitlines()) == ["work interrupted", "work.2 done"]
    assert run(cells, folder) == ["work"]


def test_the_devices_of_local_cells_are_those_of_this_process_or_one_for_each_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert execution._devices(Executor(), 1) == {"CUDA_VISIBLE_DEVICES": "5,6"}
    assert execution._devices(Executor(devices=(2, 3)), 1) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert execution._devices(Executor(kind="slurm", minutes=5), 1) == {}  # Slurm gives each its own


def test_slurm_runs_all_cells_as_one_array(
    program: Path, slurm: Path, sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    cells, folder = make_cells(sweep_of(grid(["work", "fail", "work.2"]))), tmp_path / "out"
    assert sorted(run(cells, folder, kind="slurm", parallel=2)) == ["fail", "work", "work.2"]
    found = states(cells, folder)
    assert [state.status for state in found.values()] == ["done", "failed", "done"]
    assert "--array=0-2%2" in (slurm / "submitted.sh").read_text(encoding="utf-8")
    assert files(cells[1], folder).job()["id"] == "7_1"


def test_a_queued_slurm_job_is_waited_for_and_not_submitted_again(
    program: Path, slurm: Path, sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    cells, folder = make_cells(sweep_of(grid(["work"], wait=go))), tmp_path / "out"
    executor = Executor(kind="slurm", minutes=5)
    made = execution.make_executor(executor, folder)
    execution._submit(made, cells, [0], folder, executor)  # as a process does that is killed then
    assert states(cells, folder)["work"].status in ("queued", "running")
    (slurm / "submitted.sh").unlink()
    go.touch()
    assert run(cells, folder, kind="slurm") == ["work"]
    assert states(cells, folder)["work"].status == "done"
    assert not (slurm / "submitted.sh").exists()


def test_a_slurm_job_that_was_cancelled_is_interrupted(
    program: Path,
    slurm: Path,
    sweep_of: Callable[..., Sweep],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution, "LATE", 0.2)
    sbatch = slurm.parent / "programs" / "sbatch"
    sbatch.write_text("#!/bin/bash\necho Submitted batch job 7\n", encoding="utf-8")  # and it never starts
    (slurm / "7").write_text("0", encoding="utf-8")  # which sacct takes for one that is over
    cells, folder = make_cells(sweep_of(grid(["work"]))), tmp_path / "out"
    run(cells, folder, kind="slurm")
    state = states(cells, folder)["work"]
    assert state.status == "interrupted" and (state.reason or "").startswith("Slurm job 7 ended without a word")


def test_without_slurm_nothing_is_submitted(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match='cannot run cells by slurm: Could not detect "srun"'):
        execution.make_executor(Executor(kind="slurm", minutes=5), tmp_path / "out")

"""Run the cells of a sweep that are not done, through submitit, each in a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.sweeps.cells import Cell
from medvlm_harness.sweeps.executor import Executor
from medvlm_harness.sweeps.job import run_cell
from medvlm_harness.sweeps.state import CellFolder, CellState, Outcome

__all__ = ["make_executor", "run_cells", "to_run"]

COMMAND = (sys.executable, "-m", "medvlm_harness")  # what `medvlm` on the PATH may not be
POLL = {"local": 0.2, "slurm": 5.0, "debug": 0.0}  # seconds
LATE = 30  # seconds that the outcome of a Slurm job may need to show on a shared file system
PATIENCE = 15  # seconds for stopped cells to end

Finished = Callable[[Cell, CellState], None]


def to_run(cells: Sequence[Cell], folder: Path, *, retry_failed: bool) -> list[Cell]:
    """The cells that `run_cells` takes: all but those that are done, and those that failed unless asked for."""
    left = {"done"} if retry_failed else {"done", "failed"}
    return [cell for cell in cells if _folder(cell, folder).state().status not in left]


def run_cells(cells: Sequence[Cell], folder: Path, executor: Executor, finished: Finished) -> None:
    """Run cells until all have ended. Cells at work already, of a sweep that was killed, are waited for.

    Args:
        cells: what `to_run` gives.
        folder: of the sweep, held by `locked`.
        executor: where.
        finished: called as each ends.

    Raises:
        UserError: if submitit cannot submit.
        KeyboardInterrupt: after the local cells at work were stopped.
    """
    submitter = make_executor(executor, folder)
    at_work: dict[Cell, tuple[int, Any]] = {}  # cell -> its place among the parallel ones, its job
    waiting = []
    for cell in cells:
        job = _still_there(cell, folder)
        if job is None:
            waiting.append(cell)
        else:
            at_work[cell] = (len(at_work), job)
    try:
        while waiting or at_work:
            free = executor.parallel - len(at_work) if executor.kind != "slurm" else len(waiting)
            batch, waiting = waiting[: max(free, 0)], waiting[max(free, 0) :]
            taken = {slot for slot, _ in at_work.values()}
            slots = [slot for slot in range(len(batch) + len(taken)) if slot not in taken]
            jobs = _submit(submitter, batch, slots, folder, executor)
            at_work |= {cell: (slot, job) for cell, slot, job in zip(batch, slots, jobs, strict=False)}
            ended = [cell for cell, (_, job) in at_work.items() if _has_ended(cell, job, folder, executor)]
            for cell in ended:
                del at_work[cell]
                finished(cell, _folder(cell, folder).state())
            if not ended:
                time.sleep(POLL[executor.kind])
    except KeyboardInterrupt:
        if executor.kind == "local":
            _stop(list(at_work), folder)
        raise


def make_executor(executor: Executor, folder: Path) -> Any:
    """Submitit's executor, whose own files go to OUT/jobs.

    Raises:
        UserError: if Slurm is not here, or a parameter is wrong.
    """
    import submitit

    try:
        made = submitit.AutoExecutor(folder=folder.absolute() / "jobs" / "%j", cluster=executor.kind)
        made.update_parameters(**executor.parameters(f"medvlm-{folder.name}"))
    except (RuntimeError, NameError, ValueError, AssertionError) as error:
        raise UserError(f"submitit cannot run cells by {executor.kind}: {first_line(error)}") from error
    return made


def _submit(submitter: Any, batch: Sequence[Cell], slots: Sequence[int], folder: Path, executor: Executor) -> list[Any]:
    """Hand cells over; under Slurm as one array."""
    from submitit.core.utils import FailedSubmissionError

    if not batch:
        return []
    calls = []
    for cell, slot in zip(batch, slots, strict=False):
        _folder(cell, folder).clear()
        environment = {**_devices(executor, slot), **cell.environment}
        command = (*COMMAND, *cell.arguments, "--output_path", str(_folder(cell, folder.absolute()).run))
        calls.append((str(folder.absolute()), cell.name, cell.key, command, environment, executor.minutes))
    try:
        with _deaf_to_interrupts(executor):
            jobs = submitter.map_array(run_cell, *zip(*calls, strict=True))
    except (FailedSubmissionError, OSError) as error:
        raise UserError(f"submitit could not submit: {first_line(error)}") from error
    for cell, job in zip(batch, jobs, strict=True):
        if executor.kind != "debug":
            _folder(cell, folder).submitted(executor.kind, job.job_id)
    return list(jobs)


def _devices(executor: Executor, slot: int) -> dict[str, str | None]:
    """Submitit hides all CUDA devices from local jobs that ask for none; cells see what this process sees."""
    if executor.kind != "local":
        return {}
    return {"CUDA_VISIBLE_DEVICES": executor.devices_of(slot) or os.environ.get("CUDA_VISIBLE_DEVICES")}


@contextmanager
def _deaf_to_interrupts(executor: Executor) -> Iterator[None]:
    """Let local jobs start deaf to Ctrl-C, which a terminal sends to all: this process stops them, in order.

    A job inherits that the signal is blocked; here it is delivered after the job was started.
    """
    if executor.kind != "local":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _still_there(cell: Cell, folder: Path) -> Any:
    """The job of a cell that an earlier process submitted and that has not ended; None if there is none."""
    files = _folder(cell, folder)
    status, job = files.state().status, files.job()
    if status in ("queued", "running") and job.get("kind") == "slurm":
        import submitit

        submitted = submitit.SlurmJob(folder.absolute() / "jobs" / "%j", job["id"])
        return None if submitted.done(force_check=True) else submitted
    return _Orphan(files) if status == "running" else None


class _Orphan:
    """A local cell whose sweep was killed: submitit's own processes go on without it."""

    def __init__(self, files: CellFolder) -> None:
        self._files = files

    def done(self) -> bool:
        return self._files.state().status != "running"


def _has_ended(cell: Cell, job: Any, folder: Path, executor: Executor) -> bool:
    if not job.done():
        return False
    files = _folder(cell, folder)
    if files.state().status not in ("queued", "running"):
        return True
    if executor.kind == "slurm" and _is_late(job):
        reason = f"Slurm job {job.job_id} ended without a word: cancelled, or its machine went down"
        files.ended(Outcome(cell.key, None, reason, None, "", time.time(), 0.0, None))
    # The run of a local job that was killed goes on, and ends by itself.
    return False


def _is_late(job: Any) -> bool:
    """Whether a Slurm job has been over for so long that no word of it will come."""
    since: float = vars(job).setdefault("_medvlm_over_since", time.monotonic())
    return time.monotonic() - since > LATE


def _stop(cells: Sequence[Cell], folder: Path) -> None:
    """End the runs at work; what they computed is in the store, and each notes that it was stopped."""
    until = time.monotonic() + PATIENCE
    stopped: set[int] = set()
    while time.monotonic() < until:
        files = [_folder(cell, folder) for cell in cells]
        running = [one for one in files if one.state().status == "running"]
        if not running:
            return
        for one in running:
            for process in one.processes()[1:]:  # the first is the job, which waits for the run
                if process.here and process.pid not in stopped and process.alive():
                    os.kill(process.pid, signal.SIGTERM)
                    stopped.add(process.pid)
        time.sleep(0.1)
    logging.getLogger("lm_eval.medvlm").warning("some cells are still at work; `medvlm sweep status` shows them")


def _folder(cell: Cell, folder: Path) -> CellFolder:
    return CellFolder(folder, cell.name, cell.key)

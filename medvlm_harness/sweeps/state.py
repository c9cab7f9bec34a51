"""What has become of the cells, read from files alone: also while a sweep runs, and after it was killed.

    OUT/sweep.json             the cells, their commands, and how they are compared
    OUT/controller.json        the process that runs them, while it does
    OUT/cells/<cell>-<key>/    job.json       what was submitted
                               running.json   the processes at work
                               outcome.json   how it ended
                               stdout.txt, stderr.txt
                               run/           what the run itself writes

A cell is done when its outcome says so, names the cell's key, and the results are there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from medvlm_harness.errors import UserError
from medvlm_harness.files import write_json
from medvlm_harness.sweeps.cells import Cell
from medvlm_harness.sweeps.declaration import Comparison, Sweep

__all__ = ["CellFolder", "CellState", "Outcome", "Process", "Recorded", "locked", "read_record", "write_record"]

Status = Literal["waiting", "queued", "running", "done", "failed", "interrupted"]
SET = 5  # seconds by which a clock may be corrected in between
SILENT = 90  # seconds after which a process on another machine that gives no sign counts as gone; it does every 10


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine or another."""

    host: str
    pid: int
    born: float | None  # seconds since 1970: a later process may have its number; None: it had ended already

    @classmethod
    def of(cls, pid: int) -> Process:
        """One of this machine."""
        return cls(socket.gethostname(), pid, _born(pid))

    @property
    def here(self) -> bool:
        """Whether it is of this machine."""
        return self.host == socket.gethostname()

    def alive(self) -> bool:
        """Whether it still runs; asked on its own machine."""
        born = _born(self.pid)
        # The clock that it is counted by is set from time to time.
        return born is not None and self.born is not None and abs(born - self.born) < SET


def _born(pid: int) -> float | None:
    """Start of a process; None of one that has ended, also where nobody has waited for it yet."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended."""

    key: str
    exit_code: int | None  # None where the run was stopped from outside before it ended
    reason: str | None  # why it did not succeed
    results: str | None  # file, relative to the cell's folder
    host: str
    started: float  # seconds since 1970
    seconds: float
    peak_ram_mib: float | None

    @property
    def interrupted(self) -> bool:
        """Ended from outside: by a signal, or out of time. Another attempt goes on from what the store has."""
        return self.exit_code is None or self.exit_code < 0


@dataclass(frozen=True, slots=True)
class CellState:
    """What `status` says of a cell."""

    status: Status
    reason: str | None = None
    seconds: float | None = None
    peak_ram_mib: float | None = None


class CellFolder:
    """The files of one cell."""

    def __init__(self, sweep: Path, name: str, key: str) -> None:
        self.path = sweep / "cells" / f"{name}-{key}"
        self.key = key
        self.run = self.path / "run"
        self.stdout, self.stderr = self.path / "stdout.txt", self.path / "stderr.txt"
        self._job, self._running = self.path / "job.json", self.path / "running.json"
        self._outcome = self.path / "outcome.json"

    def clear(self) -> None:
        """Make room for an attempt: what one before it left would be taken for its own."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in (self._outcome, self._running, self._job):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.run, ignore_errors=True)

    def submitted(self, kind: str, job: str) -> None:
        """Note that an attempt was handed over, as which job."""
        process = asdict(Process.of(int(job))) if kind == "local" else None
        write_json(self._job, {"kind": kind, "id": job, "process": process})

    def job(self) -> Mapping[str, Any]:
        """What `submitted` noted; empty where nothing was."""
        return _read(self._job) or {}

    def started(self, processes: Sequence[Process]) -> None:
        """Note the processes at work."""
        write_json(self._running, {"started": time.time(), "processes": [asdict(one) for one in processes]})

    def beat(self) -> None:
        """Give a sign that they are."""
        self._running.touch()

    def ended(self, outcome: Outcome) -> None:
        """Note how it ended."""
        write_json(self._outcome, asdict(outcome))

    def processes(self) -> list[Process]:
        """Those at work, as noted."""
        noted = _read(self._running) or {}
        return [Process(**one) for one in noted.get("processes", ())]

    def results(self) -> Path | None:
        """The results file of a cell that is done."""
        outcome = self.outcome()
        path = self.path / outcome.results if outcome is not None and outcome.results else None
        return path if path is not None and path.is_file() else None

    def outcome(self) -> Outcome | None:
        """How the cell ended; None while it has not."""
        found = _read(self._outcome)
        outcome = None if found is None else Outcome(**found)
        return outcome if outcome is not None and outcome.key == self.key else None

    def state(self) -> CellState:
        """What has become of the cell."""
        outcome = self.outcome()
        if outcome is not None:
            return self._ended(outcome)
        noted = _read(self._running)
        if noted is not None:
            seconds = time.time() - noted["started"]
            if self._at_work([Process(**one) for one in noted["processes"]]):
                return CellState("running", seconds=seconds)
            return CellState("interrupted", "its process ended without a word: killed, or the machine went down")
        job = self.job()
        if job.get("kind") == "slurm":
            return CellState("queued", f"Slurm job {job['id']}")
        if job.get("kind") == "local":
            starter = Process(**job["process"])
            if not starter.here or starter.alive():
                return CellState("running", seconds=0.0)
            return CellState("interrupted", f"its job ended before the run began: see jobs/{job['id']}")
        return CellState("waiting")

    def _ended(self, outcome: Outcome) -> CellState:
        beside = outcome.seconds, outcome.peak_ram_mib
        if outcome.interrupted:
            return CellState("interrupted", outcome.reason, *beside)
        if outcome.reason is not None:
            return CellState("failed", outcome.reason, *beside)
        if self.results() is None:
            return CellState("waiting", "its results are no longer there")
        return CellState("done", None, *beside)

    def _at_work(self, processes: Sequence[Process]) -> bool:
        if any(one.here for one in processes):
            return any(one.here and one.alive() for one in processes)
        try:
            return time.time() - self._running.stat().st_mtime < SILENT
        except FileNotFoundError:  # it ended this moment
            return False


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the folder of a sweep says of it."""

    name: str
    cells: tuple[Mapping[str, Any], ...]  # name, key, place, command
    compare: Comparison

    def folders(self, folder: Path) -> Iterator[tuple[str, CellFolder]]:
        """Each cell's name and files."""
        for cell in self.cells:
            yield cell["name"], CellFolder(folder, cell["name"], cell["key"])


def write_record(folder: Path, sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Write sweep.json.

    Raises:
        UserError: if the folder is another sweep's.
    """
    path = folder / "sweep.json"
    before = _read(path)
    if before is not None and before.get("name") != sweep.name:
        raise UserError(f"{folder} holds the sweep {before.get('name')}: name another folder with --output.")
    listed = [
        {
            "name": cell.name,
            "key": cell.key,
            "place": dict(cell.place),
            "command": cell.command(CellFolder(folder, cell.name, cell.key).run),
        }
        for cell in cells
    ]
    write_json(path, {"name": sweep.name, "compare": asdict(sweep.compare), "cells": listed})


def read_record(folder: Path) -> Recorded:
    """Read sweep.json.

    Raises:
        UserError: if the folder has none.
    """
    found = _read(folder / "sweep.json")
    if found is None:
        raise UserError(f"Expected the output folder of a sweep, but {folder} has no sweep.json.")
    try:
        compare = Comparison(tuple(found["compare"]["references"]), found["compare"]["accuracy"])
        return Recorded(found["name"], tuple(found["cells"]), compare)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'sweep.json'} is of another version: run the sweep again. ({error})") from error


def controller(folder: Path) -> Process | None:
    """The process that runs the sweep; None if none does."""
    found = _read(folder / "controller.json")
    process = None if found is None else Process(**found)
    return process if process is not None and (not process.here or process.alive()) else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, so that no other process starts its cells a second time; a killed one lets it go.

    Raises:
        UserError: if another process holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = controller(folder)
        by = "" if holder is None else f" (process {holder.pid} on {holder.host})"
        raise UserError(f"This sweep is being run already{by}: `medvlm sweep status {folder}` shows it.") from error
    note = folder / "controller.json"
    try:
        write_json(note, asdict(Process.of(os.getpid())))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def failure(stderr: Path) -> str:
    """Why a run failed, by what it printed: its last `error:` line with what follows it, else its last line."""
    lines = [line.rstrip() for line in stderr.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line.strip()]
    errors = [k for k, line in enumerate(lines) if re.match(r"(medvlm: |lm_eval: )?error: ", line)]
    if errors:
        first, *rest = lines[errors[-1] :]
        more = []
        for line in rest:
            if not line.startswith(" "):
                break
            more.append(line.strip())
        return " ".join([first, *more])
    return lines[-1].strip() if lines else "it printed nothing"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged: delete it. ({error})") from error
    return found

"""What submitit runs: one cell, as a process of its own, and a note on how it ended. Imports nothing heavy."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from medvlm_harness.sweeps.state import CellFolder, Outcome, Process, failure

__all__ = ["run_cell"]

BEAT = 10  # seconds
POLL = 0.1  # seconds


def run_cell(
    sweep: str,
    name: str,
    key: str,
    command: Sequence[str],
    environment: Mapping[str, str | None],
    minutes: int | None,
) -> None:
    """Run a cell and write its outcome; nothing is raised where the run fails.

    Args:
        sweep: the sweep's folder.
        name: of the cell.
        key: of the cell.
        command: program and arguments; no shell reads them.
        environment: variables to set; None takes one away.
        minutes: after which submitit or Slurm ends it, for the reason.
    """
    from submitit.core.utils import UncompletedJobError

    folder = CellFolder(Path(sweep), name, key)
    changed = {**os.environ, **environment}
    variables = {variable: value for variable, value in changed.items() if value is not None}
    started = time.time()
    with folder.stdout.open("w") as out, folder.stderr.open("w") as err:
        process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=variables)
        exit_code, peak, reason = None, None, None
        try:
            folder.started([Process.of(os.getpid()), Process.of(process.pid)])
            exit_code, peak = _wait(process, folder)
        except UncompletedJobError:  # raised out of submitit's signal handler
            reason = f"stopped after {(time.time() - started) / 60:.0f} of {minutes} minutes (executor: minutes)"
        finally:
            if process.returncode is None:
                process.terminate()  # a run may be ended at any moment: what it has computed is in the store
                process.wait()
    results = _results(folder)
    if exit_code is not None and exit_code < 0:
        reason = f"ended by {signal.Signals(-exit_code).name}"
        reason += ": out of memory?" if -exit_code == signal.SIGKILL else ""
    elif exit_code:
        reason = failure(folder.stderr)
    elif exit_code == 0 and results is None:
        reason = f"it wrote no results: {failure(folder.stderr)}"
    seconds = time.time() - started
    folder.ended(Outcome(key, exit_code, reason, results, socket.gethostname(), started, seconds, peak))


def _wait(process: subprocess.Popen[bytes], folder: CellFolder) -> tuple[int, float | None]:
    """Exit code, negative for a signal, and the largest resident memory of the process in MiB.

    Until it runs its own program a child counts as large as its parent: no more than that says nothing.
    """
    beat = time.monotonic()
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            unit = 2**20 if sys.platform == "darwin" else 2**10
            return process.returncode, usage.ru_maxrss / unit if usage.ru_maxrss > own else None
        if time.monotonic() - beat > BEAT:
            folder.beat()
            beat = time.monotonic()
        time.sleep(POLL)


def _results(folder: CellFolder) -> str | None:
    found = sorted(folder.run.rglob("results_*.json"))
    return str(found[-1].relative_to(folder.path)) if found else None

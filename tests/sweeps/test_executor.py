from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from medvlm_harness.sweeps.declaration import Sweep
from medvlm_harness.sweeps.execution import make_executor
from medvlm_harness.sweeps.executor import WEEK, Executor

TEXT = """
name: s
tasks: [t]
models: [{model: m}]
executor:
  kind: slurm
  parallel: 3
  minutes: 90
  gpus: 1
  cpus: 8
  memory_gb: 32
  slurm: {partition: gpu, account: radiology, constraint: a100|h100}
"""


def test_what_is_declared_reaches_the_file_that_slurm_is_given(
    sweep_of: Callable[..., Sweep], slurm: Path, tmp_path: Path
) -> None:
    made = make_executor(sweep_of(TEXT).executor, tmp_path / "out")
    lines = made._executor._make_submission_file_text("python -m job", "uid").splitlines()
    for flag in (
        *("--time=90", "--gpus-per-node=1", "--cpus-per-task=8", "--mem=32GB"),
        *("--partition=gpu", "--account=radiology", "--constraint='a100|h100'", "--job-name=medvlm-out"),
    ):
        assert f"#SBATCH {flag}" in lines
    assert made._executor.parameters["array_parallelism"] == 3


def test_a_local_cell_is_not_ended_after_submitits_two_minutes() -> None:
    assert Executor().parameters("s") == {"name": "s", "timeout_min": WEEK}
    assert Executor(minutes=5).parameters("s")["timeout_min"] == 5


def test_each_parallel_place_has_a_device_in_turn() -> None:
    executor = Executor(devices=(4, 7))
    assert [executor.devices_of(slot) for slot in range(3)] == ["4", "7", "4"]
    assert Executor().devices_of(0) is None


def test_what_starts_cells_leaves_logging_alone() -> None:
    program = (
        "import logging, sys, medvlm_harness.sweeps.execution as execution\n"
        "from medvlm_harness.sweeps.executor import Executor\n"
        "from pathlib import Path\n"
        "closed = []\n"
        "handler = type('Handler', (logging.Handler,), {'close': lambda self: closed.append(self)})()\n"
        "execution.make_executor(Executor(kind='debug'), Path(sys.argv[1]))\n"
        "assert 'submitit' in sys.modules and not closed\n"
    )
    subprocess.run([sys.executable, "-c", program, "folder"], check=True)

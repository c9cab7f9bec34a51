"""Sweeps whose cells are a small program instead of a run, and a Slurm made of four scripts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from medvlm_harness.sweeps import execution
from medvlm_harness.sweeps.declaration import Sweep, read_sweep

# What it does is said by --model_args: `does=`, and `wait=` for a file that must be there first.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
value = lambda option: sys.argv[sys.argv.index(option) + 1]
args = dict(one.split("=") for one in value("--model_args").split(","))
print("variable", os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES"))
while "wait" in args and not Path(args["wait"]).exists():
    time.sleep(0.02)
if args["does"] == "fail":
    sys.exit("INFO: a line of a log\\nerror: nothing is there.\\n       Look elsewhere.\\nand a last line")
if args["does"] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if args["does"] == "work":
    memory = b"x" * 2**27
    folder = Path(value("--output_path")) / "model"
    folder.mkdir(parents=True)
    (folder / "results_1.json").write_text("{}")
"""
SBATCH = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
text = Path(sys.argv[1]).read_text()
Path({folder!r}, "submitted.sh").write_text(text)
array = re.search(r"--array=0-(\\d+)", text)
for k in range(int(array[1]) + 1 if array else 1):
    ids = {{"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(k)}} if array else {{}}
    own = {{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}}
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(["bash", sys.argv[1]], env={{**os.environ, **own, **ids}}, **quiet)
    Path({folder!r}, f"7_{{k}}" if array else "7").write_text(str(process.pid))
print("Submitted batch job 7")
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = """#!{python}
from pathlib import Path
print("JobID|State|NodeList")
for path in Path({folder!r}).glob("7*"):
    state = Path("/proc") / path.read_text() / "stat"
    over = not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    print(f"{{path.name}}|{{'COMPLETED' if over else 'RUNNING'}}|here")
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program that stands for `medvlm` in what is submitted."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setattr(execution, "COMMAND", (sys.executable, "-S", str(path)))
    return path


@pytest.fixture
def sweep_of(tmp_path: Path) -> Callable[..., Sweep]:
    """Read a sweep from its text."""

    def read(text: str, values: Mapping[str, str] | None = None) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(text, encoding="utf-8")
        return read_sweep(path, values or {})

    return read


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs on the PATH, that run what they are given at once; the folder with what was submitted."""
    from submitit.slurm.slurm import SlurmJob

    folder, programs = tmp_path / "slurm", tmp_path / "programs"
    for made in (folder, programs):
        made.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        filled = text if name == "srun" else text.format(python=sys.executable, folder=str(folder))
        (programs / name).write_text(filled, encoding="utf-8")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(execution, "POLL", {**execution.POLL, "slurm": 0.1})
    SlurmJob.watcher.clear()
    return folder

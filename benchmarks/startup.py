"""Start-up: `medvlm run`, `lm_eval run` with us installed, and lm_eval's own tasks with and without us.

The runs do nothing worth the name (one document), so their time is the start. Medians of several, in turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

ROUNDS = 5
STOCK_TASK = """
task: stock_task
output_type: multiple_choice
custom_dataset: !function data.documents
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""
STOCK_DATA = """
from datasets import Dataset

def documents(**options):
    return {"test": Dataset.from_list([{"question": "Is it?", "answer": 0}])}
"""


def measure() -> dict[str, Any]:
    """Median seconds of each; the ratio is lm_eval on a task of its own kind with us / without us."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "stock.yaml").write_text(STOCK_TASK, encoding="utf-8")
        (folder / "data.py").write_text(STOCK_DATA, encoding="utf-8")
        ours = ["--model", "medvlm-baseline", "--tasks", "demo_cxr_view", "--limit", "1"]
        stock = ["--model", "dummy", "--tasks", "stock_task", "--include_path", scratch, "--limit", "1"]
        commands = {
            "medvlm run": (["medvlm", "run", *ours], {}),
            "lm_eval run": (["lm_eval", "run", *ours], {}),
            "lm_eval run, its own task": (["lm_eval", "run", *stock], {}),
            "lm_eval run, its own task, without us": (["lm_eval", "run", *stock], {"MEDVLM_NO_AUTOLOAD": "1"}),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for counted in range(ROUNDS + 1):
            for name, (command, extra) in commands.items():
                took = _time(command, {"XDG_CACHE_HOME": scratch, **extra})
                if counted:  # the first round fills caches
                    seconds[name].append(took)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    with_us, without_us = list(medians.values())[2:]
    return {"seconds": medians, "rounds": ROUNDS, "ratio": with_us / without_us}


def _time(command: list[str], environment: dict[str, str]) -> float:
    program = str(Path(sys.executable).with_name(command[0]))
    fixed = {**os.environ, "OMP_NUM_THREADS": str(common.THREADS), **environment}
    start = time.perf_counter()
    subprocess.run([program, *command[1:]], env=fixed, check=True, capture_output=True)
    return time.perf_counter() - start

"""Whole runs that are killed, or meet a damaged store or image, and end with an undisturbed run's numbers."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from medvlm_harness.data.records import Dataset

TASKS = "demo_cxr_zeroshot,demo_cxr_view,demo_cxr_retrieval"
PATIENCE = 120  # seconds, for a run that takes about six


class Runs:
    """`medvlm run` in a process of its own, on the demo, with small batches so that there is something to interrupt."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "MEDVLM_DATA": str(data), "OMP_NUM_THREADS": "1"}

    def start(self, store: Path | str, out: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from medvlm_harness.cli import main; main()", "run", "--model", "medvlm-tiny"]
        options = ["--model_args", f"store={store}", "--batch_size", "4", "--tasks", TASKS, "--device", "cpu"]
        return subprocess.Popen(
            [*command, *options, "--output_path", str(self.folder / out)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, store: Path | str, out: str) -> str:
        process = self.start(store, out)
        printed, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, printed[-2000:]
        return printed

    def results(self, out: str) -> dict[str, Any]:
        (path,) = (self.folder / out).rglob("results_*.json")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def numbers(self, out: str) -> tuple[dict[str, Any], list[Any]]:
        """Every metric with its interval, and every score, as written."""
        (scores,) = (self.folder / out).rglob("scores.parquet")
        tasks = self.results(out)["medvlm"]["tasks"]
        return {name: task["metrics"] for name, task in tasks.items()}, pq.read_table(scores).to_pylist()


def answers(store: Path) -> int:
    """How many are stored; 0 while the file is being made."""
    if not store.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


@pytest.fixture(scope="module")
def runs(demo: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With one undisturbed run, in `expected`, and its store."""
    made = Runs(demo.folder.parent, tmp_path_factory.mktemp("runs"))
    made.finish(made.folder / "expected.sqlite", "expected")
    return made


def test_a_run_that_is_killed_three_times_ends_with_the_same_bits(runs: Runs) -> None:
    store = runs.folder / "killed.sqlite"
    whole = answers(runs.folder / "expected.sqlite")
    kept = 0
    for share in (0.1, 0.35, 0.6):
        process = runs.start(store, "never written")
        deadline = time.monotonic() + PATIENCE
        while (stored := answers(store)) < share * whole and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        # Nothing that was stored is lost, and more came in.
        assert kept < stored <= answers(store) < whole
        kept = answers(store)
    runs.finish(store, "killed")
    assert runs.numbers("killed") == runs.numbers("expected")
    model = runs.results("killed")["medvlm"]["model"]
    # One of them is what is known of the model itself.
    assert model["images_recalled"] + model["texts_recalled"] == kept - 1
    assert answers(store) == whole


def test_a_second_run_computes_nothing(runs: Runs) -> None:
    runs.finish(runs.folder / "expected.sqlite", "second")
    assert runs.numbers("second") == runs.numbers("expected")
    model = runs.results("second")["medvlm"]["model"]
    assert (model["images_encoded"], model["texts_encoded"]) == (0, 0)


def test_a_damaged_store_costs_time_and_nothing_else(runs: Runs) -> None:
    store = runs.folder / "damaged.sqlite"
    content = bytearray((runs.folder / "expected.sqlite").read_bytes())
    middle = len(content) // 2  # a few pages alone may hold nothing but values, whose digests say so
    content[middle:] = random.Random(0).randbytes(len(content) - middle)
    store.write_bytes(content)
    printed = runs.finish(store, "damaged")
    assert "set aside as damaged.sqlite.damaged-" in printed
    assert len(list(runs.folder.glob("damaged.sqlite.damaged-*"))) >= 1
    expected, found = runs.numbers("expected"), runs.numbers("damaged")
    assert found[0].keys() == expected[0].keys()
    # What had to be computed again was in other batches, so the last bits may differ.
    for one, other in zip(found[1], expected[1], strict=True):
        assert one["margin"] == pytest.approx(other["margin"], abs=1e-5)


def test_without_a_store_the_numbers_are_the_same(runs: Runs) -> None:
    runs.finish("off", "off")
    assert runs.numbers("off") == runs.numbers("expected")


def test_a_finished_run_leaves_its_store_in_one_file(runs: Runs) -> None:
    store = runs.folder / "expected.sqlite"
    assert not store.with_name(f"{store.name}-wal").exists()
    with closing(sqlite3.connect(f"{store.as_uri()}?immutable=1", uri=True)) as connection:  # looks at no WAL
        assert connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0] == answers(store) > 0

"""Two processes give the numbers of one, under torchrun and accelerate, and one that fails ends both."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from medvlm_harness.data.records import Dataset, read_dataset

TASKS = ("demo_cxr_zeroshot", "demo_cxr_view", "demo_cxr_retrieval")
PATIENCE = 240  # seconds, for a run that takes about ten
LM_EVAL, MEDVLM = ("-m", "lm_eval", "run"), ("-m", "medvlm_harness", "run")
ONE = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
)
COUNTS = ("images_encoded", "images_recalled", "texts_encoded", "texts_recalled")


class Run:
    """A finished run, as its files tell of it."""

    def __init__(self, folder: Path, printed: str = "", status: int = 0) -> None:
        self.folder, self.printed, self.status = folder, printed, status

    @property
    def results(self) -> dict[str, Any]:
        (path,) = self.folder.rglob("results_*.json")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @property
    def model(self) -> dict[str, Any]:
        found: dict[str, Any] = self.results["medvlm"]["model"]
        return found

    @property
    def scores(self) -> list[dict[str, Any]]:
        (path,) = self.folder.rglob("scores.parquet")
        return pq.read_table(path).to_pylist()

    def samples(self, task: str) -> list[dict[str, Any]]:
        (path,) = self.folder.rglob(f"samples_{task}_*.jsonl")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(launcher: tuple[str, ...], module: tuple[str, ...], data: Path, folder: Path, *options: str) -> Run:
    """All three tasks, or those that the options name, in a process or two."""
    # What is encoded does not depend on what another test has stored.
    given = ("--model_args", f"store={folder.with_suffix('.sqlite')}", "--device", "cpu", "--log_samples", *options)
    tasks = () if "--tasks" in options else ("--tasks", ",".join(TASKS))
    done = subprocess.run(
        [*launcher, *module, "--model", "medvlm-tiny", *given, *tasks, "--output_path", str(folder)],
        env={**os.environ, "MEDVLM_DATA": str(data), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return Run(folder, done.stdout, done.returncode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(demo: Dataset, folder: Path) -> Run:
    return finished(run(ONE, MEDVLM, demo.folder.parent, folder / "one"))


@pytest.fixture(scope="module")
def two(demo: Dataset, folder: Path) -> Run:
    return finished(run(TORCHRUN, LM_EVAL, demo.folder.parent, folder / "two"))


@pytest.fixture(scope="module")
def few(demo: Dataset, folder: Path) -> tuple[Run, Run]:
    """A limit that leaves the second process without any study: one process and two."""
    options = (demo.folder.parent, folder / "one of one", "--limit", "1")
    alone = finished(run(ONE, MEDVLM, *options))
    return alone, finished(run(ACCELERATE, MEDVLM, demo.folder.parent, folder / "one of two", "--limit", "1"))


def finished(done: Run) -> Run:
    assert done.status == 0, done.printed[-3000:]
    return done


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of nested JSON, by its place."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}/{key}")
    else:
        # Answers are logged as text.
        yield path, float(value) if "resps/" in path else value


def assert_same(found: Any, expected: Any) -> None:
    """The same keys, in the same order, and values to 1e-5."""
    found, expected = dict(leaves(found)), dict(leaves(expected))
    assert list(found) == list(expected)
    for place, value in expected.items():
        same = pytest.approx(value, abs=1e-5, rel=0, nan_ok=True) if isinstance(value, float) else value
        assert found[place] == same, place


def check_all(two: Run, one: Run) -> None:
    """Metrics, intervals, supports, counts, tables, samples and scores."""
    for part in ("tasks", "unsupported"):
        assert_same(two.results["medvlm"][part], one.results["medvlm"][part])
    for part in ("results", "n-samples", "versions", "higher_is_better"):
        assert_same(two.results[part], one.results[part])
    assert_same(two.scores, one.scores)
    for task in TASKS:
        ours, theirs = two.samples(task), one.samples(task)
        assert [sample["doc_id"] for sample in ours] == [sample["doc_id"] for sample in theirs]
        for sample, other in zip(ours, theirs, strict=True):
            if task == "demo_cxr_retrieval":  # answers are logged as hashes of vectors, which differ in the last bits
                sample, other = ({**logged, "resps": 0, "filtered_resps": 0} for logged in (sample, other))
            assert_same(sample, other)


def test_torchrun_gives_the_numbers_of_one_process(one: Run, two: Run) -> None:
    assert (one.model["world_size"], two.model["world_size"]) == (1, 2)
    assert len(two.results["medvlm"]["tasks"]) == len(TASKS)
    check_all(two, one)


def test_each_image_is_encoded_once_by_both_together(one: Run, two: Run) -> None:
    distinct = {sample["doc"]["image"] for task in TASKS for sample in two.samples(task)}
    assert one.model["images_encoded"] == two.model["images_encoded"] == len(distinct)
    assert two.model["images_recalled"] == 0
    # Each process needs the labels' phrases: it encodes them, or finds them in the store that both share.
    assert two.model["texts_encoded"] + two.model["texts_recalled"] >= one.model["texts_encoded"]


def test_only_the_first_process_prints_the_table(two: Run) -> None:
    assert two.printed.count("|demo_cxr_view ") == 1
    assert two.printed.count("95% interval") == 1


def test_both_keep_their_answers_in_one_store(one: Run, two: Run) -> None:
    assert answers(two) == answers(one) > 0


def answers(done: Run) -> int:
    with closing(sqlite3.connect(done.folder.with_suffix(".sqlite"))) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])


def test_accelerate_and_a_process_without_studies_give_the_numbers_of_one(few: tuple[Run, Run]) -> None:
    alone, two = few
    assert two.model["world_size"] == 2
    assert [task["scored"] for task in two.results["medvlm"]["tasks"].values()] == [1, 1, 1]
    check_all(two, alone)


def test_a_damaged_image_of_the_second_process_ends_both_with_one_line(
    demo: Dataset, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(demo.folder, tmp_path / "data" / "demo_cxr")
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace(str(demo.folder), str(copy)), encoding="utf-8")
    data = read_dataset(copy)
    second = [study for study in data.studies if study.split == "test"][1]
    damaged = data.path(next(image for image in second.images if image.view == "frontal"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    start = time.monotonic()
    failed = run(TORCHRUN, LM_EVAL, copy.parent, folder / "failed", "--tasks", "demo_cxr_zeroshot")
    assert failed.status != 0
    assert time.monotonic() - start < PATIENCE / 2
    lines = re.findall("error: .*", failed.printed)
    assert sum(f"{damaged.name} changed since it was prepared" in line for line in lines) == 1
    assert all(damaged.name in line or "Another process of this run has ended" in line for line in lines)
    assert "[rank" not in failed.printed  # no traceback of ours
    assert not folder.joinpath("failed").exists()

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends import ranks
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.model_backends.ranks import Ranks
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.model_backends.torch_backend import pick_device

LAUNCHED = ("WORLD_SIZE", *ranks.SET_BY_LAUNCHERS)
PATIENCE = 120  # seconds


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


# --- one process


def test_one_process_loads_neither_torch_nor_accelerate() -> None:
    code = (
        "import sys; from medvlm_harness.model_backends.ranks import Ranks; print(Ranks.from_environment());"
        "print({'torch', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Ranks(rank=0, world_size=1, local_rank=0)", "set()"]


@pytest.mark.parametrize("size", ["", "1", "0", "all"])
def test_one_process_needs_no_launcher(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert Ranks.from_environment() == Ranks(0, 1, 0)


def test_several_processes_without_a_launcher_are_refused_instead_of_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        Ranks.from_environment()


def test_alone_everything_comes_back() -> None:
    alone = Ranks()
    assert alone.all_gather(torch.tensor(7)).tolist() == [7]
    assert alone.all_gather(torch.tensor([1.5, 2.5])).tolist() == [1.5, 2.5]
    assert alone.gather_object({"a": 1}) == [{"a": 1}]
    alone.barrier()


# --- two processes

TALK = """
import sys
import torch
from medvlm_harness.model_backends.ranks import Ranks
ours = Ranks.from_environment()
assert Ranks.from_environment() == ours
print(ours)
print(ours.all_gather(torch.tensor(5 + ours.rank)).tolist(), ours.all_gather(torch.eye(2)[ours.rank]).tolist())
print(ours.gather_object({"rank": ours.rank}), ours.gather_object(ours.rank, dst=1))
ours.barrier()
if ours.rank == 1:
    sys.exit("this one ends")
ours.barrier()
"""


@pytest.fixture(scope="module")
def talked() -> list[tuple[int, str, str]]:
    """Status, output and errors of two processes, as a launcher starts them; the second ends before the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TALK],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=PATIENCE) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, printed, strict=True)]


def test_each_process_knows_its_place(talked: list[tuple[int, str, str]]) -> None:
    for rank, (_, out, _) in enumerate(talked):
        assert out.splitlines()[0] == f"Ranks(rank={rank}, world_size=2, local_rank={rank})"


def test_tensors_are_gathered_everywhere_single_numbers_too(talked: list[tuple[int, str, str]]) -> None:
    for _, out, _ in talked:
        assert out.splitlines()[1] == "[5, 6] [1.0, 0.0, 0.0, 1.0]"


def test_objects_are_gathered_by_rank_where_they_are_asked_for(talked: list[tuple[int, str, str]]) -> None:
    assert [out.splitlines()[2] for _, out, _ in talked] == ["[{'rank': 0}, {'rank': 1}] None", "None [0, 1]"]


def test_a_process_whose_partner_has_ended_says_so_and_does_not_wait(talked: list[tuple[int, str, str]]) -> None:
    (waiting, _, error), (ended, _, last) = talked
    assert (waiting, ended) == (1, 1)
    assert last.splitlines()[-1] == "this one ends"
    assert "UserError: Another process of this run has ended" in error.splitlines()[-1]


# --- what a model takes from it


@pytest.fixture
def fifth_of_six(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the second machine of two, with three processes each."""
    monkeypatch.setattr(Ranks, "from_environment", lambda: Ranks(4, 6, 1))


@pytest.mark.usefixtures("fifth_of_six")
@pytest.mark.parametrize("make", [BaselineBackend, lambda: TinyBackend(device="cpu")])
def test_a_model_tells_lm_eval_its_place(make: Callable[[], Any]) -> None:
    model = make()
    assert (model.rank, model.world_size, str(model.device)) == (4, 6, "cpu")


def test_a_model_alone_gathers_from_itself(tmp_path: Path) -> None:
    model = BaselineBackend()
    assert (model.rank, model.world_size) == (0, 1)
    assert model.all_gather(torch.tensor(3, device=model.device)).tolist() == [3]
    assert model.gather_object(tmp_path) == [tmp_path]
    model.barrier()


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [
        (None, 0, "cuda:0"),
        ("cuda:0", 2, "cuda:2"),  # lm-eval's default
        ("cuda", 3, "cuda:3"),
        ("auto", 5, "cuda:1"),  # more processes than GPUs
        ("cuda:3", 1, "cuda:3"),
        ("cpu", 1, "cpu"),
    ],
)
def test_each_process_takes_the_gpu_of_its_number_unless_told_otherwise(
    device: str | None, local_rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device(device, local_rank) == torch.device(expected)

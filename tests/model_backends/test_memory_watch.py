from __future__ import annotations

import mmap
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

from medvlm_harness.model_backends import memory_watch as memory
from medvlm_harness.model_backends.memory_watch import MemoryWatch, available_ram_mib, ram_mib, vram_of_process

CPU = torch.device("cpu")


def hold_and_drop(mib: int) -> None:
    with mmap.mmap(-1, mib * 2**20) as held:  # given back at once, whatever the C library was told
        held.write(b"x" * len(held))


def test_the_peak_counts_what_is_gone_again_and_can_begin_anew() -> None:
    watch = MemoryWatch(CPU)
    before = ram_mib()
    hold_and_drop(128)
    assert watch.peak()["peak_ram_mib"] > before + 100
    whole = watch.peak()["peak_ram_mib"]
    watch.reset()
    if watch.since_start:
        pytest.skip("the system keeps the peak of the whole process alone")
    before = ram_mib()
    hold_and_drop(64)
    assert before + 40 < watch.peak(anew=True)["peak_ram_mib"] < whole - 20
    assert watch.peak()["peak_ram_mib"] >= whole  # of the whole process it stays what it was


def test_no_gpu_is_said_and_main_memory_never_stands_for_its_memory() -> None:
    found = MemoryWatch(CPU).peak()
    assert [found[name] for name in memory.VRAM] == [None] * 3
    assert found["vram_reason"] == "no GPU: the model is on cpu"
    assert available_ram_mib() > 0


def test_the_peaks_of_a_gpu_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"allocated": 5 * 2**20, "reserved": 8 * 2**20}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peaks["reserved"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update(allocated=2**20))
    monkeypatch.setattr(memory, "vram_of_process", lambda: (700.0, None))
    watch = MemoryWatch(torch.device("cuda:7"))
    assert watch.peak()["vram_allocated_mib"] == 5
    watch.reset()
    assert watch.peak(anew=True)["vram_allocated_mib"] == 1
    assert watch.peak()["vram_allocated_mib"] == 5
    assert watch.peak()["vram_reserved_mib"] == 8 and watch.peak()["vram_process_mib"] == 700


@pytest.mark.parametrize(
    ("printed", "expected"),
    [("{pid}, 612\n77, 5\n{pid}, 100\n", 712.0), ("77, 5\n", None), ("{pid}, [N/A]\n", None), ("", None)],
)
def test_what_the_driver_counts_for_this_process(
    printed: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(stdout=printed.format(pid=os.getpid()))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found, reason = vram_of_process()
    assert found == expected and (reason is None) == (expected is not None)


def test_a_machine_without_the_drivers_program_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert vram_of_process() == (None, "vram_process_mib: nvidia-smi does not say (FileNotFoundError)")

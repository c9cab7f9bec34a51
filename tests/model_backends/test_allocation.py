from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from medvlm_harness.model_backends import allocation

# Page faults of 40 blocks of 48 MB, one after the other, each written to throughout.
COUNT = """
import resource, torch
from medvlm_harness.model_backends.allocation import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
torch.zeros(12 * 2**20)
before = faults()
for _ in range(40):
    torch.zeros(12 * 2**20)
    torch.empty(12 * 2**20).fill_(1.0)
print(faults() - before)
"""


def faults(*, keep: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(keep=keep)], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_large_blocks_are_not_mapped_anew() -> None:
    if not allocation.keep_freed_memory():
        pytest.skip("this glibc maps large blocks whatever it is told")
    assert faults(keep=True) * 10 < faults(keep=False)


def test_elsewhere_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocation.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: object())
    assert not allocation.keep_freed_memory()


def test_what_was_kept_is_given_back_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    library = type("Library", (), {"malloc_trim": staticmethod(asked.append)})()
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sys, "platform", "linux")
    allocation.release_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    allocation.release_freed_memory()
    assert asked == [0]

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from medvlm_harness.model_backends.hardware import hardware


def test_a_cpu_is_named_and_has_no_gpu() -> None:
    found = hardware(torch.device("cpu"))
    assert found["cores"] >= 1 and found["threads"] == torch.get_num_threads() and found["ram_mib"] > 100
    assert (found["device"], found["gpu"], found["gpu_memory_mib"]) == ("cpu", None, None)


def test_a_gpu_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Some GPU", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = hardware(torch.device("cuda:0"))
    assert (found["gpu"], found["gpu_memory_mib"]) == ("Some GPU", 16 * 1024)

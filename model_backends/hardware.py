"""What a model runs on, as far as the system tells."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["cpu_name", "hardware"]


def cpu_name() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores that this process may use, torch's threads, main memory; the GPU where the model is on one."""
    import psutil

    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count()
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "ram_mib": round(psutil.virtual_memory().total / 2**20),
        "device": str(device),
        "gpu": None if properties is None else properties.name,
        "gpu_memory_mib": None if properties is None else round(properties.total_memory / 2**20),
    }

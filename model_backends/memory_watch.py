"""Memory of this process: main memory, and a GPU's; peaks since a moment, and since the start of the process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from medvlm_harness.model_backends.allocation import release_freed_memory

__all__ = ["MemoryWatch", "available_ram_mib", "ram_mib"]

MIB = 2**20
VRAM = ("vram_allocated_mib", "vram_reserved_mib", "vram_process_mib")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SMI = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
# The system's peak from before it was told to begin anew, which a later peak of the whole process must not forget.
_earlier: dict[str, float] = {}


def ram_mib() -> float:
    """What this process holds in main memory now (resident set size)."""
    import psutil

    return float(psutil.Process().memory_info().rss) / MIB


def available_ram_mib() -> float:
    """What the machine can still give, as the system estimates it."""
    import psutil

    return float(psutil.virtual_memory().available) / MIB


class MemoryWatch:
    """Peaks of this process since `reset`, and since its start.

    Of main memory the kernel keeps the peak (VmHWM; elsewhere than on Linux getrusage's, which cannot be told to begin
    anew). Of a GPU torch keeps that of what its tensors took (allocated) and of what it holds for them (reserved); what
    the whole process takes, the context of CUDA and other libraries with it, the driver says, now and not at its peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.since_start = not (_STATUS.is_file() and os.access(_CLEAR, os.W_OK))

    def reset(self) -> None:
        """Begin anew; where the system cannot, the peak of main memory stays that of the whole process."""
        gc.collect()
        release_freed_memory()
        if not self.since_start:
            _earlier["ram"] = self.peak()["peak_ram_mib"]
            try:
                _CLEAR.write_text("5", encoding="ascii")
            except OSError:
                self.since_start = True
        if self.device.type == "cuda":
            for name, value in self._allocated().items():
                _earlier[f"{self.device} {name}"] = max(value, _earlier.get(f"{self.device} {name}", 0.0))
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self, *, anew: bool = False) -> dict[str, Any]:
        """Peaks in MiB: main memory, and a GPU's `vram_...`, which are None with `vram_reason` without one.

        Args:
            anew: since `reset`; by default since the start of the process.
        """
        ram = _peak_ram_mib()
        gpu = self._gpu()
        if not anew:
            ram = max(ram, _earlier.get("ram", 0.0))
            for name, value in gpu.items():
                if isinstance(value, float):
                    gpu[name] = max(value, _earlier.get(f"{self.device} {name}", 0.0))
        return {"peak_ram_mib": ram, **gpu}

    def _gpu(self) -> dict[str, Any]:
        if self.device.type != "cuda":
            return {**dict.fromkeys(VRAM), "vram_reason": f"no GPU: the model is on {self.device}"}
        process, reason = vram_of_process()
        return {**self._allocated(), "vram_process_mib": process, "vram_reason": reason}

    def _allocated(self) -> dict[str, float]:
        return {
            "vram_allocated_mib": torch.cuda.max_memory_allocated(self.device) / MIB,
            "vram_reserved_mib": torch.cuda.max_memory_reserved(self.device) / MIB,
        }


def vram_of_process() -> tuple[float | None, str | None]:
    """MiB that the driver counts for this process on all GPUs, or None and why it does not say."""
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"vram_process_mib: nvidia-smi does not say ({type(error).__name__})"
    rows = [line.replace(" ", "").split(",") for line in done.stdout.splitlines()]
    own = [row[1] for row in rows if len(row) == 2 and row[0] == str(os.getpid())]
    if not own or not all(cell.isdigit() for cell in own):
        # In a container processes have other numbers than the driver knows.
        return None, "vram_process_mib: nvidia-smi does not list this process"
    return float(sum(map(int, own))), None


def _peak_ram_mib() -> float:
    """The kernel's peak of this process.

    Not getrusage's where it can be had otherwise: Linux hands the peak of a parent on to its child there.
    """
    if _STATUS.is_file():
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)

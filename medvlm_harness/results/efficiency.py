"""What a run cost: the block `efficiency` of its results, counting only what was computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NOTHING_COMPUTED", "Stopwatch", "efficiency_block"]

NOTHING_COMPUTED = "every answer came from the store or needs no model: nothing was computed"
MEMORY = ("peak_ram_mib", "vram_allocated_mib", "vram_reserved_mib", "vram_process_mib")


class Stopwatch:
    """One process's part of a run, from the first request's making to the last metric."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def read(self, lm: Any) -> dict[str, Any]:
        """What this process did and took by now; `stages` is None for a model without a meter.

        The model's meter begins anew: what is loaded before a run is counted in the first one.
        """
        seconds = time.perf_counter() - self._start
        if not hasattr(lm, "meter"):
            return {"seconds": seconds, "stages": None, "name": type(lm).__name__}
        from medvlm_harness.model_backends.hardware import hardware
        from medvlm_harness.model_backends.memory_watch import ram_mib

        memory = {**lm.memory.peak(), "ram_mib": ram_mib()}
        return {"seconds": seconds, "stages": lm.meter.take(), "memory": memory, "hardware": hardware(lm.device)}


def efficiency_block(processes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The block from what each process gives: items of all, time and memory of the one with most.

    Args:
        processes: as `Stopwatch.read` gives them, by rank.
    """
    first = processes[0]
    empty = {**dict.fromkeys((*MEMORY, "ram_mib")), "vram_reason": None}
    block: dict[str, Any] = {
        "seconds": max(one["seconds"] for one in processes),
        "processes": len(processes),
        "stages": None,
        "reason": None,
        **empty,
        "hardware": first.get("hardware"),
    }
    if first["stages"] is None:
        return {**block, "reason": f"{first['name']} does not tell what it computes: only models of this package do"}
    from medvlm_harness.model_backends.meter import COMPUTING, merged

    if not any(name in COMPUTING for one in processes for name in one["stages"]):
        return {**block, "reason": NOTHING_COMPUTED}
    memories = [one["memory"] for one in processes]
    peaks = {name: _largest([memory[name] for memory in memories]) for name in (*MEMORY, "ram_mib")}
    reason = next((memory["vram_reason"] for memory in memories if memory["vram_reason"]), None)
    return {**block, "stages": merged(one["stages"] for one in processes), **peaks, "vram_reason": reason}


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None

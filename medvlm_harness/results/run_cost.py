"""What a run says of its cost: of its efficiency task, else of what was counted along the way, each with its source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from medvlm_harness.results.run_files import RunFiles, at_place

__all__ = ["COST_METRICS", "EFFICIENCY", "cost_of", "memory_metric"]

COST_METRICS = {
    "latency_p50": "ms per study at batch size 1, median",
    "latency_p95": "ms per study at batch size 1",
    "throughput": "items per second at the best batch size",
    "time_to_first_token": "ms",
    "output_tokens_per_second": "tokens per second",
    "load_seconds": "s",
    "peak_ram_mib": "MiB",
    "vram_allocated_mib": "MiB",
    "vram_process_mib": "MiB",
    "weights_memory_mib": "MiB of weights in memory",
    "weights_disk_mib": "MiB of files",
    "parameters": "number",
    "gflops_per_item": "GFLOP per item",
}
"""Metrics of an efficiency task that comparisons carry, and their units."""
EFFICIENCY = "_efficiency"
"""How the names of efficiency tasks end."""
MIB = 2**20
# Where runs without an efficiency task say something of the kind, the best place first.
COUNTED: Mapping[str, tuple[str, ...]] = {
    "throughput": ("efficiency.stages.encode_images.items_per_second", "efficiency.stages.score.items_per_second"),
    "output_tokens_per_second": ("efficiency.stages.generate.tokens_per_second",),
    "load_seconds": ("efficiency.stages.load.seconds",),
    "peak_ram_mib": ("efficiency.peak_ram_mib",),
    "vram_allocated_mib": ("efficiency.vram_allocated_mib",),
    "vram_process_mib": ("efficiency.vram_process_mib",),
    "weights_memory_mib": ("model.weights_bytes",),
    "parameters": ("model.card.parameters",),
}


def cost_of(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Metric of `COST_METRICS` -> `value`, `ci95`, `source` and `reason`; plain JSON, null where unmeasured."""
    tasks = [name for name in run.tasks if name.endswith(EFFICIENCY)]
    measured: Mapping[str, Any] = run.tasks[tasks[0]]["metrics"] if tasks else {}
    counted = _counted(run)
    costs: dict[str, dict[str, Any]] = {}
    for name in COST_METRICS:
        if (one := measured.get(name)) is not None and one["value"] is not None:
            costs[name] = {"value": one["value"], "ci95": one["ci95"], "source": tasks[0], "reason": None}
        elif name in counted:
            value, source = counted[name]
            costs[name] = {"value": value, "ci95": None, "source": source, "reason": None}
        else:
            reason = one["reason"] if one is not None else _why_not(run, tasks)
            costs[name] = {"value": None, "ci95": None, "source": None, "reason": reason}
    return costs


def memory_metric(costs: Iterable[Mapping[str, Mapping[str, Any]]]) -> str:
    """By which memory runs are compared: that of the GPU if it was measured for any of them, else RAM at its peak."""
    on_gpu = any(cost["vram_allocated_mib"]["value"] is not None for cost in costs)
    return "vram_allocated_mib" if on_gpu else "peak_ram_mib"


def _why_not(run: RunFiles, tasks: list[str]) -> str:
    refused = next((why for name, why in run.medvlm.get("unsupported", {}).items() if name.endswith(EFFICIENCY)), None)
    return str(refused) if refused else f"{tasks[0]} does not measure it" if tasks else "no efficiency task was run"


def _counted(run: RunFiles) -> dict[str, tuple[float, str]]:
    """What runs say without an efficiency task: metric -> value, and where in our block it stands.

    Throughput is that of the run's own stage, at its own batch size and with what ran beside it.
    """
    found: dict[str, tuple[float, str]] = {}
    for name, places in COUNTED.items():
        for place in places:
            value = at_place(run.medvlm, place)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[name] = value / MIB if place.endswith("_bytes") else value, place
                break
    return found

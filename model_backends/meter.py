"""What a run costs while it runs: time by stage, and items and tokens that were computed, batch by batch.

| stage           | wall time of                                                                    | items          |
|-----------------|---------------------------------------------------------------------------------|----------------|
| `load`          | reading the weights, rounding them, moving them to the device                   | models         |
| `decode`        | waiting for pixels: worker threads decode and prepare them during the forward   | images         |
| `encode_images` | the image tower, from pixels on the CPU to vectors on the CPU                   | images         |
| `encode_texts`  | the text tower, tokenizer included where it is part of it                       | texts          |
| `generate`      | writing; of models that see images, opening and preparing them included         | texts          |
| `score`         | likelihoods of continuations or answers; likewise                               | requests       |
| `store`         | reading and writing the store                                                   | answers        |

A stage within a stage counts as itself alone, so that the seconds of all never exceed those of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

__all__ = ["COMPUTING", "Batch", "Meter", "merged", "summary"]

COMPUTING = ("encode_images", "encode_texts", "generate", "score")
PERCENTILES = (50, 90)


@dataclass(slots=True)
class Batch:
    """One pass through a stage; items and tokens may be set until it ends."""

    items: int = 0
    tokens: int | None = None  # None where nobody counts them
    seconds: float = 0.0  # without those of stages within
    _within: float = field(default=0.0, repr=False)


class Meter:
    """Stopwatches by stage, one reading per batch.

    Args:
        device: where the model computes. A GPU works on while Python goes on, so a stage ends when the GPU has.
        clock: seconds from any origin.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self._clock = clock
        self._open: list[Batch] = []
        self.batches: dict[str, list[Batch]] = {}

    @contextmanager
    def stage(self, name: str, items: int = 0, tokens: int | None = None) -> Iterator[Batch]:
        """Time what is done within; a pass that ends in an error is not kept."""
        batch = Batch(items, tokens)
        self._open.append(batch)
        start = self._clock()
        try:
            yield batch
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            self.batches.setdefault(name, []).append(batch)
        finally:
            elapsed = self._clock() - start
            batch.seconds = elapsed - batch._within
            self._open.pop()
            if self._open:
                self._open[-1]._within += elapsed

    def seconds(self, name: str) -> float:
        """Time spent in a stage so far."""
        return sum(batch.seconds for batch in self.batches.get(name, ()))

    def take(self) -> dict[str, list[Batch]]:
        """What was measured, and begin anew."""
        taken, self.batches = self.batches, {}
        return taken


def merged(processes: Iterable[Mapping[str, Sequence[Batch]]]) -> dict[str, dict[str, Any]]:
    """Stage -> summary over processes that ran side by side: items of all, and the seconds of the slowest."""
    by_stage: dict[str, list[Sequence[Batch]]] = {}
    for process in processes:
        for name, batches in process.items():
            by_stage.setdefault(name, []).append(batches)
    return {name: summary(by_stage[name]) for name in sorted(by_stage)}


def summary(processes: Sequence[Sequence[Batch]]) -> dict[str, Any]:
    """One stage as plain JSON.

    Args:
        processes: the batches of each.

    Returns:
        seconds (of the process with most), batches, items, tokens, both also per second, and the time of an item in
        milliseconds (its batch's time by its batch's size): mean over items, percentiles over items.
    """
    seconds = max((sum(batch.seconds for batch in batches) for batches in processes), default=0.0)
    every = [batch for batches in processes for batch in batches]
    items = sum(batch.items for batch in every)
    known = [batch.tokens for batch in every if batch.tokens is not None]
    tokens = sum(known) if known and len(known) == len(every) else None
    filled = [batch for batch in every if batch.items]
    per_item = np.array([batch.seconds / batch.items for batch in filled]) * 1000
    weights = np.array([batch.items for batch in filled])
    cuts = np.percentile(np.repeat(per_item, weights), PERCENTILES).tolist() if filled else [None] * len(PERCENTILES)
    return {
        "seconds": seconds,
        "batches": len(every),
        "items": items,
        "tokens": tokens,
        "items_per_second": _rate(items, seconds),
        "tokens_per_second": None if tokens is None else _rate(tokens, seconds),
        "ms_per_item": {
            "mean": float(np.average(per_item, weights=weights)) if filled else None,
            **{f"p{percent}": value for percent, value in zip(PERCENTILES, cuts, strict=True)},
        },
    }


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None

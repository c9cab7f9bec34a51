"""Batches that fit into memory: the largest that does, and halves where it runs out after all."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from medvlm_harness.errors import UserError, first_line

__all__ = ["BatchSize", "is_out_of_memory", "slots"]

_log = logging.getLogger("lm_eval.medvlm")

Item = TypeVar("Item")
Result = TypeVar("Result")

# On a CPU memory runs out by the process being killed, and beyond this size nothing gets faster (ViT-B/32, two cores:
# 31 to 36 images/s in fp32 and 107 to 153 in bf16 at every size from 8 to 64).
CPU_SIZE = 64
LARGEST = 1024  # tried on a GPU


def slots(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive parts of `size` items, the last one shorter.

    The same list always has the same slots. What is stored is whole slots, so a run that was killed goes on with the
    very batches that it would have computed.
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]


class BatchSize:
    """How many items a forward pass takes: as asked, or (`asked` None) the largest power of two that fits."""

    def __init__(self, asked: int | None, largest: int | None = None) -> None:
        self.asked, self.largest = asked, largest
        self._found: int | None = None if asked is None else min(asked, largest or asked)
        self._fits: int | None = None  # after running out of memory

    @property
    def found(self) -> int | None:
        """What is known by now; None before the first forward pass of an automatic size."""
        return min(size for size in (self._found, self._fits) if size is not None) if self._found else None

    def of(self, device: torch.device, attempt: Callable[[int], object] | None = None) -> int:
        """The size of a slot.

        Args:
            device: on a GPU sizes are tried, on anything else a fixed one is taken.
            attempt: runs a forward pass over n copies of one item; None: take the fixed one.
        """
        if self._found is None:
            if device.type != "cuda" or attempt is None:
                size = min(CPU_SIZE, self.largest or CPU_SIZE)
                if device.type == "cuda":
                    return size  # of texts before any image: nothing is decided by it
                self._found = size
            else:
                self._found = _largest_that_fits(attempt, self.largest or LARGEST)
                _log.info("batch size %d is the largest that fits", self._found)
        return self._found

    def in_parts(self, batch: Any, encode: Callable[[Any], Result]) -> list[Result]:
        """Encode a slot, in one forward pass or, where memory runs out, in as few equal ones as fit.

        Args:
            batch: whatever has a length and can be sliced.
            encode: one forward pass.

        Raises:
            UserError: if a single item does not fit.
        """
        results: list[Result] = []
        start = 0
        while start < len(batch):
            size = min(len(batch), self._fits or len(batch))
            try:
                results.append(encode(batch[start : start + size]))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(f"Not even one item fits into memory: {first_line(error)}") from error
                self._fits = size // 2
                _log.warning("out of memory with %d items in a batch: going on with %d", size, self._fits)
            else:
                start += size
                continue
            _free_memory()
        return results


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's way to say so, on a GPU or a CPU."""
    words = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _largest_that_fits(attempt: Callable[[int], object], largest: int) -> int:
    size = largest
    while size > 1:
        try:
            attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            break
        _free_memory()
        size //= 2
    _free_memory()
    return size


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

from __future__ import annotations

import logging

import pytest
import torch

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import CPU_SIZE, BatchSize, is_out_of_memory, slots

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Memory:
    """Encodes at most `room` items at once, as a device of that size would."""

    def __init__(self, room: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.room, self.error = room, error
        self.sizes: list[int] = []

    def __call__(self, items: list[int]) -> list[int]:
        if len(items) > self.room:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        self.sizes.append(len(items))
        return [2 * item for item in items]


def flat(parts: list[list[int]]) -> list[int]:
    return [item for part in parts for item in part]


def test_slots_are_the_same_whatever_was_done_before() -> None:
    items = list(range(10))
    assert [list(slot) for slot in slots(items, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(slots(items[4:], 4)) == list(slots(items, 4))[1:]
    assert list(slots([], 4)) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_batch_that_does_not_fit_is_halved_and_later_ones_start_there(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    size, memory = BatchSize(16), Memory(5, error)
    with caplog.at_level(logging.WARNING, "lm_eval.medvlm"):
        assert flat(size.in_parts(list(range(16)), memory)) == [2 * k for k in range(16)]
        assert flat(size.in_parts(list(range(7)), memory)) == [2 * k for k in range(7)]
    assert memory.sizes == [4, 4, 4, 4, 4, 3]
    assert size.of(CPU) == 16  # slots stay as they were, so that what is stored fits
    assert size.found == 4
    assert [record.message for record in caplog.records] == [
        "out of memory with 16 items in a batch: going on with 8",
        "out of memory with 8 items in a batch: going on with 4",
    ]


def test_what_never_fits_ends_in_one_line() -> None:
    with pytest.raises(UserError, match="Not even one item fits into memory: DefaultCPUAllocator") as error:
        BatchSize(4).in_parts([1, 2, 3], Memory(0))
    assert "\n" not in str(error.value)


def test_any_other_error_passes_through() -> None:
    def broken(items: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        BatchSize(4).in_parts([1, 2], broken)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("room", "largest", "expected"), [(2000, None, 1024), (100, None, 64), (1, 64, 1), (64, 16, 16)]
)
def test_automatic_on_a_gpu_is_the_largest_power_of_two_that_fits(
    room: int, largest: int | None, expected: int
) -> None:
    size, memory = BatchSize(None, largest), Memory(room)
    assert size.of(GPU) == min(CPU_SIZE, largest or CPU_SIZE)  # before any image was tried
    assert size.of(GPU, lambda n: memory([0] * n)) == expected
    assert size.of(GPU, lambda n: memory([0] * 10**6)) == expected  # tried once


def test_automatic_elsewhere_is_fixed() -> None:
    size = BatchSize(None)
    assert size.found is None
    assert size.of(CPU, lambda n: pytest.fail("nothing is tried on a CPU")) == size.found == CPU_SIZE
    assert BatchSize(None, 8).of(CPU) == 8
    assert BatchSize(100, 8).of(CPU) == 8


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.float32)
    assert is_out_of_memory(error.value)

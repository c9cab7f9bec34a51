"""The processes of one run, as `torchrun` and `accelerate launch` start them, and the little that they tell each other.

What they exchange is counts and finished answers, never gradients, so gloo carries it on every machine: on GPUs runs
the same code that the tests run on two CPU processes, and the GPUs' memory is left to the models.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["Ranks"]

# The first process to finish waits for the slowest one, and all wait while the first computes the metrics. gloo's own
# half hour would end runs that are in order; one whose process has died ends at once, by its launcher.
TIMEOUT = timedelta(hours=12)
SET_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0  # among all processes, on all machines
    world_size: int = 1
    local_rank: int = 0  # among those of this machine

    @classmethod
    def from_environment(cls) -> Ranks:
        """What the launcher says; one process, without loading anything, where there was none.

        Raises:
            UserError: if WORLD_SIZE asks for several processes and no launcher has started them.
        """
        size = os.environ.get("WORLD_SIZE", "")
        if not size.isdecimal() or int(size) < 2:
            return cls()
        missing = [name for name in SET_BY_LAUNCHERS if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start several processes with torchrun or "
                "`accelerate launch --multi_gpu`, or unset WORLD_SIZE for one."
            )
        from accelerate import PartialState

        with _together():
            # `cpu` is about what the processes talk through; each backend picks its device itself.
            state = PartialState(cpu=True, backend="gloo", timeout=TIMEOUT)
        # Else gloo's threads are torn down while they run, which now and then ends a finished process by SIGABRT.
        atexit.register(state.destroy_process_group)
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one after the other; they have one shape, a single number counts as (1,)."""
        own = tensor.detach().reshape(tensor.shape or (1,))
        if self.world_size == 1:
            return own
        import torch

        own = own.cpu()  # which gloo needs
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        with _together():
            torch.distributed.all_gather(parts, own)
        return torch.cat(parts).to(tensor.device)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What every process gives, by rank, on process `dst`; None on the others."""
        if self.world_size == 1:
            return [obj]
        import torch

        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        with _together():
            torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            import torch

            with _together():
                torch.distributed.barrier()


@contextmanager
def _together() -> Iterator[None]:
    """One line where another process is gone, instead of gloo's traceback."""
    try:
        yield
    except RuntimeError as error:  # what gloo and torch raise
        raise UserError(
            "Another process of this run has ended or cannot be reached: its own message says why "
            "(MEDVLM_DEBUG=1 shows where this one waited)."
        ) from error

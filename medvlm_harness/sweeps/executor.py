"""Where the cells of a sweep run, and what submitit is told of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.sweeps.reading import Reader

__all__ = ["Executor", "Kind", "as_kind", "read_executor"]

Kind = Literal["local", "slurm", "debug"]
WEEK = 7 * 24 * 60  # minutes: submitit ends a local job after two unless it is told
# submitit writes these into the #SBATCH lines of a script. What it runs there (setup, srun_args...) is not among them.
SLURM = ("partition", "account", "qos", "constraint", "gres", "nodelist", "exclude")


@dataclass(frozen=True, slots=True)
class Executor:
    """This machine (local), Slurm, or this process, one cell after the other (debug)."""

    kind: Kind = "local"
    parallel: int = 1  # cells at once
    minutes: int | None = None  # of one cell; Slurm needs it
    devices: tuple[int, ...] = ()  # local: CUDA device of each of the parallel cells, in turn
    gpus: int | None = None  # Slurm, per cell
    cpus: int | None = None
    memory_gb: int | None = None
    slurm: tuple[tuple[str, str], ...] = ()

    def parameters(self, name: str) -> dict[str, Any]:
        """What submitit's AutoExecutor is told.

        Args:
            name: of the jobs.
        """
        common: dict[str, Any] = {"name": name, "timeout_min": self.minutes or WEEK}
        if self.kind != "slurm":
            return common
        resources = {"gpus_per_node": self.gpus, "cpus_per_task": self.cpus, "mem_gb": self.memory_gb}
        flags = {f"slurm_{key}": value for key, value in self.slurm}
        # Slurm ends what runs out of time; the signal comes 90 s before.
        return common | {"slurm_array_parallelism": self.parallel, **flags} | {
            key: value for key, value in resources.items() if value is not None
        }  # fmt: skip

    def devices_of(self, slot: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of the cell in one of the parallel places; None to leave it as it is."""
        return str(self.devices[slot % len(self.devices)]) if self.devices else None

    def checked(self) -> Executor:
        """This one.

        Raises:
            UserError: if it lacks what its kind needs.
        """
        if self.kind == "slurm" and self.minutes is None:
            raise UserError("executor: expected `minutes:` of a cell under Slurm, which ends what runs longer.")
        return self


def as_kind(text: str) -> Kind:
    """Check a kind.

    Raises:
        UserError: if there is none of that name.
    """
    for kind in get_args(Kind):
        if text == kind:
            return kind  # type: ignore[no-any-return]
    raise UserError(f"Unknown executor {text!r}.{near_matches(text, get_args(Kind))}")


def read_executor(top: Reader) -> Executor:
    """`executor:` of a sweep.

    Raises:
        UserError: for an unknown key or a wrong value.
    """
    reader = top.inner("executor", Executor.__dataclass_fields__)
    devices = reader.sequence("devices")
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in devices):
        raise reader.expected("devices", "a list of numbers of CUDA devices")
    return Executor(
        kind=as_kind(reader.text("kind", default="local")),
        parallel=reader.whole("parallel") or 1,
        minutes=reader.whole("minutes"),
        devices=tuple(devices),
        gpus=reader.whole("gpus"),
        cpus=reader.whole("cpus"),
        memory_gb=reader.whole("memory_gb"),
        slurm=_slurm(reader),
    ).checked()


def _slurm(reader: Reader) -> tuple[tuple[str, str], ...]:
    given: Mapping[str, Any] = reader.inner("slurm", SLURM).values
    for key, value in given.items():
        # submitit quotes a value, but a line break would end its comment line, and the rest be run as a command.
        if not isinstance(value, str) or not re.fullmatch(r"[\w.,:=\[\]@&|*()+-]+", value):
            raise UserError(f"{reader.where}: expected slurm {key} to be one word, but got {value!r}.")
    return tuple(sorted(given.items()))

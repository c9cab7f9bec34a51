"""The self-test: backends against the answers of the original code, on small reference checkpoints.

A module of this package per family, with `FILES` (names in the folder that it needs), `differences(folder)` (what is
compared -> largest absolute difference) and, where a name differs, `TOLERANCES`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from medvlm_harness.errors import UserError

__all__ = ["TOLERANCE", "Comparison", "Report", "families", "run_selftest"]

TOLERANCE = 1e-4
# What a file raises that is damaged, or is not what its name says.
FAILURES = (UserError, SafetensorError, OSError, LookupError, RuntimeError, UnpicklingError)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison of a family."""

    family: str
    name: str
    difference: float  # largest absolute one; NaN is none that passes
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return self.difference <= self.tolerance

    @property
    def verdict(self) -> str:
        """In a word."""
        return "ok" if self.passed else "ABOVE"


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, what lacked files, and what could not be loaded."""

    comparisons: tuple[Comparison, ...]
    skipped: Mapping[str, str]  # family -> reason
    failed: Mapping[str, str]

    @property
    def problem(self) -> str | None:
        """Why the self-test did not pass, in one line; None if it did."""
        above = [f"{one.family} {one.name}" for one in self.comparisons if not one.passed]
        if above or self.failed:
            return f"Self-test failed: {', '.join([*above, *self.failed])}."
        return None if self.comparisons else "Nothing was compared: no family has all of its files there."


def families() -> tuple[str, ...]:
    """The modules of this package, in order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def run_selftest(folder: Path) -> Report:
    """Run every family whose files are all in the folder.

    Raises:
        UserError: if the folder is none.
    """
    if not folder.is_dir():
        raise UserError(f"Expected --golden to be a folder of reference checkpoints, but {folder} is not one.")
    comparisons: list[Comparison] = []
    skipped, failed = {}, {}
    for family in families():
        module: Any = import_module(f"{__name__}.{family}")
        if missing := [name for name in module.FILES if not (folder / name).exists()]:
            skipped[family] = f"skipped, without {', '.join(missing)}"
            continue
        tolerances: Mapping[str, float] = getattr(module, "TOLERANCES", {})
        try:
            found: Mapping[str, float] = module.differences(folder)
        except FAILURES as error:  # the other families go on
            failed[family] = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
            continue
        comparisons += [
            Comparison(family, name, value, tolerances.get(name, TOLERANCE)) for name, value in found.items()
        ]
    return Report(tuple(comparisons), skipped, failed)

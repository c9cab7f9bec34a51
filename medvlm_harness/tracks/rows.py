"""What a document contributes to its task's metrics, and a metric as lm-eval's aggregation of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvlm_harness.metrics.estimate import Estimate

__all__ = ["NO_FILTER", "Metric", "Row"]

NO_FILTER = "none"  # lm-eval's own name for it


@dataclass(frozen=True, slots=True)
class Row:
    """What one document contributes to every metric of its task; logged by its study's id alone."""

    study_id: str
    patient_id: str
    split: str
    image: str  # file, relative to the data set's image root; "" where the document is a report alone

    def __str__(self) -> str:
        return self.study_id

    @property
    def filter(self) -> str:
        """The filter pipeline that the answer went through; most tracks have one."""
        return NO_FILTER


class Metric:
    """One metric of a task, as lm-eval's aggregation: rows in, the value out, with a standard error of its own."""

    def __init__(self, name: str, estimates: Callable[[Sequence[Any]], Mapping[str, Estimate]]) -> None:
        self.name = name
        self._estimates = estimates

    def __call__(self, rows: list[Any]) -> float:
        """The value; NaN where it is undefined. Takes the empty rows of stand-ins out of the list."""
        rows[:] = [row for row in rows if row is not None]  # in place: lm-eval counts them afterwards
        return float(self._estimates(rows)[self.name].value)

    def stderr(self, rows: Sequence[Any]) -> float:
        """Standard error, which lm-eval's table prints behind the value."""
        return float(self._estimates(rows)[self.name].stderr)

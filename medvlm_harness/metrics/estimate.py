"""One measured number: its value, how sure it is, what it could have been at worst and at best, and its support."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Estimate", "plain"]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval and the numbers it must be read beside.

    Attributes:
        value: the metric; NaN where it is undefined, never 0.
        stderr: standard error of the value; NaN where it is unknown.
        ci95: lower and upper end of the 95% interval; NaN where they are unknown.
        n: items that the value stands on.
        positives: how many of them are positive, where the metric knows positives.
        floor: what a constant, a prior or copying scores on the same items.
        ceiling: what a perfect model could score on the same items, where that is not the end of the scale.
        method: how stderr and interval were found, for example "bootstrap over studies, 1000".
        reason: why the value is NaN, or what is missing from it.
        extra: further named numbers, such as the share of undefined resamples.
    """

    value: float
    stderr: float
    ci95: tuple[float, float]
    n: int
    positives: int | None = None
    floor: float | None = None
    ceiling: float | None = None
    method: str = ""
    reason: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def undefined(cls, reason: str, *, n: int, positives: int | None = None) -> Estimate:
        """An estimate that has no value, and why.

        >>> Estimate.undefined("no positive item", n=590, positives=0).value
        nan
        """
        return cls(math.nan, math.nan, (math.nan, math.nan), n, positives, reason=reason)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Estimate:
        """The estimate that `to_dict` was taken of: None becomes NaN again."""
        value, stderr, interval = known["value"], known.get("stderr"), known.get("ci95") or (None, None)
        numbers = [math.nan if one is None else float(one) for one in (value, stderr, *interval)]
        rest = {key: known.get(key) for key in ("positives", "floor", "ceiling", "reason")}
        return cls(
            numbers[0],
            numbers[1],
            (numbers[2], numbers[3]),
            known.get("n", 0),
            **rest,
            method=known.get("method", ""),
            extra=dict(known.get("extra") or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain JSON: numbers that are not finite become None, an unknown interval None as a whole."""
        interval = [plain(end) for end in self.ci95]
        return {
            "value": plain(self.value),
            "stderr": plain(self.stderr),
            "ci95": None if None in interval else interval,
            "n": int(self.n),
            "positives": plain(self.positives),
            "floor": plain(self.floor),
            "ceiling": plain(self.ceiling),
            "method": self.method,
            "reason": self.reason,
            "extra": plain(self.extra),
        }


def plain(value: Any) -> Any:
    """NumPy scalars and arrays, mappings and sequences as what `json.dumps(allow_nan=False)` takes."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"Expected a number, a string, or a mapping or sequence of them, but got {type(value).__name__}.")

"""Peak resident memory of our run as the number of images grows: it should hardly."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
from encode import run_ours

SIZES = (1_000, 3_000, 7_000)


def measure(images: int | None = None, precision: str = "auto") -> dict[str, Any]:
    """Peak MiB at each size up to `images` (by default 1,000, 3,000 and all); the ratio is the last / the first."""
    sizes: list[int | None] = [size for size in SIZES if images is None or size <= images]
    if images is None:
        sizes[-1] = None  # all
    peaks: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = common.random_clip(Path(scratch))
        for size in sizes:
            with tempfile.TemporaryDirectory() as data:
                count = common.shortened(Path(data), size)
                peaks[count] = run_ours(Path(data), model, precision)["peak_mib"]
    values = list(peaks.values())
    grown = values[-1] - values[0]
    return {"peak_mib": peaks, "grown_mib": grown, "precision": precision, "ratio": values[-1] / values[0]}

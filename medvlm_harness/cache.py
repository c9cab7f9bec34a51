"""Where this package keeps what it can make again: prepared sets and the store."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """`medvlm_harness` below $XDG_CACHE_HOME or ~/.cache; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "medvlm_harness"

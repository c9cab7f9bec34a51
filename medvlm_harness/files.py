"""Writing files whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["plain_name", "replacing", "write_json", "write_whole"]


def plain_name(name: str) -> str:
    """A part of a path: letters, digits, dots, dashes and underscores, with none of the last three at either end.

    >>> plain_name("../org/my model")
    'org-my-model'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:80] or "unnamed"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write: it takes its place when the block ends, and is gone if the block fails.

    Its name holds the process, so that two that write the same do not meet; `path`'s folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write plain JSON, whole or not at all.

    Raises:
        ValueError: for NaN or infinity, which JSON has not.
    """
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

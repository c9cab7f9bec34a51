"""The hash that a published checkpoint had when it was first loaded here, since hardly anybody publishes one.

A file beside the store, shared between processes: source and revision -> file name -> sha256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from medvlm_harness.errors import UserError
from medvlm_harness.files import write_json
from medvlm_harness.model_backends.cards import Source

__all__ = ["FIRST_LOADS", "compare_with_first_load", "refuse_other_bytes"]

FIRST_LOADS = "first_loads.json"
PATIENCE = 10.0  # seconds that another process may hold the file


def refuse_other_bytes(name: str, source: Source, found: Mapping[str, str]) -> None:
    """Compare with the hashes that a card pins; files that it does not name are not its business.

    Raises:
        UserError: for the first file with others.
    """
    for file, sha256 in found.items():
        if source.sha256.get(file, sha256) != sha256:
            raise UserError(
                f"{file} is not the file that the card of {name} pins: expected sha256 {source.sha256[file]}, "
                f"but got {sha256}."
            )


def compare_with_first_load(source: Source, found: Mapping[str, str], record: Path) -> list[str]:
    """Record the hashes of files that are new here; a line for each whose bytes are others than at its first load.

    What was recorded stays, so that every later load says the same. A record that cannot be read or written is told as
    well, and left as it is.

    Args:
        source: where the checkpoint is published; its location and revision are the key.
        found: file name -> sha256.
        record: the file; made where there is none.
    """
    key = f"{source.location}@{source.revision or 'unpinned'}"
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(record.with_suffix(".lock"), timeout=PATIENCE):
            known = _read(record)
            first = known.setdefault(key, {})
            new = {file: sha256 for file, sha256 in found.items() if file not in first}
            if new:
                first.update(new)
                write_json(record, known)
    except (OSError, ValueError, NotImplementedError, Timeout) as error:
        return [f"{record}: hashes of {key} were not compared with those of its first load ({error})"]
    return [
        f"{file} of {key} has other bytes than when it was first loaded here (sha256 {first[file][:12]}, "
        f"now {sha256[:12]}); if that is right, remove its line from {record}"
        for file, sha256 in found.items()
        if first[file] != sha256
    ]


def _read(record: Path) -> dict[str, dict[str, str]]:
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if not isinstance(known, dict) or not all(isinstance(files, dict) for files in known.values()):
        raise ValueError("it is not what this package writes")
    return known

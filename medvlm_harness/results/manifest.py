"""`run_<date>/manifest.json`: hashes of the files of a run, by which it shows that one was changed after it.

It is no signature: who edits a results file can edit the manifest, too. It tells of accidents and of careless hands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError, first_line
from medvlm_harness.files import write_json
from medvlm_harness.results.run_files import run_folder

__all__ = ["MANIFEST", "changes", "record_files"]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def record_files(results: Path, *others: Path) -> None:
    """Write what a run's files hold now; files that are not there are left out, those recorded before stay.

    Args:
        results: the run's results file.
        others: files beside it or below its folder.
    """
    folder = run_folder(results)
    if folder is None or not results.is_file():
        return
    path = folder / MANIFEST
    if path.is_file():
        known = _read(path)
    else:
        parts = dict(_parts(json.loads(results.read_text(encoding="utf-8"))))
        known = {"files": {results.name: _described(results)}, "parts": parts}
    files = {file.relative_to(results.parent).as_posix(): _described(file) for file in others if file.is_file()}
    block = {
        "schema_version": SCHEMA_VERSION,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": dict(sorted({**known["files"], **files}.items())),
        "parts": known["parts"],
    }
    write_json(path, block)


def changes(results: Path, content: Any) -> list[str] | None:
    """What is no more as the run wrote it, one line each; None where the run has no manifest.

    Args:
        results: the run's results file.
        content: what that holds, parsed.

    Raises:
        UserError: if the manifest cannot be read.
    """
    folder = run_folder(results)
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    manifest = _read(folder / MANIFEST)
    found = []
    for name, recorded in manifest["files"].items():
        file = results.parent / name
        if not file.is_file():
            found.append(f"{name} is gone")
        elif _described(file) != recorded:
            what = _differing(manifest["parts"], content) if file.name == results.name else ""
            found.append(f"{name} was changed after the run{what}")
    if results.name not in manifest["files"]:
        found.append(f"{MANIFEST} does not name {results.name}: it is another run's")
    return found


def _differing(parts: Mapping[str, str], content: Any) -> str:
    now = dict(_parts(content))
    named = [
        *(name for name in parts if name in now and now[name] != parts[name]),
        *(f"{name} (gone)" for name in parts if name not in now),
        *(f"{name} (new)" for name in now if name not in parts),
    ]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return f": {', '.join(named[:5])}{more}" if named else ", in its layout alone"


def _parts(content: Any, depth: int = 0, place: str = "") -> Iterator[tuple[str, str]]:
    """Place -> start of the hash of what stands there: of tables row by row, of our block down to a task's details."""
    if isinstance(content, Mapping) and depth < _depth(place):
        for key, value in content.items():
            yield from _parts(value, depth + 1, f"{place}.{key}" if place else str(key))
        return
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True)
    yield place, hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _depth(place: str) -> int:
    if place.startswith("medvlm.tasks"):
        return 4
    return 2 if place in ("", "medvlm", "results", "configs", "config") else 1


def _described(file: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size}


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Expected the manifest of a run, but {path} cannot be read: {first_line(error)}") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    shaped = version == SCHEMA_VERSION and all(isinstance(manifest.get(key), dict) for key in ("files", "parts"))
    if not shaped:
        raise UserError(f"Expected the manifest of a run, but {path} is none of schema_version {SCHEMA_VERSION}.")
    return dict(manifest)

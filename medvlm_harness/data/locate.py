"""Where a data set lies: named by the user, under $MEDVLM_DATA, in the user cache, made here, or on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from medvlm_harness.cache import cache_folder
from medvlm_harness.data.prepare import prepare_reading
from medvlm_harness.data.records import MANIFEST_FILE, STUDIES_FILE, Dataset, read_dataset
from medvlm_harness.data.sources.base import ReadLog
from medvlm_harness.data.sources.hub import HubError, read_hub
from medvlm_harness.errors import UserError

__all__ = ["data_root", "find_dataset", "find_prepared", "user_cache"]

DEMO = "demo_cxr"
_SHOWN_NAMES = {"iu_cxr": "IU-CXR"}


def user_cache() -> Path:
    """`medvlm_harness/data` below $XDG_CACHE_HOME or ~/.cache; it need not exist."""
    return cache_folder() / "data"


def data_root() -> Path:
    """The folder that prepared sets are written to and read from: $MEDVLM_DATA, or the user cache."""
    named = os.environ.get("MEDVLM_DATA")
    return Path(named).expanduser() if named else user_cache()


def find_dataset(name: str, *, data_dir: str | Path | None = None, hub: Mapping[str, Any] | None = None) -> Dataset:
    """Load a prepared set from the first place that has it; a set that three tasks ask for is read once.

    The places, in order: `data_dir` (the set's folder, or one that holds it; when given, nothing else is tried),
    $MEDVLM_DATA, the user cache, for `demo_cxr` the generator, and the Hub.

    Args:
        name: of the set, which is its folder's name.
        data_dir: where the user says it lies.
        hub: `id`, `revision` (None leaves it unpinned) and `columns` (see `read_hub`) of a Hub copy.

    Raises:
        UserError: if no place has it; the message gives the commands that mend it.
    """
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        for candidate in (folder, folder / name):
            if _is_prepared(candidate):
                return _load(candidate)
        raise UserError(f"Expected the prepared set {name} in data_dir {folder}, but found none there.")
    found = find_prepared(name)
    if name == DEMO and found in (None, user_cache() / name):
        from medvlm_harness.demo.generate import prepare_demo

        # Keeps what is there, unless another version of the generator drew it.
        return _load(prepare_demo(user_cache() / name))
    if found is not None:
        return _load(found)
    if hub is None or not hub.get("id"):
        raise UserError(_not_found(name, "no Hub copy is named"))
    return _from_hub(name, hub)


def find_prepared(name: str) -> Path | None:
    """The folder of a prepared set under $MEDVLM_DATA or in the user cache; None where neither has it."""
    roots = dict.fromkeys((data_root(), user_cache()))
    return next((root / name for root in roots if _is_prepared(root / name)), None)


def _from_hub(name: str, hub: Mapping[str, Any]) -> Dataset:
    hub_id, revision = str(hub["id"]), hub.get("revision")
    folder = user_cache() / f"{name}-hub-{_folder_name(revision) if revision else 'unpinned'}"
    if _is_prepared(folder):
        dataset = _load(folder)
        if dataset.manifest.policies.get("hub_id") == hub_id:
            return dataset
    log = ReadLog()
    try:
        reading = read_hub(hub_id, revision, hub.get("columns") or {}, folder, log)
    except HubError as error:
        raise UserError(_not_found(name, "the Hub is not reachable")) from error
    prepare_reading(reading, log, name=name, labels=None, out=folder)
    return _load(folder)


def _not_found(name: str, hub: str) -> str:
    places = f"$MEDVLM_DATA/{name} and the user cache"
    return (
        f"no {_SHOWN_NAMES.get(name, name)} data found (looked in {places}; {hub}).\n"
        f"       Prepare a local copy:  medvlm data prepare {name} --source DIR\n"
        "       or, with a network, name a Hub copy:  "
        """--metadata '{"hub_id": "...", "revision": "..."}'"""
    )


def _folder_name(revision: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(revision))[:80]


def _is_prepared(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).is_file() and (folder / STUDIES_FILE).is_file()


def _load(folder: Path) -> Dataset:
    times = tuple((folder / name).stat().st_mtime_ns for name in (MANIFEST_FILE, STUDIES_FILE))
    return _load_once(folder.resolve(), times)


@lru_cache(maxsize=8)
def _load_once(folder: Path, times: tuple[int, ...]) -> Dataset:
    del times  # part of the key alone: a set that was prepared again is read again
    return read_dataset(folder)

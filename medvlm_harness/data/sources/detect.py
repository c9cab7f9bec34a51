"""Which layout a folder has."""

from __future__ import annotations

from pathlib import Path

from medvlm_harness.data.sources import kaggle, openi, r2gen
from medvlm_harness.data.sources.base import Layout, ReadLog
from medvlm_harness.errors import UserError, near_matches

__all__ = ["LAYOUTS", "detect"]

LAYOUTS: dict[str, Layout] = {layout.NAME: layout for layout in (kaggle, openi, r2gen)}


def detect(folder: Path, *, layout: str | None = None, log: ReadLog | None = None) -> Layout:
    """The layout of a folder by what is there, or the one asked for.

    Kaggle's tables and Open-i's reports are the same collection. Where both lie, the tables are read, because they
    name the views; the log says so.

    Raises:
        UserError: if there is no such folder, or none or several of the layouts are there.
    """
    if not folder.is_dir():
        raise UserError(f"Expected a folder with IU-CXR, but {folder} is none.")
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"Expected a layout, but got {layout!r}.{near_matches(layout, LAYOUTS)}")
    candidates = LAYOUTS if layout is None else {layout: LAYOUTS[layout]}
    found = {name: candidate for name, candidate in candidates.items() if candidate.matches(folder)}
    if found.keys() == {kaggle.NAME, openi.NAME}:
        if log is not None:
            log.note("other_layout_not_read", openi.NAME, f"{kaggle.NAME} is there and names the views")
        return found[kaggle.NAME]
    if len(found) > 1:
        raise UserError(f"Expected one layout in {folder}, but found {' and '.join(found)}: name one with --layout.")
    if not found:
        looked_for = "; ".join(candidate.LOOKED_FOR for candidate in candidates.values())
        raise UserError(f"Expected IU-CXR in {folder}, but found none of: {looked_for}.")
    return next(iter(found.values()))

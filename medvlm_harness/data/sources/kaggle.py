"""IU-CXR as on Kaggle: two tables and a folder of images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from medvlm_harness.data.sources.base import ImageIndex, RawImage, RawStudy, Reading, ReadLog, read_rows, read_views

__all__ = ["LOOKED_FOR", "NAME", "matches", "read"]

NAME = "kaggle"
REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
LOOKED_FOR = f"{REPORTS} and {PROJECTIONS} (Kaggle)"
SECTIONS = ("indication", "comparison", "findings", "impression")
# What a spreadsheet leaves of a text that began with a plus, minus or equals sign.
SPREADSHEET_ERRORS = frozenset({"#NAME?", "#REF!", "#VALUE!", "#N/A", "#DIV/0!", "#NULL!", "#NUM!"})


def matches(folder: Path) -> bool:
    """Whether both tables lie in the folder."""
    return (folder / REPORTS).is_file() and (folder / PROJECTIONS).is_file()


def read(folder: Path, log: ReadLog) -> Reading:
    """Read the two tables and find each image below the folder by its stem, whatever its extension.

    Logged by name: rows with the wrong number of cells or no uid, a uid's second report, images of a uid without a
    report, missing images, names that leave the folder, and cells that a spreadsheet program destroyed.
    """
    rows: dict[str, dict[str, str]] = {}
    for number, row in enumerate(read_rows(folder / REPORTS, ("uid", "MeSH", *SECTIONS), log), start=1):
        uid = row["uid"].strip()
        if not uid:
            log.drop("missing_uid", f"{REPORTS} report {number}")
        elif uid in rows:
            log.drop("duplicate_uid", uid, f"report {number} of {REPORTS}")
        else:
            rows[uid] = row
    images = _read_images(folder, rows.keys(), log)
    studies = tuple(
        RawStudy(
            uid,
            tuple(images.get(uid, ())),
            **{section: _text(row[section], f"{uid} {section}", log) for section in SECTIONS},
            mesh=tuple(term.strip() for term in row["MeSH"].split(";") if term.strip()),
        )
        for uid, row in rows.items()
    )
    return Reading(NAME, folder, studies, (folder / REPORTS, folder / PROJECTIONS))


def _read_images(folder: Path, known: Collection[str], log: ReadLog) -> dict[str, list[RawImage]]:
    index = ImageIndex(folder, log)
    images: dict[str, list[RawImage]] = defaultdict(list)
    seen: set[str] = set()
    for uid, name, view in read_views(folder / PROJECTIONS, log):
        if name in seen:
            log.drop("duplicate_projection", name)
        elif uid not in known:
            log.drop("image_without_report", name, f"uid {uid or 'missing'}")
        elif file := index.find(name):
            images[uid].append(RawImage(file, view))
        seen.add(name)
    index.note_unlisted()
    return images


def _text(cell: str, name: str, log: ReadLog) -> str:
    text = cell.strip()
    if text in SPREADSHEET_ERRORS:
        log.note("text_lost_in_spreadsheet", name, text)
        return ""
    return text

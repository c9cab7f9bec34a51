"""IU-CXR as R2Gen packs it: `annotation.json` and `images/<study>/<n>.png`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medvlm_harness.data.images import resolve_inside
from medvlm_harness.data.sources.base import RawImage, RawStudy, Reading, ReadLog, uid_of
from medvlm_harness.data.splits import canonical_split
from medvlm_harness.errors import UserError

__all__ = ["LOOKED_FOR", "NAME", "matches", "read"]

NAME = "r2gen"
ANNOTATION, IMAGES = "annotation.json", "images"
LOOKED_FOR = f"{ANNOTATION} (R2Gen)"


def matches(folder: Path) -> bool:
    """Whether the annotation file lies in the folder."""
    return (folder / ANNOTATION).is_file()


def read(folder: Path, log: ReadLog) -> Reading:
    """Read the annotation; its split is kept, its report goes into `findings`.

    R2Gen's annotation holds the findings section alone. Views are None: the files are numbered, and no number stands
    for the frontal view in every study, so tasks that need a view count these studies as without one.

    Raises:
        UserError: if the annotation is not R2Gen's JSON.
    """
    path = folder / ANNOTATION
    try:
        annotation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Expected R2Gen's JSON in {path}, but it cannot be read: {error}.") from error
    if not (isinstance(annotation, dict) and all(isinstance(rows, list) for rows in annotation.values())):
        raise UserError(f"Expected {path} to map each split to a list of studies, but it does not.")
    studies: dict[str, RawStudy] = {}
    for split, rows in annotation.items():
        canonical = canonical_split(split)
        for number, row in enumerate(rows):
            name = f"{ANNOTATION} {split}[{number}]"
            if not _well_formed(row):
                log.drop("bad_row", name, "expected id, report and image_path")
                continue
            uid = uid_of(row["id"])
            if uid is None:
                log.drop("missing_uid", name, row["id"])
            elif uid in studies:
                log.drop("duplicate_uid", uid, name)
            else:
                images = _images(folder, row["image_path"], log)
                studies[uid] = RawStudy(uid, images, findings=row["report"].strip(), split=canonical)
    return Reading(NAME, folder, tuple(studies.values()), (path,), {"report_text": "findings, as R2Gen's annotation"})


def _well_formed(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("id"), str)
        and isinstance(row.get("report"), str)
        and isinstance(row.get("image_path"), list)
        and all(isinstance(name, str) for name in row["image_path"])
    )


def _images(folder: Path, names: list[str], log: ReadLog) -> tuple[RawImage, ...]:
    images = []
    for name in names:
        try:
            path = resolve_inside(folder / IMAGES, name)
        except UserError:
            log.drop("escaping_path", name)
            continue
        if path.is_file():
            images.append(RawImage(path.relative_to(folder).as_posix()))
        else:
            log.drop("missing_image", name)
    return tuple(images)

"""What every layout of a data set is read into, and the log of what was set aside on the way."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from medvlm_harness.data.images import resolve_inside
from medvlm_harness.errors import UserError

__all__ = [
    "ImageIndex",
    "Layout",
    "RawImage",
    "RawStudy",
    "ReadLog",
    "Reading",
    "canonical_stem",
    "file_stem",
    "read_rows",
    "read_views",
    "uid_of",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
VIEWS = frozenset({"frontal", "lateral"})
_OPENI_NAME = re.compile(r"CXR(?P<uid>\d+)(?:_(?P=uid))?_(?P<rest>IM-.+)")
_KAGGLE_NAME = re.compile(r"(?P<uid>\d+)_IM-.+")
_SUFFIX = re.compile(r"(\.dcm)?\.(png|jpe?g|dcm)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RawImage:
    """An image as a source names it; whether it can be decoded is found out later."""

    file: str  # below Reading.image_root, with forward slashes
    view: str | None = None


@dataclass(frozen=True, slots=True)
class RawStudy:
    """One study as a source gives it, before images are checked and labels are joined."""

    uid: str
    images: tuple[RawImage, ...] = ()
    indication: str = ""
    comparison: str = ""
    findings: str = ""
    impression: str = ""
    mesh: tuple[str, ...] = ()
    split: str | None = None  # where the source itself assigns one


@dataclass(frozen=True, slots=True)
class Reading:
    """All studies of one source."""

    layout: str
    image_root: Path
    studies: tuple[RawStudy, ...]
    files: tuple[Path, ...]  # tables, archives and folders of reports that were read, for the manifest's hashes
    policies: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None


class ReadLog:
    """What was set aside, per rule and by name, so that nothing is dropped silently.

    `drop` is for records that are gone from the result, `note` for what was kept but should be known.
    """

    def __init__(self) -> None:
        self.dropped: dict[str, list[str]] = defaultdict(list)
        self.noted: dict[str, list[str]] = defaultdict(list)

    def drop(self, rule: str, name: str, reason: str = "") -> None:
        """Count a record that a rule removed."""
        self.dropped[rule].append(f"{name}: {reason}" if reason else name)

    def note(self, rule: str, name: str, reason: str = "") -> None:
        """Count something that was kept."""
        self.noted[rule].append(f"{name}: {reason}" if reason else name)


class Layout(Protocol):
    """What a module of this package offers for one folder layout."""

    NAME: str
    LOOKED_FOR: str  # for the error message when no layout matches

    def matches(self, folder: Path) -> bool:
        """Whether the folder has this layout."""

    def read(self, folder: Path, log: ReadLog) -> Reading:
        """Read all studies; what cannot be used goes to the log by name."""


def file_stem(name: str) -> str:
    """An image's name without folders and image suffixes.

    >>> file_stem("images/1000_IM-0003-1001.dcm.png")
    '1000_IM-0003-1001'
    """
    return _SUFFIX.sub("", PurePosixPath(name.strip()).name)


def canonical_stem(name: str) -> str:
    """Kaggle's stem of an image that either Kaggle or Open-i named.

    Open-i's `CXRU_IM-a-b` is Kaggle's `U_IM-a-b`; uid 1 alone is `CXR1_1_IM-a-b`.

    >>> canonical_stem("CXR54_IM-2145-1001.png"), canonical_stem("CXR1_1_IM-0001-3001.png")
    ('54_IM-2145-1001', '1_IM-0001-3001')
    """
    stem = file_stem(name)
    match = _OPENI_NAME.fullmatch(stem)
    return f"{match['uid']}_{match['rest']}" if match else stem


def uid_of(name: str) -> str | None:
    """The study's uid in an image or study name of Kaggle, Open-i or R2Gen; None for any other name.

    >>> uid_of("CXR2384_IM-0942"), uid_of("2384_IM-0942-1001.dcm.png"), uid_of("x.png")
    ('2384', '2384', None)
    """
    match = _KAGGLE_NAME.fullmatch(canonical_stem(name))
    return match["uid"] if match else None


class ImageIndex:
    """The images below a folder, by stem, whatever folder they lie in and whatever extension they have."""

    def __init__(self, root: Path, log: ReadLog, *, below: Path | None = None) -> None:
        self.root = root
        self._log = log
        self._files: dict[str, list[str]] = defaultdict(list)
        self._by_canonical: dict[str, list[str]] = defaultdict(list)
        for path in _image_files(below or root, root, log):
            self._files[file_stem(path)].append(path)
            self._by_canonical[canonical_stem(path)].append(path)
        self._used: set[str] = set()

    def find(self, name: str, *, other_names: bool = False) -> str | None:
        """The file, relative to the root, of an image named in a table; None, and logged, if it cannot be used.

        Of several files with one stem the lossless one is taken, then the first by path, and the log says so.

        Args:
            name: file name as the table spells it.
            other_names: also accept the name that the other of Kaggle and Open-i gave the image.
        """
        try:
            resolve_inside(self.root, name)
        except UserError:
            self._log.drop("escaping_path", name)
            return None
        files = self._files.get(file_stem(name), [])
        if not files and other_names:
            files = self._by_canonical.get(canonical_stem(name), [])
        if not files:
            self._log.drop("missing_image", name)
            return None
        chosen, *others = sorted(files, key=lambda path: (not path.lower().endswith(".png"), path))
        if others:
            self._log.note("several_files_of_one_image", chosen, f"taken instead of {', '.join(others)}")
        self._used.update(files)
        return chosen

    def note_unlisted(self) -> None:
        """Log the images that no table names."""
        for path in sorted({path for files in self._files.values() for path in files} - self._used):
            self._log.note("image_in_no_table", path)


def read_rows(path: Path, required: Sequence[str], log: ReadLog) -> Iterator[dict[str, str]]:
    """The rows of a CSV table with a header; a row with the wrong number of cells is logged and left out.

    Raises:
        UserError: if a required column is missing or the file is no CSV at all.
    """
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    if "\ufffd" in text:
        log.note("undecodable_text", path.name, "bytes that are not UTF-8 were replaced")
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in required if name not in header]
        if missing:
            raise UserError(f"Expected columns {', '.join(required)} in {path}, but {', '.join(missing)} is missing.")
        for row in reader:
            if row and len(row) != len(header):
                log.drop("bad_row", f"{path.name} line {reader.line_num}", f"{len(row)} cells, not {len(header)}")
            elif row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV: {error}.") from error


def read_views(path: Path, log: ReadLog) -> Iterator[tuple[str, str, str | None]]:
    """uid, file name and view of each row of a projections table (`uid`, `filename`, `projection`)."""
    for row in read_rows(path, ("uid", "filename", "projection"), log):
        view = row["projection"].strip().lower()
        if view not in VIEWS:
            log.note("unknown_view", row["filename"], row["projection"])
        yield row["uid"].strip(), row["filename"].strip(), view if view in VIEWS else None


def _image_files(folder: Path, root: Path, log: ReadLog) -> Iterator[str]:
    for where, folders, names in os.walk(folder):  # links to folders are not followed
        here = Path(where)
        for name in sorted(folders):
            if (here / name).is_symlink():
                log.note("linked_folder_not_read", (here / name).relative_to(root).as_posix())
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
                continue
            relative = (here / name).relative_to(root).as_posix()
            if (here / name).is_symlink():
                try:
                    resolve_inside(root, relative)
                except UserError:
                    log.drop("escaping_path", relative, "a link that leaves the folder")
                    continue
            yield relative

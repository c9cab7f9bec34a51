"""A data set of the Hugging Face Hub, or a local parquet copy of one, with a map from our columns to its own."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from medvlm_harness.data.sources.base import RawImage, RawStudy, Reading, ReadLog
from medvlm_harness.errors import UserError, first_line, near_matches

__all__ = ["IMAGE_COLUMNS", "TEXT_COLUMNS", "HubError", "read_hub"]

NAME = "hub"
TEXT_COLUMNS = ("indication", "comparison", "findings", "impression")
IMAGE_COLUMNS = {"image": None, "image_frontal": "frontal", "image_lateral": "lateral"}
KNOWN_COLUMNS = ("uid", "mesh", *TEXT_COLUMNS, *IMAGE_COLUMNS)
MAX_IMAGE_BYTES = 100_000_000
BATCH_ROWS = 32  # a row of a Hub copy may hold two radiographs
_SAFE_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAGIC = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}

Row = Mapping[str, Any]


class HubError(UserError):
    """The Hub could not be reached, or gave no complete answer."""


def read_hub(
    hub_id: str, revision: str | None, columns: Mapping[str, str], cache_folder: Path, log: ReadLog
) -> Reading:
    """Read every row, whatever split it is in there, and write its images, as they are, below the cache folder.

    Args:
        hub_id: id on the Hub, or the path of a parquet file or of a folder of them.
        revision: commit of the Hub copy; None reads its newest state and leaves the result unpinned.
        columns: our name -> theirs; ours are uid, mesh (`;` between terms), indication, comparison, findings,
            impression, image, image_frontal and image_lateral. Images may be bytes, Image features or base64.
        cache_folder: images go to `<cache_folder>/images/<uid>_<view>.png` or `.jpg`.
        log: gets uids that are missing, repeated or no safe file name, and images that are neither PNG nor JPEG.

    Raises:
        HubError: if the Hub is not reachable.
        UserError: if it has no such data set, the map names unknown columns, or a named column is not there.
    """
    for name in columns:
        if name not in KNOWN_COLUMNS:
            raise UserError(f"Expected one of our columns in the column map, but got {name!r}."
                            f"{near_matches(name, KNOWN_COLUMNS)}")  # fmt: skip
    if "uid" not in columns:
        raise UserError("Expected the column map to name the column of the uid, but it does not.")
    local = Path(hub_id).expanduser()
    rows, files = _local_rows(local, columns) if local.exists() else (_hub_rows(hub_id, revision, columns), ())
    folder = cache_folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    studies: dict[str, RawStudy] = {}
    for number, row in enumerate(rows):
        uid = _text(row[columns["uid"]])
        if not uid:
            log.drop("missing_uid", f"row {number}")
        elif not _SAFE_UID.fullmatch(uid):
            log.drop("escaping_path", uid, "no safe file name")
        elif uid in studies:
            log.drop("duplicate_uid", uid, f"row {number}")
        else:
            studies[uid] = _study(uid, row, columns, folder, log)
    return Reading(NAME, cache_folder, tuple(studies.values()), files, {"hub_id": hub_id}, revision)


def _study(uid: str, row: Row, columns: Mapping[str, str], folder: Path, log: ReadLog) -> RawStudy:
    images = []
    for column, view in IMAGE_COLUMNS.items():
        if column not in columns:
            continue
        payload = _image_bytes(row[columns[column]])
        name = f"{uid}_{view or 'image'}"
        suffix = next((suffix for magic, suffix in _MAGIC.items() if payload.startswith(magic)), None)
        if not payload:
            log.note("no_image_in_column", f"{uid} {columns[column]}")
        elif suffix is None or len(payload) > MAX_IMAGE_BYTES:
            log.drop("unreadable_image", f"{uid} {columns[column]}", "neither PNG nor JPEG, or above 100 MB")
        else:
            file = folder / f"{name}{suffix}"
            file.write_bytes(payload)
            images.append(RawImage(f"{folder.name}/{file.name}", view))
    texts = {name: _text(row[columns[name]]) for name in TEXT_COLUMNS if name in columns}
    mesh = row[columns["mesh"]] if "mesh" in columns else None
    terms = mesh if isinstance(mesh, list) else _text(mesh).split(";")
    return RawStudy(uid, tuple(images), **texts, mesh=tuple(text for term in terms if (text := _text(term))))


def _text(value: Any) -> str:
    if value is None:
        return ""
    # A column of numbers with gaps is read as floating point: 12.0 is uid 12.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _image_bytes(value: Any) -> bytes:
    """The bytes of an image cell: raw bytes, an undecoded Image feature, or base64; empty if there are none."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, str):
        value = value.partition("base64,")[2] or value
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            return b"?"  # not empty, and no image: logged as unreadable
    return bytes(value) if isinstance(value, (bytes, bytearray, memoryview)) else b""


def _check_columns(where: str, present: list[str], columns: Mapping[str, str]) -> None:
    for theirs in columns.values():
        if theirs not in present:
            raise UserError(f"Expected a column {theirs} in {where}, but there is none.{near_matches(theirs, present)}")


def _local_rows(path: Path, columns: Mapping[str, str]) -> tuple[Iterator[Row], tuple[Path, ...]]:
    paths = (path,) if path.is_file() else tuple(sorted(path.rglob("*.parquet")))
    if not paths:
        raise UserError(f"Expected parquet files below {path}, but found none.")
    return _parquet_rows(paths, columns), paths


def _parquet_rows(paths: tuple[Path, ...], columns: Mapping[str, str]) -> Iterator[Row]:
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            _check_columns(str(path), file.schema_arrow.names, columns)
            for batch in file.iter_batches(BATCH_ROWS, columns=sorted(set(columns.values()))):
                yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise UserError(f"{path} is no readable parquet file: {error}.") from error


def _hub_rows(hub_id: str, revision: str | None, columns: Mapping[str, str]) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HFValidationError

    try:
        splits = datasets.load_dataset(hub_id, revision=revision)
    except HFValidationError as error:
        raise UserError(f"Expected a Hub id or the path of a parquet copy, but got {hub_id!r}.") from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"Expected a data set {hub_id} on the Hub, but: {first_line(error)}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise HubError(f"The Hub is not reachable for {hub_id}: {first_line(error)}") from error
    for name, rows in splits.items():
        _check_columns(f"{hub_id} ({name})", rows.column_names, columns)
        wanted = rows.select_columns(sorted(set(columns.values())))
        for column, feature in wanted.features.items():
            if isinstance(feature, datasets.Image):  # its bytes as they are; decoding comes later, once, and checked
                wanted = wanted.cast_column(column, datasets.Image(decode=False))
        yield from wanted

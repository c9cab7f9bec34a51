"""The one record schema of every data source, and the folder it is kept in.

A prepared set is a folder with `studies.parquet` (one row per study) and `manifest.json` (where the images lie, what
was read, what each rule dropped and why, hashes).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from medvlm_harness.errors import UserError
from medvlm_harness.files import replacing

__all__ = [
    "SCHEMA_VERSION",
    "Dataset",
    "Image",
    "Labels",
    "Manifest",
    "Study",
    "Views",
    "file_sha256",
    "read_dataset",
    "write_dataset",
]

SCHEMA_VERSION = 1
_HASHED_AT_ONCE = 32 * 2**20
STUDIES_FILE, MANIFEST_FILE = "studies.parquet", "manifest.json"

Views = Literal["frontal", "all"]
"""Which images of a study are shown."""
Labels = Mapping[str, int | None]
"""Label name -> 1 positive, 0 negative, -1 uncertain, None unmentioned."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a study; its pixels stay in the file."""

    file: str  # relative to the manifest's image_root, with forward slashes
    sha256: str  # of the file's bytes
    view: str | None = None  # "frontal", "lateral", or None where the source does not say
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """One study: its images, its report and its labels per source."""

    study_id: str
    patient_id: str
    images: tuple[Image, ...] = ()
    indication: str = ""
    comparison: str = ""
    findings: str = ""
    impression: str = ""
    mesh: tuple[str, ...] = ()
    # Source -> labels. A source that had nothing to read of this study is left out: unlabelled, not negative.
    labels: Mapping[str, Labels] = field(default_factory=dict)
    subgroups: Mapping[str, str] = field(default_factory=dict)
    split: str = "unassigned"

    def shown(self, views: Views) -> list[Image]:
        """The first frontal image by file name, or all, frontal ones first; may be empty."""
        ordered = sorted(self.images, key=lambda image: (image.view != "frontal", image.file))
        return ordered if views == "all" else [image for image in ordered if image.view == "frontal"][:1]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a prepared set is and how it came to be; everything in it is plain JSON."""

    name: str
    source: str  # layout that was read: kaggle, openi, r2gen, hub, demo
    image_root: str  # absolute path that Image.file is relative to
    licence: str
    counts: Mapping[str, int]  # studies and images kept, per split
    dropped: Mapping[str, int]  # rule -> how many records it removed
    label_sources: tuple[str, ...]
    label_names: tuple[str, ...]
    # Source -> the labels it covers, where it does not cover all: an uncovered label is unknown, not unmentioned.
    label_coverage: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    policies: Mapping[str, Any] = field(default_factory=dict)  # split scheme, label rules, aspect handling
    resolutions: Mapping[str, int] = field(default_factory=dict)  # "256x256" -> images
    source_hashes: Mapping[str, str] = field(default_factory=dict)  # file read -> sha256
    revision: str | None = None  # of a Hub data set; None where none was pinned
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Dataset:
    """A prepared set as read back."""

    folder: Path
    manifest: Manifest
    studies: tuple[Study, ...]
    sha256: str  # of studies.parquet: the identity of the data in results

    def path(self, image: Image) -> Path:
        """Where an image's file lies."""
        return Path(self.manifest.image_root, image.file)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, read in large blocks: in a thread, each block waits twice for the interpreter."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(min(path.stat().st_size, _HASHED_AT_ONCE) or 1))
        while read := file.readinto(block):
            digest.update(block[:read])
    return digest.hexdigest()


def _schema(manifest: Manifest, subgroups: Sequence[str]) -> pa.Schema:
    text = pa.string()
    image = pa.struct([("file", text), ("sha256", text), ("view", text), ("width", pa.int32()), ("height", pa.int32())])
    columns = [("study_id", text), ("patient_id", text), ("split", text), ("images", pa.list_(image))]
    columns += [(section, text) for section in ("indication", "comparison", "findings", "impression")]
    columns += [("mesh", pa.list_(text))]
    for source in manifest.label_sources:
        names = manifest.label_coverage.get(source, manifest.label_names)
        columns += [(f"labels_{source}", pa.struct([(name, pa.int8()) for name in names]))]
    columns += [(f"subgroup_{name}", text) for name in subgroups]
    return pa.schema(columns)


def write_dataset(folder: Path, studies: Iterable[Study], manifest: Manifest) -> Path:
    """Write a prepared set; a set that stands there already is replaced whole or, on any error, not at all."""
    rows = []
    ordered = sorted(studies, key=lambda study: study.study_id)
    subgroups = sorted({name for study in ordered for name in study.subgroups})
    for study in ordered:
        row = asdict(study)
        labels, groups = row.pop("labels"), row.pop("subgroups")
        row |= {f"labels_{source}": labels.get(source) for source in manifest.label_sources}
        row |= {f"subgroup_{name}": groups.get(name) for name in subgroups}
        rows.append(row)
    table = pa.Table.from_pylist(rows, schema=_schema(manifest, subgroups))
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], object]] = {
        STUDIES_FILE: lambda path: pq.write_table(table, path, compression="zstd"),
        MANIFEST_FILE: lambda path: path.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8"),
    }
    for name, write in writers.items():
        with replacing(folder / name) as partial:
            write(partial)
    return folder


def read_dataset(folder: Path) -> Dataset:
    """Read a prepared set back.

    Raises:
        UserError: if the folder holds none, or one of another schema version.
    """
    manifest_file, studies_file = folder / MANIFEST_FILE, folder / STUDIES_FILE
    if not (manifest_file.is_file() and studies_file.is_file()):
        raise UserError(f"Expected a prepared data set in {folder} ({MANIFEST_FILE}, {STUDIES_FILE}), but found none.")
    raw = json.loads(manifest_file.read_text(encoding="utf-8"))
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder} has record schema {raw.get('schema_version')}, but this version reads {SCHEMA_VERSION}: "
            "run `medvlm data prepare` again."
        )
    raw["label_coverage"] = {source: tuple(names) for source, names in raw.get("label_coverage", {}).items()}
    manifest = Manifest(**{f.name: _tuples(raw[f.name]) for f in fields(Manifest) if f.name in raw})
    payload = studies_file.read_bytes()
    studies = tuple(_study(row) for row in pq.read_table(pa.BufferReader(payload)).to_pylist())
    return Dataset(folder, manifest, studies, hashlib.sha256(payload).hexdigest())


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _study(row: dict[str, Any]) -> Study:
    def prefixed(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): row.pop(k) for k in list(row) if k.startswith(prefix)}

    labels = {source: values for source, values in prefixed("labels_").items() if values is not None}
    subgroups = {name: value for name, value in prefixed("subgroup_").items() if value is not None}
    images = tuple(Image(**image) for image in row.pop("images"))
    mesh = tuple(row.pop("mesh"))
    return Study(**row, images=images, mesh=mesh, labels=labels, subgroups=subgroups)

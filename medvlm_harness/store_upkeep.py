"""What `medvlm store` tells, removes and exports. Nothing here prints, and only `prune` changes a store."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.store import SpaceInfo, Store, Verification
from medvlm_harness.store_file import DAMAGE, FAILURES, error_code

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "ModelSummary",
    "Pruned",
    "check",
    "export_parquet",
    "format_size",
    "idle_since",
    "of_models",
    "parse_age",
    "parse_size",
    "prune",
    "size_on_disk",
    "summarise",
    "to_fit",
    "weights_sha256",
]

VECTOR_KINDS = ("embed:image", "embed:text")
ROWS_PER_BATCH = 4096
SHORTEST_PREFIX = 4  # of a hash; a shorter one would match by chance
# Bytes of an answer in the file beside its value: the hash of its input twice (row and index), digest, numbers.
OVERHEAD = 110
SECONDS = {"h": 3600, "d": 86_400, "w": 604_800}
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
BINARY_UNITS = {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}


class ModelSummary(NamedTuple):
    """What a store holds of one model; the same weights under another code or library version are another model."""

    name: str
    weights: str  # one sha256, as results name it
    precision: str
    kinds: dict[str, int]  # kind -> answers
    bytes: int
    used: float  # seconds since the epoch


class Pruned(NamedTuple):
    """What went, or would go."""

    spaces: list[SpaceInfo]
    answers: int
    bytes: int  # of room on the disk


# --- what is there


def check(path: Path) -> Verification:
    """Look at every answer of a store and change nothing, whatever its state.

    Raises:
        UserError: if it is another program's database, or of another format.
        sqlite3.DatabaseError: if it may not be read.
    """
    try:
        store = Store(path, read_only=True)
        try:
            return store.verify()
        finally:
            store.close()
    except FAILURES as error:
        if error_code(error) not in DAMAGE:
            raise
        return Verification(0, 0, (str(error),))


def size_on_disk(path: Path) -> int:
    """Bytes of a store's file and of what is not yet written back to it."""
    files = (path, path.with_name(f"{path.name}-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def summarise(infos: Iterable[SpaceInfo]) -> list[ModelSummary]:
    """One summary per model, the last used first."""
    models: dict[str, list[SpaceInfo]] = {}
    for info in infos:
        models.setdefault(json.dumps(info.space.model, sort_keys=True), []).append(info)
    return sorted(map(_summary, models.values()), key=lambda summary: -summary.used)


def _summary(infos: list[SpaceInfo]) -> ModelSummary:
    latest = max(infos, key=lambda info: info.used)
    kinds: Counter[str] = Counter()
    for info in infos:
        kinds[info.space.kind] += info.answers
    return ModelSummary(
        latest.space.name,
        weights_sha256(latest.space.model),
        _precision(latest.space.model),
        dict(sorted(kinds.items())),
        sum(info.bytes for info in infos),
        latest.used,
    )


def weights_sha256(model: Mapping[str, Any]) -> str:
    """The hash of a model's weights, or one of several files', as results name it; empty if it tells none."""
    hashes = _weight_hashes(model)
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if len(hashes) > 1 else "".join(hashes)


def _weight_hashes(model: Mapping[str, Any]) -> list[str]:
    hashes = model.get("weights") or []
    return sorted(map(str, [hashes] if isinstance(hashes, str) else hashes))


def _precision(model: Mapping[str, Any]) -> str:
    return str(model.get("precision") or "")


# --- which of it


def of_models(infos: Sequence[SpaceInfo], names: Sequence[str]) -> list[SpaceInfo]:
    """The spaces of models, each told by its name or the beginning of a hash of its weights.

    Raises:
        UserError: if there is none of one of them.
    """
    for name in names:
        if not any(_is_model(info, name) for info in infos):
            known = {info.space.name for info in infos} - {""}
            raise UserError(
                f"No answers of a model {name!r}, by name or hash of its weights.{near_matches(name, known)}"
            )
    return [info for info in infos if any(_is_model(info, name) for name in names)]


def _is_model(info: SpaceInfo, name: str) -> bool:
    if name and name == info.space.name:
        return True
    hashes = [weights_sha256(info.space.model), *_weight_hashes(info.space.model)]
    is_hash = len(name) >= SHORTEST_PREFIX and set(name.lower()) <= set(string.hexdigits)
    return is_hash and any(one.startswith(name.lower()) for one in hashes)


def idle_since(infos: Iterable[SpaceInfo], moment: float) -> list[SpaceInfo]:
    """The spaces that no run has used since (seconds since the epoch)."""
    return [info for info in infos if info.used < moment]


def to_fit(infos: Sequence[SpaceInfo], candidates: Iterable[SpaceInfo], size: int, limit: int) -> list[SpaceInfo]:
    """The least recently used candidates without which a file of this size would not exceed the limit.

    All of them if that is not enough. Room is estimated: each space has its share of the file.
    """
    share = size / max(1, sum(map(_weight, infos)))
    left = float(size)
    going = []
    for info in sorted(candidates, key=lambda info: info.used):
        if left <= limit:
            break
        going.append(info)
        left -= _weight(info) * share
    return going


def _weight(info: SpaceInfo) -> int:
    return info.bytes + OVERHEAD * info.answers


def prune(store: Store, candidates: Sequence[SpaceInfo], *, limit: int | None = None, dry_run: bool = False) -> Pruned:
    """Remove the candidates; with a limit only as many, least recently used first, as bring the file down to it.

    Raises:
        UserError: if the store may not be written.
        sqlite3.DatabaseError: if that fails.
    """
    infos = store.spaces()
    size = before = store.size()
    gone: list[SpaceInfo] = []
    answers = 0
    while going := list(candidates) if limit is None else to_fit(infos, candidates, size, limit):
        gone += going
        if dry_run:
            room = size * sum(map(_weight, going)) / max(1, sum(map(_weight, infos)))
            return Pruned(gone, sum(info.answers for info in gone), round(room))
        answers += store.prune([info.space.sha256 for info in going])
        # What was removed was chosen by an estimate: look again.
        went = {info.space.sha256 for info in gone}
        candidates = [info for info in candidates if info.space.sha256 not in went]
        infos, size = store.spaces(), store.size()
    return Pruned(gone, answers, before - size)


# --- ages and sizes, as they are typed and shown


def parse_age(text: str) -> float:
    """Seconds.

    >>> parse_age("30d") == 30 * 24 * 3600
    True

    Raises:
        UserError: if it is no number with h, d or w.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdw])", text.strip().lower())
    if match is None:
        raise UserError(f"Expected an age like 12h, 30d or 8w, but got {text!r}.")
    return float(match[1]) * SECONDS[match[2]]


def parse_size(text: str) -> int:
    """Bytes; kB, MB, GB and TB are powers of 1000, KiB and so on of 1024.

    >>> parse_size("1.5 GB")
    1500000000

    Raises:
        UserError: if it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    units = UNITS | BINARY_UNITS
    if match is None or match[2] not in units:
        raise UserError(f"Expected a size like 500MB, 10GB or 1.5GiB, but got {text!r}.")
    return round(float(match[1]) * units[match[2]])


def format_size(size: float) -> str:
    """A size for people.

    >>> format_size(2_449_000)
    '2.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# --- out of the store


def export_parquet(store: Store, out: Path, infos: Sequence[SpaceInfo]) -> int:
    """Write a row per sound answer of these spaces; how many.

    Raises:
        UserError: if the file is there already, or an answer is not what its kind promises.
    """
    import pyarrow.parquet as pq

    if out.exists():
        raise UserError(f"{out} is there already: name another file, or remove it.")
    schema = _schema()
    spaces = {info.space.sha256: info for info in infos}
    rows = _rows(store.rows(spaces), spaces)
    written = 0
    part = out.with_name(f"{out.name}.part")  # a file that was stopped half way must not look whole
    try:
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            while batch := list(islice(rows, ROWS_PER_BATCH)):
                writer.write_batch(_batch(batch, schema))
                written += len(batch)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return written


def _schema() -> pa.Schema:
    import pyarrow as pa

    names = ("model", "weights", "precision", "kind", "input", "perturbation", "prompt")
    texts = [pa.field(name, pa.string(), nullable=False) for name in names]
    answers = {"vector": pa.list_(pa.float32()), "truncated": pa.bool_(), "text": pa.string()}
    return pa.schema([*texts, *(pa.field(name, kind) for name, kind in answers.items())])


def _batch(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.RecordBatch.from_pylist(rows, schema=schema)


def _rows(answers: Iterable[tuple[str, str, bytes]], spaces: Mapping[str, SpaceInfo]) -> Iterator[dict[str, Any]]:
    from medvlm_harness.requests import Embedding

    for sha256, key, value in answers:
        space = spaces[sha256].space
        row: dict[str, Any] = {
            "model": space.name,
            "weights": weights_sha256(space.model),
            "precision": _precision(space.model),
            "kind": space.kind,
            "input": key,
            "perturbation": space.perturbation,
            "prompt": space.prompt,
        }
        try:
            if space.kind in VECTOR_KINDS:
                embedding = Embedding.from_bytes(value)
                row |= {"vector": embedding.vector, "truncated": embedding.truncated}
            else:
                row["text"] = value.decode()
        except ValueError as error:
            raise UserError(f"The {space.kind} of {key} by {space.name} cannot be exported: {error}") from error
        yield row

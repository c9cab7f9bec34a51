"""Reading lm-eval's samples, one record at a time, as its versions from 0.4.2 to 0.4.13 write them.

Since 0.4.3 they are `samples_<task>_<date>.jsonl`; up to 0.4.2 such a file holds one JSON array.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.results.run_files import RunFiles, run_folder

__all__ = ["Sample", "read_samples", "samples_files"]

_log = logging.getLogger("lm_eval.medvlm")

HASHES = ("doc_hash", "prompt_hash", "target_hash")
KNOWN = frozenset({"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", *HASHES})


@dataclass(frozen=True, slots=True)
class Sample:
    """One document, as one filter pipeline left its answers.

    Attributes:
        doc_id: its number in its split.
        doc: the document.
        target: the truth; a text since lm-eval 0.4.4, whatever it was before.
        arguments: of each request.
        responses: of each request, as the model gave them.
        filtered: of each request, as the filters left it.
        filter: the pipeline; None in files up to 0.4.5, which do not name it.
        metrics: what it contributes to each metric.
        hashes: of document, prompt and target; those that the file has.
    """

    doc_id: int
    doc: Mapping[str, Any]
    target: Any
    arguments: tuple[tuple[Any, ...], ...]
    responses: tuple[Any, ...]
    filtered: tuple[Any, ...]
    filter: str | None
    metrics: Mapping[str, Any]
    hashes: Mapping[str, str]


def samples_files(run: RunFiles) -> dict[str, Path]:
    """Task -> its samples, of this run alone: those of other runs in the same folder have another date."""
    folder = run_folder(run.path)
    if folder is None:
        return {}
    end = f"_{folder.name.removeprefix('run_')}.jsonl"
    found = sorted(run.path.parent.glob(f"samples_*{end}"))
    return {path.name.removeprefix("samples_").removesuffix(end): path for path in found}


def read_samples(path: Path) -> Iterator[Sample]:
    """The records of one file, in its order; of one with a line for each, never more than one in memory.

    A last line that was cut off, as by a run that was killed while it wrote, is left out with a warning.

    Raises:
        UserError: naming the line that is no record.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1 and line.lstrip().startswith(b"["):
                    yield from _array(line + lines.read(), path)
                    return
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    if line.endswith(b"\n"):
                        raise UserError(f"{path}: line {number} is no JSON: {first_line(error)}") from error
                    _log.warning("%s: its last line, %d, was cut off and is left out.", path, number)
                    return
                yield _sample(record, f"{path}: line {number}")
    except OSError as error:
        raise UserError(f"Expected the samples of a run, but {path} cannot be read: {first_line(error)}") from error


def _array(content: bytes, path: Path) -> Iterator[Sample]:
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {first_line(error)}") from error
    for number, record in enumerate(records):
        yield _sample(record, f"{path}: record {number}")


def _sample(record: Any, where: str) -> Sample:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a sample of lm-eval, but got {type(record).__name__}.")
    for key, kind in (("doc_id", int), ("doc", dict), ("arguments", (dict, list)), ("resps", list)):
        if not isinstance(record.get(key), kind):
            raise UserError(f"{where}: expected a sample of lm-eval, but its {key!r} is {record.get(key)!r:.60}.")
    named = record.get("metrics")
    metrics = named if isinstance(named, list) else [key for key in record if key not in KNOWN]
    return Sample(
        record["doc_id"],
        record["doc"],
        record.get("target"),
        tuple(map(_values, _values(record["arguments"]))),
        tuple(record["resps"]),
        tuple(record.get("filtered_resps") or ()),
        record.get("filter"),
        {name: record[name] for name in metrics if name in record},
        {name: record[name] for name in HASHES if name in record},
    )


def _values(arguments: Any) -> tuple[Any, ...]:
    """Arguments in their order: a list before 0.4.3, then `{"arg_0": ...}`."""
    if isinstance(arguments, Mapping):
        numbered = sorted(arguments.items(), key=lambda item: int(item[0].rpartition("_")[2] or 0))
        return tuple(value for _, value in numbered)
    return tuple(arguments) if isinstance(arguments, list) else (arguments,)

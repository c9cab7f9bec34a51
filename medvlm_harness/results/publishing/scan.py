"""A last look at every file before it goes out: tokens, paths of this machine, and words of the data's reports.

What is found is named by file, place and kind; the finding itself is never shown.

Report text is found by runs of eight words, and by whole sentences of five to seven. Shorter ones ("No acute disease.")
are what any report and any prompt says. What stands in the packaged task files, prompts and label phrases, is no report
text even where a report says the same.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from medvlm_harness.errors import UserError
from medvlm_harness.results.redaction import HOME_PATHS, SECRETS

__all__ = ["Finding", "report_texts", "sample_texts", "scan_for_reports", "scan_for_secrets"]

SHINGLE = 8  # words in a row
SENTENCE = 5  # words of the shortest sentence that is looked for as a whole
_WORD = re.compile(r"[^\W\d_]+")  # of any alphabet; numbers are everywhere
_SENTENCE_END = re.compile(r"[.;:!?\n]+")
_SAMPLE_KEYS = ("doc", "target", "arguments", "resps", "filtered_resps")
SECTIONS = ("indication", "comparison", "findings", "impression")


class Finding(NamedTuple):
    """Something that must not go out: where it stands and what kind it is of, never what it says."""

    file: str
    place: str
    kind: str


def scan_for_secrets(files: Mapping[str, bytes]) -> list[Finding]:
    """Tokens, home folders, and the name of this user or machine.

    Raises:
        ValueError: for a kind of file that is not read here.
    """
    kinds = {**SECRETS, "a home folder": HOME_PATHS, **_this_machine()}
    found = (
        Finding(file, place, kind)
        for file, data in files.items()
        for place, text in _strings(file, data)
        for kind, pattern in kinds.items()
        if pattern.search(text)
    )
    return list(dict.fromkeys(found))


def scan_for_reports(files: Mapping[str, bytes], texts: Iterable[str]) -> list[Finding]:
    """Words of reports, or of what a model wrote, in the files; `texts` is read once and not kept.

    Raises:
        ValueError: for a kind of file that is not read here.
    """
    outgoing: dict[str, tuple[str, str]] = {}
    for file, data in files.items():
        for place, text in _strings(file, data):
            for length in range(SENTENCE, SHINGLE + 1):
                for run in _runs(_words(text), length):
                    outgoing.setdefault(run, (file, place))
    for run in _allowed():
        outgoing.pop(run, None)
    found: dict[Finding, None] = {}
    for text in texts:
        for run in _telling(text):
            if run in outgoing:
                found[Finding(*outgoing[run], "words of a report or of a model's answer")] = None
    return list(found)


def report_texts(folder: Path) -> Iterator[str]:
    """The sections of all reports of a prepared set."""
    import pyarrow.parquet as pq

    from medvlm_harness.data.records import STUDIES_FILE

    for batch in pq.ParquetFile(folder / STUDIES_FILE).iter_batches(columns=list(SECTIONS)):
        for section in SECTIONS:
            yield from (text for text in batch.column(section).to_pylist() if text)


def sample_texts(samples: Path) -> Iterator[str]:
    """All strings of a samples file: documents, prompts, targets and answers.

    Raises:
        UserError: if the file is damaged.
    """
    with samples.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                sample = json.loads(line)
            except ValueError as error:
                raise UserError(f"{samples} is damaged, so what is in it cannot be looked for: delete it.") from error
            for key in _SAMPLE_KEYS:
                yield from (
                    text for place, text in _json_strings(sample.get(key), key) if not place.startswith("a key")
                )


# --- the strings of a file


def _strings(file: str, data: bytes) -> Iterator[tuple[str, str]]:
    """Where a string stands in a file, and the string; the file's own name is one."""
    yield "its name", file
    suffix = PurePosixPath(file).suffix
    if suffix == ".json":
        yield from _json_strings(json.loads(data), "")
    elif suffix == ".parquet":
        yield from _parquet_strings(data)
    elif suffix == ".png":
        yield from _png_strings(data)
    elif suffix in (".md", ".csv", ".yaml", ".txt", ".svg"):
        yield "its text", data.decode("utf-8")
    else:
        raise ValueError(
            f"{file}: expected .json, .parquet, .png, .md, .csv, .yaml, .txt or .svg: nothing else is read."
        )


def _json_strings(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield f"a key of {place or 'the file'}", str(key)
            yield from _json_strings(one, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        for one in value:
            yield from _json_strings(one, f"{place}[]")


def _parquet_strings(data: bytes) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    for key, value in (table.schema.metadata or {}).items():
        yield "metadata", f"{key.decode('utf-8', 'replace')} {value.decode('utf-8', 'replace')}"
    for name in table.column_names:
        yield "column names", name
        column = table.column(name)
        if pa.types.is_string(column.type):
            yield from ((f"column {name}", value) for value in column.unique().to_pylist() if value is not None)
        elif pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            raise ValueError(f"column {name}: expected numbers and strings, but got {column.type}: it is not read.")


def _png_strings(data: bytes) -> Iterator[tuple[str, str]]:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()  # chunks that stand behind the pixels
        for key, value in image.info.items():
            yield f"metadata {key}", f"{key} {value}"


# --- what is looked for


def _this_machine() -> dict[str, re.Pattern[str]]:
    """The user's folder and the names of user and machine; a name of three letters or less is none to look for."""
    home, host = os.path.expanduser("~"), platform.node()  # noqa: PTH111  # Path.home() raises where there is none
    found = {}
    if len(home) > 3:
        found["this user's folder"] = re.compile(re.escape(home) + r"(?!\w)")
    if len(user := re.split(r"[\\/]", home)[-1]) > 3:
        found["this user's name in a path"] = re.compile(rf"[\\/]{re.escape(user)}(?=[\\/])")
    if len(host) > 3 and host != "localhost":
        found["this machine's name"] = re.compile(rf"(?<![\w-]){re.escape(host)}(?![\w-])")
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], length: int) -> Iterator[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


def _telling(text: str) -> Iterator[str]:
    """The runs of words by which a text is recognised; what has no space is a name, which files may share."""
    if len(text.split()) < SENTENCE:
        return
    yield from _runs(_words(text), SHINGLE)
    for sentence in _SENTENCE_END.split(text):
        words = _words(sentence)
        if SENTENCE <= len(words) < SHINGLE:
            yield " ".join(words)


@cache
def _allowed() -> frozenset[str]:
    """The same of the packaged task files."""
    from medvlm_harness.plugin import tasks_folder

    found: set[str] = set()
    for path in sorted(tasks_folder().rglob("*")):
        if path.suffix == ".yaml" or path.name.endswith("_yaml"):
            words = _words(path.read_text(encoding="utf-8"))
            for length in range(SENTENCE, SHINGLE + 1):
                found.update(_runs(words, length))
    return frozenset(found)

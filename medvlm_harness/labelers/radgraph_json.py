"""RadGraph's JSON: gold annotations, or what a RadGraph model wrote in another environment, read and checked.

Both label schemes are read and given in RadGraph-XL's names; measurements count as what they measure. `test.json` of
the original has two annotators per report: score against each and average, or choose one and say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError, near_matches

__all__ = ["LABELS", "RELATIONS", "AnnotatedReport", "Entities", "read_radgraph", "xl_label"]

_KINDS, _STATUSES = ("Anatomy", "Observation"), ("definitely present", "definitely absent", "uncertain")
LABELS = tuple(f"{kind}::{status}" for kind in _KINDS for status in _STATUSES)
_V1 = {
    "ANAT-DP": "Anatomy::definitely present",
    "OBS-DP": "Observation::definitely present",
    "OBS-DA": "Observation::definitely absent",
    "OBS-U": "Observation::uncertain",
}
RELATIONS = ("modify", "located_at", "suggestive_of")
_ANNOTATORS = ("labeler_1", "labeler_2")
ONE_ANNOTATOR = "entities"
_SUFFIXES = (".json", ".jsonl")

Entities = Mapping[str, Mapping[str, Any]]
"""Number -> tokens, label (XL), start_ix and end_ix (tokens, both inclusive), relations ([type, number] each)."""


@dataclass(frozen=True, slots=True)
class AnnotatedReport:
    """One report as one or two annotators saw it."""

    key: str
    text: str  # tokens joined by single spaces
    annotations: Mapping[str, Entities]  # annotator -> entities; `entities` where there is one without a name


def xl_label(label: str) -> str:
    """A label of either scheme in RadGraph-XL's names.

    Raises:
        UserError: if it is of neither.

    >>> xl_label("OBS-DA"), xl_label("Anatomy::measurement::definitely present")
    ('Observation::definitely absent', 'Anatomy::definitely present')
    """
    name = _V1.get(label, label.replace("::measurement::", "::"))
    if name not in LABELS:
        raise UserError(f"expected a label of RadGraph or RadGraph-XL, but got {label!r}"
                        f".{near_matches(label, (*LABELS, *_V1))}")  # fmt: skip
    return name


def read_radgraph(path: Path) -> dict[str, AnnotatedReport]:
    """Read a file of annotated reports, by key, in the file's order.

    Args:
        path: `.json`, a mapping of keys to reports; or `.jsonl`, one report a line with its `id`.

    Raises:
        UserError: naming the report and what is wrong with it, if the file is no such file.
    """
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        raise UserError(f"Expected a RadGraph file ({', '.join(_SUFFIXES)}), but {path} is none.")
    reports: dict[str, AnnotatedReport] = {}
    try:
        for key, raw in _documents(path):
            if key in reports:
                raise UserError(f"report {key!r} is there twice")
            reports[key] = _report(key, raw)
    except UserError as error:
        raise UserError(f"{path.name} is no RadGraph file: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is no RadGraph file: byte {error.start} is not UTF-8.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path.name} is no RadGraph file: it is not JSON ({error}).") from error
    if not reports:
        raise UserError(f"{path.name} is no RadGraph file: it holds no report.")
    return reports


def _documents(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json":
        whole = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(whole, dict):
            raise UserError(f"expected a mapping of reports, but got a {type(whole).__name__}.")
        yield from whole.items()
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            raw = json.loads(line, object_pairs_hook=_without_repeats)
            key = raw.get("id") if isinstance(raw, dict) else None
            if not isinstance(key, str | int):
                raise UserError(f"expected a report with an id in line {number}.")
            yield str(key), raw


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python's own would keep the last of two equal keys without a word."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise UserError(f"the key {key!r} is there twice.")
        result[key] = value
    return result


def _report(key: str, raw: Any) -> AnnotatedReport:
    where = f"report {key!r}"
    if not isinstance(raw, dict) or not isinstance(raw.get("text"), str):
        raise UserError(f"{where} has no text.")
    found = {name: raw[name] for name in _ANNOTATORS if name in raw}
    annotators = {name: part.get("entities") if isinstance(part, dict) else None for name, part in found.items()}
    if ONE_ANNOTATOR in raw:
        annotators[ONE_ANNOTATOR] = raw[ONE_ANNOTATOR]
    if not annotators:
        raise UserError(f"{where} has no entities ({ONE_ANNOTATOR}, or {' and '.join(_ANNOTATORS)}).")
    tokens = raw["text"].split()
    annotations = {}
    for name, entities in annotators.items():
        if not isinstance(entities, dict):
            raise UserError(f"{where}: expected {name} to map numbers to entities, but got {_shown(entities)}.")
        annotations[name] = {number: _entity(f"{where}, entity {number}", entity, entities, tokens)
                             for number, entity in entities.items()}  # fmt: skip
    return AnnotatedReport(key, " ".join(tokens), annotations)


def _entity(where: str, raw: Any, entities: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    if not isinstance(raw, dict) or not {"tokens", "label", "start_ix", "end_ix"} <= raw.keys():
        raise UserError(f"{where}: expected tokens, label, start_ix and end_ix, but got {_shown(raw)}.")
    if not (isinstance(raw["tokens"], str) and isinstance(raw["label"], str)):
        raise UserError(f"{where}: expected tokens and label to be text, but got {_shown(raw)}.")
    start, end = raw["start_ix"], raw["end_ix"]
    if not (_is_index(start) and _is_index(end) and start <= end < len(tokens)):
        raise UserError(f"{where}: expected places among {len(tokens)} tokens, but got {start!r} to {end!r}.")
    there = " ".join(tokens[start : end + 1])
    if there != " ".join(raw["tokens"].split()):
        raise UserError(f"{where}: expected tokens {there!r} at {start} to {end}, but got {raw['tokens']!r}.")
    relations = raw.get("relations", [])
    if not isinstance(relations, list):
        raise UserError(f"{where}: expected a list of relations, but got {_shown(relations)}.")
    try:
        label = xl_label(raw["label"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return {
        "tokens": there,
        "label": label,
        "start_ix": start,
        "end_ix": end,
        "relations": [_relation(where, relation, entities) for relation in relations],
    }


def _relation(where: str, raw: Any, entities: Mapping[str, Any]) -> list[str]:
    if not (isinstance(raw, list) and len(raw) == 2 and raw[0] in RELATIONS and str(raw[1]) in entities):
        raise UserError(f"{where}: expected a relation ({', '.join(RELATIONS)}) to an entity that is there, "
                        f"but got {_shown(raw)}.")  # fmt: skip
    return [raw[0], str(raw[1])]


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

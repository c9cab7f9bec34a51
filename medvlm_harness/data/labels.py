"""Where labels come from: a table of a labeler's output, the coders' MeSH terms, and what one label then means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from medvlm_harness.data.chexpert import CHEXPERT_13, CHEXPERT_14, canonical_name
from medvlm_harness.data.records import Labels
from medvlm_harness.data.sources.base import ReadLog, read_rows, uid_of
from medvlm_harness.errors import UserError, near_matches

__all__ = [
    "LABELER_SOURCE",
    "MESH_SOURCE",
    "LabelTable",
    "Uncertain",
    "coded_terms",
    "mesh_labels",
    "mesh_rule_version",
    "read_label_table",
    "resolve",
]

LABELER_SOURCE, MESH_SOURCE = "chexpert_labeler", "mesh"
Uncertain = Literal["exclude", "positive", "negative"]
_UNCERTAIN: dict[str, int | None] = {"exclude": None, "positive": 1, "negative": 0}
_CELLS: dict[str, int | None] = {"": None, "1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}


@dataclass(frozen=True, slots=True)
class LabelTable:
    """Labels per study as a table gives them."""

    names: tuple[str, ...]  # the observations that the table has a column for, in CheXpert's order
    labels: Mapping[str, Labels]  # uid -> labels


def read_label_table(path: Path, log: ReadLog | None = None) -> LabelTable:
    """Read a CSV with a column per observation and one row per study (`uid`) or per image (`filename`).

    Column names are CheXpert's in any case, with spaces or underscores, with or without `chexpert_`; cells are 1, 0,
    -1 (uncertain) or blank (unmentioned). Studies with any other cell, or whose images' rows disagree, are left out
    and logged by name: unlabelled is safer than wrong.

    Raises:
        UserError: if the table has no observation, or neither `uid` nor `filename`.
    """
    log = ReadLog() if log is None else log
    labels: dict[str, Labels] = {}
    refused: set[str] = set()
    columns: dict[str, str] | None = None
    for number, row in enumerate(read_rows(path, (), log), start=1):
        if columns is None:
            columns = _columns(path, row)
        uid = row.get("uid", "").strip() or uid_of(row.get("filename", "")) or ""
        name = f"{path.name} {row.get('filename') or uid or f'row {number}'}"
        if not uid:
            log.drop("label_without_uid", name)
            continue
        cells = {label: row[column].strip() for label, column in columns.items()}
        wrong = [f"{label} {cell!r}" for label, cell in cells.items() if cell not in _CELLS]
        values = {label: _CELLS.get(cell) for label, cell in cells.items()}
        if wrong:
            log.drop("bad_label", name, ", ".join(wrong))
            refused.add(uid)
        elif labels.setdefault(uid, values) != values:
            log.drop("labels_disagree", name, "another row of this study says otherwise")
            refused.add(uid)
    if columns is None:
        raise UserError(f"Expected rows of labels in {path}, but there are none.")
    kept = {uid: values for uid, values in labels.items() if uid not in refused}
    return LabelTable(tuple(name for name in CHEXPERT_14 if name in columns), kept)


def coded_terms(terms: Sequence[str]) -> list[tuple[str, ...]] | None:
    """MeSH terms in their parts, lower case and single blanks; None where nobody coded the study.

    >>> coded_terms(["Pleural Effusion/left"]), coded_terms(["No Indexing"]), coded_terms([])
    ([('pleural effusion', 'left')], None, None)
    """
    split = [tuple(_key(part) for part in term.split("/")) for term in terms if term.strip()]
    return None if not split or _mesh_rules().unlabelled.intersection(parts[0] for parts in split) else split


def mesh_labels(terms: Sequence[str]) -> Labels | None:
    """The fourteen observations of one study by the rules of `mesh_chexpert.yaml`; None where nobody coded it.

    Every observation is 1, 0 or -1, never None: coders index what is there, so what they leave out is 0.

    >>> labels = mesh_labels(["Cardiomegaly/borderline", "Pleural Effusion/left"])
    >>> labels["Cardiomegaly"], labels["Pleural Effusion"], labels["Fracture"], labels["No Finding"]
    (-1, 1, 0, 0)
    """
    rules = _mesh_rules()
    split = coded_terms(terms)
    if split is None:
        return None
    heads = {head for head, *_ in split}
    labels: dict[str, int | None] = dict.fromkeys(CHEXPERT_14, 0)
    for name, rule in rules.labels:
        for head, *qualifiers in split:
            value = rule.value(head, frozenset(qualifiers))
            if value == 1 or (value == -1 and labels[name] == 0):
                labels[name] = value
    about_the_chest = heads - rules.about_the_image
    if about_the_chest:
        labels["No Finding"] = int(about_the_chest <= rules.normal)
    else:
        labels["No Finding"] = -1
    return labels


def mesh_rule_version() -> int:
    """Version of the rules, for the manifest."""
    return _mesh_rules().version


def resolve(labels: Labels | None, name: str, *, uncertain: Uncertain = "exclude") -> int | None:
    """What one label means in an evaluation: 1, 0, or None for "leave this study out".

    Args:
        labels: of one study from one source; None where the source had nothing to read: unknown.
        name: the observation. One that the source does not cover is unknown; one that it covers and the text does not
            mention is 0.
        uncertain: what -1 becomes.

    >>> resolve({"Edema": None}, "Edema"), resolve({"Edema": -1}, "Edema"), resolve(None, "Edema")
    (0, None, None)
    """
    if uncertain not in _UNCERTAIN:
        raise UserError(f"Expected uncertain to be one of {', '.join(_UNCERTAIN)}, but got {uncertain!r}.")
    if labels is None or name not in labels:
        return None
    value = labels[name]
    if value is None:
        return 0
    return _UNCERTAIN[uncertain] if value == -1 else value


def _columns(path: Path, row: Mapping[str, str]) -> dict[str, str]:
    if not {"uid", "filename"} & row.keys():
        raise UserError(f"Expected a column uid or filename in {path}, but it has {', '.join(row)}.")
    columns: dict[str, str] = {}
    for column in row:
        name = canonical_name(column)
        if name in columns:
            raise UserError(f"Expected one column of {name} in {path}, but {columns[name]} and {column} both are.")
        if name is not None:
            columns[name] = column
    if not columns:
        raise UserError(f"Expected columns named as CheXpert's observations in {path}, but it has {', '.join(row)}.")
    return columns


@dataclass(frozen=True, slots=True)
class _Rule:
    """One line of the mapping; see the head of `mesh_chexpert.yaml`."""

    term: str
    given: int  # 1 or -1
    required: frozenset[str]
    excluded: frozenset[str]
    hedges: frozenset[str]

    def value(self, head: str, qualifiers: frozenset[str]) -> int:
        """1, -1, or 0 where the rule does not match."""
        if head != self.term or not self.required <= qualifiers or self.excluded & qualifiers:
            return 0
        return -1 if self.hedges & qualifiers else self.given


@dataclass(frozen=True, slots=True)
class _MeshRules:
    version: int
    unlabelled: frozenset[str]
    normal: frozenset[str]
    about_the_image: frozenset[str]
    labels: tuple[tuple[str, _Rule], ...]


@cache
def _mesh_rules() -> _MeshRules:
    raw = yaml.safe_load(files("medvlm_harness.data").joinpath("mesh_chexpert.yaml").read_text(encoding="utf-8"))
    return _MeshRules(
        version=int(raw["version"]),
        unlabelled=_keys(raw["unlabelled"]),
        normal=_keys(raw["normal"]),
        about_the_image=_keys(raw["about_the_image"]),
        labels=tuple((name, rule) for name, rules in raw["labels"].items() for rule in _rules(name, rules)),
    )


def _rules(name: str, rules: Sequence[Mapping[str, Any]]) -> Iterator[_Rule]:
    if name not in CHEXPERT_13:
        raise ValueError(
            f"Expected an observation in mesh_chexpert.yaml, but got {name!r}.{near_matches(name, CHEXPERT_13)}"
        )
    for rule in rules:
        unknown = rule.keys() - {"term", "value", "with", "without", "uncertain_if"}
        if unknown or rule.get("value", 1) not in (1, -1):
            raise ValueError(f"Expected a rule for {name} in mesh_chexpert.yaml, but got {dict(rule)}.")
        yield _Rule(
            term=_key(rule["term"]),
            given=rule.get("value", 1),
            required=_keys(rule.get("with", ())),
            excluded=_keys(rule.get("without", ())),
            hedges=_keys(rule.get("uncertain_if", ())),
        )


def _key(text: str) -> str:
    return " ".join(text.lower().split())


def _keys(texts: Sequence[str]) -> frozenset[str]:
    return frozenset(map(_key, texts))

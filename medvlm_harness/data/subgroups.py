"""Subgroups of a study by what its record says: sex, whether an earlier study exists, technical quality of the image.

The rules are data: subgroups.yaml beside this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from medvlm_harness.data.labels import coded_terms

__all__ = ["stated", "subgroup_rule_version", "subgroups_of"]


def subgroups_of(sections: Mapping[str, str], mesh: Sequence[str]) -> dict[str, str]:
    """Attribute -> value, for each attribute that the record settles.

    Args:
        sections: the texts of the report, by name.
        mesh: the coders' terms.

    >>> subgroups_of({"indication": "XXXX-year-old male, dyspnea", "comparison": "None."}, ["normal"])
    {'sex': 'male', 'comparison': 'none', 'image_quality': 'not flagged'}
    """
    rules = _rules()
    found = {name: stated(name, sections.get(section, "")) for name, section in rules.sections.items()}
    coded = coded_terms(mesh)
    if coded is not None:
        heads = {head for head, *_ in coded}
        found |= {name: code.value(heads) for name, code in rules.codes.items()}
    return {name: value for name, value in found.items() if value is not None}


def stated(attribute: str, text: str) -> str | None:
    """The value of an attribute that a section states; None where it states none or several.

    >>> stated("comparison", "None."), stated("comparison", "Chest XXXX"), stated("comparison", "")
    ('none', 'available', None)
    """
    plain = " ".join(text.lower().split())
    values = [statement.value for statement in _rules().statements[attribute] if statement.holds(plain)]
    return values[0] if len(values) == 1 else None


def subgroup_rule_version() -> int:
    """Version of the rules, for the manifest."""
    return _rules().version


@dataclass(frozen=True, slots=True)
class _Statement:
    """When a text states one value."""

    value: str
    says: tuple[re.Pattern[str], ...]
    unless: tuple[re.Pattern[str], ...]

    def holds(self, text: str) -> bool:
        return any(p.search(text) for p in self.says) and not any(p.search(text) for p in self.unless)


@dataclass(frozen=True, slots=True)
class _Code:
    """Values by MeSH term, and the value of a coded study that has none of the terms."""

    terms: Mapping[str, str]  # term -> value
    otherwise: str

    def value(self, heads: set[str]) -> str:
        return next((value for term, value in self.terms.items() if term in heads), self.otherwise)


@dataclass(frozen=True, slots=True)
class _Rules:
    version: int
    sections: Mapping[str, str]  # attribute -> section that states it
    statements: Mapping[str, tuple[_Statement, ...]]
    codes: Mapping[str, _Code]


@cache
def _rules() -> _Rules:
    raw = yaml.safe_load(files("medvlm_harness.data").joinpath("subgroups.yaml").read_text(encoding="utf-8"))
    return _Rules(
        version=int(raw["version"]),
        sections={name: entry["section"] for name, entry in raw["sections"].items()},
        statements={name: tuple(_statements(name, entry["values"])) for name, entry in raw["sections"].items()},
        codes={name: _code(entry) for name, entry in raw["codes"].items()},
    )


def _statements(attribute: str, values: Mapping[str, Mapping[str, Any]]) -> Iterator[_Statement]:
    for value, entry in values.items():
        if not {"says"} <= entry.keys() <= {"says", "unless"}:
            raise ValueError(f"Expected says and unless of {attribute} in subgroups.yaml, but got {', '.join(entry)}.")
        yield _Statement(value, _compiled(entry["says"]), _compiled(entry.get("unless", ())))


def _code(entry: Mapping[str, Any]) -> _Code:
    terms = {term.lower(): value for value, names in entry["values"].items() for term in names}
    return _Code(terms, entry["otherwise"])


def _compiled(patterns: Sequence[str | Sequence[str]]) -> tuple[re.Pattern[str], ...]:
    """A list may hold another list whole, as an alias does."""
    flat = [one for item in patterns for one in ([item] if isinstance(item, str) else item)]
    return tuple(map(re.compile, flat))

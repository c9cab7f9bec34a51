"""The term file of the text perturbations, checked when it is read, and the version that goes into every identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

__all__ = ["Terms", "terms", "terms_version"]

_PACKAGE = "medvlm_harness.perturbations.text"
_MODULES = ("base", "guard", "layout", "paraphrase", "polarity", "words")
# All that decides what becomes of a text, beside the labeler, which has a version of its own.
_DECIDING = {
    _PACKAGE: ("terms.yaml", *(f"{name}.py" for name in _MODULES)),
    "medvlm_harness.metrics": ("laterality.py", "laterality.yaml", "sentences.py"),
    "medvlm_harness.labelers": ("lexicon.py", "terms/entities.yaml"),
}


@dataclass(frozen=True, slots=True)
class Terms:
    """The keys of terms.yaml; see there."""

    version: int
    negation_cues: tuple[str, ...]
    short_forms: Mapping[str, str]
    abbreviations: Mapping[str, str]
    synonyms: Mapping[str, tuple[str, ...]]
    questions: Mapping[str, tuple[str, ...]]
    image_words: tuple[str, ...]
    inverted_question: str
    instructions: tuple[tuple[str, ...], ...]
    prompt_pairs: tuple[tuple[str, ...], ...]
    prompt_frames: tuple[str, ...]


@cache
def terms() -> Terms:
    """The term file, read once.

    Raises:
        ValueError: if a key is missing or unknown, or a word is no text (YAML reads an unquoted `no` as false).
    """
    raw = yaml.safe_load(_text(_PACKAGE, "terms.yaml"))
    if not isinstance(raw, dict) or raw.keys() != set(Terms.__slots__):
        found = sorted(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"Expected the keys {', '.join(Terms.__slots__)} in terms.yaml, but got {found}.")
    return Terms(raw["version"], **{key: _frozen(value) for key, value in raw.items() if key != "version"})


@cache
def terms_version() -> str:
    """The file's own number, and the start of the sha256 of it and of all code and words that it works with."""
    digest = hashlib.sha256()
    for package, names in _DECIDING.items():
        for name in names:
            digest.update(_text(package, name).replace("\r\n", "\n").encode())
    return f"{terms().version}+{digest.hexdigest()[:8]}"


def _frozen(value: Any) -> Any:
    """Lists as tuples, down to the texts."""
    if isinstance(value, dict):
        return {_frozen(key): _frozen(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_frozen(inner) for inner in value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"Expected texts in terms.yaml, but got {value!r} (quote yes, no, on and off).")
    return value


def _text(package: str, name: str) -> str:
    return files(package).joinpath(*name.split("/")).read_text(encoding="utf-8")

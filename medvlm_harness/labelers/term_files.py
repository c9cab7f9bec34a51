"""The term files: hand-written words and phrases as YAML, checked when they are read, and known by a version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from medvlm_harness.errors import near_matches

__all__ = ["load_terms", "rules_version", "strings"]


def load_terms(name: str, keys: Iterable[str]) -> dict[str, Any]:
    """A term file as a mapping with exactly these keys, and `version`, which is left out.

    Raises:
        ValueError: if a key is missing or unknown.
    """
    raw = yaml.safe_load(_text(name))
    expected = {*keys, "version"}
    if not isinstance(raw, dict) or raw.keys() != expected:
        found = raw.keys() if isinstance(raw, dict) else set()
        hints = "".join(near_matches(str(key), expected) for key in found - expected)
        raise ValueError(f"Expected the keys {sorted(expected)} in {name}, but got {sorted(map(str, found))}.{hints}")
    return {key: raw[key] for key in raw if key != "version"}


def strings(name: str, values: Any) -> tuple[str, ...]:
    """A list of distinct phrases in lower case, their spaces single.

    Raises:
        ValueError: if it is anything else; YAML reads an unquoted `no` as false.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        wrong = [value for value in values if not isinstance(value, str)] if isinstance(values, list) else values
        raise ValueError(f"Expected a list of phrases in {name}, but got {wrong!r} (quote yes, no, on and off).")
    phrases = tuple(" ".join(value.lower().split()) for value in values)
    twice = sorted({phrase for phrase in phrases if phrases.count(phrase) > 1})
    if twice:
        raise ValueError(f"Expected each phrase once in a list of {name}, but got {', '.join(twice)} twice.")
    return phrases


def rules_version(names: Iterable[str], modules: Iterable[str]) -> str:
    """The files' own numbers, and the start of the sha256 of all that decides: a change without a new number shows too.

    Args:
        names: term files.
        modules: modules of this package that read them.
    """
    names = tuple(names)
    digest = hashlib.sha256()
    for text in (*map(_text, names), *map(_source, modules)):
        # Line ends may differ between checkouts; what is said does not.
        digest.update(text.replace("\r\n", "\n").encode())
    numbers = [int(yaml.safe_load(_text(name))["version"]) for name in names]
    return f"{'.'.join(map(str, numbers))}+{digest.hexdigest()[:8]}"


@cache
def _text(name: str) -> str:
    return files("medvlm_harness.labelers").joinpath("terms", name).read_text(encoding="utf-8")


def _source(module: str) -> str:
    return files("medvlm_harness.labelers").joinpath(f"{module}.py").read_text(encoding="utf-8")

"""Model cards: what a model is, as frozen data, and the card that may lie beside weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from medvlm_harness.errors import UserError, near_matches

__all__ = ["CARD_FILE", "ModelCard", "Prompts", "Source", "card_beside"]

CARD_FILE = "medvlm_card.yaml"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,99}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint is published; None is unknown or not pinned, never a guess."""

    location: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)  # file name -> hash


@dataclass(frozen=True, slots=True)
class Prompts:
    """Templates that a checkpoint was trained or published with, verbatim; `{}` stands for the label."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()  # empty: the publication scores positives only
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model is. Numbers and names that nobody published are None."""

    name: str
    family: Literal["dual encoder", "baseline", "generative", "text encoder"]
    summary: str = ""
    source: Source | None = None
    licence: str | None = None
    parameters: int | None = None
    # Data set names, or "<scheme> <split> split", or {dataset: ..., splits: [...]}; None where nothing is known.
    trained_on: tuple[Any, ...] | None = None
    preprocessing: str = ""
    # How probabilities come from cosines: softmax over a pair with the model's own logit scale, or with none; or from
    # (pseudo-)log-likelihoods, of which they are the softmax.
    probability_scale: Literal["logit scale", "no scale", "sigmoid", "given", "log-likelihood"] = "logit scale"
    prompts: Prompts | None = None
    reference: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def card_beside(weights: Path, card: ModelCard) -> ModelCard:
    """A card completed by the `medvlm_card.yaml` that lies beside a checkpoint, where one does.

    Raises:
        UserError: if that file is no mapping, has unknown keys, or a value of another kind than the card's.
    """
    path = (weights if weights.is_dir() else weights.parent) / CARD_FILE
    if not path.is_file():
        return card
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, Mapping):
        raise UserError(f"{path}: expected a mapping, but got {given!r}.")
    known = {f.name for f in fields(ModelCard)} - {"family", "source", "prompts", "probability_scale"}
    for key in given:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}.{near_matches(str(key), known)}")
    values = {key: _checked(path, str(key), value) for key, value in given.items()}
    return replace(card, **values)


def _checked(path: Path, key: str, value: Any) -> Any:
    """A value from somebody's file; the name becomes a folder's, and all of it is written into results."""
    if key == "trained_on":
        entries = [value] if isinstance(value, str | Mapping) else value
        if entries is None or (isinstance(entries, list) and all(isinstance(e, str | Mapping) for e in entries)):
            return entries if entries is None else tuple(entries)
        raise UserError(f"{path}: expected trained_on to be a list of names or of mappings, but got {value!r}.")
    if key == "name" and not (isinstance(value, str) and _NAME.fullmatch(value)):
        raise UserError(f"{path}: expected name to be letters, digits and . _ + - or spaces, but got {value!r}.")
    if not isinstance(value, int if key == "parameters" else str):
        raise UserError(f"{path}: expected {key} to be a {'number' if key == 'parameters' else 'text'}, got {value!r}.")
    return value

"""Model cards: what a model is, as frozen data; how they are read from YAML; the card that may lie beside weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from medvlm_harness.errors import UserError, near_matches

__all__ = ["CARD_FILE", "ModelCard", "Prompts", "Source", "card_beside", "checked_fields", "read_mapping"]

CARD_FILE = "medvlm_card.yaml"
# What a user cannot know better than the backend.
_NOT_BESIDE = {"family", "source", "prompts", "probability_scale", "traps"}
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

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()  # empty: the publication scores positives only
    conversation: str = ""  # of a generative model: one turn; `{q}` stands for the question
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model is. Numbers and names that nobody published are None."""

    name: str
    family: Literal["dual encoder", "baseline", "generative", "text encoder", "image encoder", "image classifier"]
    summary: str = ""
    source: Source | None = None
    licence: str | None = None
    parameters: int | None = None
    counted: str = ""  # what the number of parameters is of, and where it comes from
    billions: float | None = None  # as the published name says, where nobody counted exactly
    # Data set names, or "<scheme> <split> split", or {dataset: ..., scheme: ..., splits: [...]}, the scheme optional;
    # None where nothing is known.
    trained_on: tuple[Any, ...] | None = None
    preprocessing: str = ""
    # How probabilities come from cosines: softmax over a pair with the model's own logit scale, or with none; or from
    # (pseudo-)log-likelihoods, of which they are the softmax.
    probability_scale: Literal["logit scale", "no scale", "sigmoid", "given", "log-likelihood"] | None = "logit scale"
    prompts: Prompts | None = None
    traps: tuple[str, ...] = ()  # what gives wrong numbers without an error, one sentence each
    reference: str = ""
    training: Mapping[str, Any] | None = None  # how `medvlm finetune` made it: method, seed, steps, base models

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
    known = {f.name for f in fields(ModelCard)} - _NOT_BESIDE
    return replace(card, **checked_fields(str(path), ModelCard, read_mapping(path), known=known))


def read_mapping(path: Path) -> Mapping[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: if it is not valid YAML, or no mapping.
    """
    try:
        # The C reader where there is one: ten times as fast, and as safe.
        given = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, Mapping):
        raise UserError(f"{path}: expected a mapping, but got {given!r}.")
    return given


def checked_fields(
    where: str, kind: type, given: Mapping[str, Any], *, known: Collection[str] | None = None
) -> dict[str, Any]:
    """Values from a file for the fields of a frozen dataclass, each of the kind that the field declares.

    Args:
        where: the file, for the errors.
        kind: the dataclass.
        given: key -> value as YAML has it.
        known: the keys that may be given, if not all fields.

    Raises:
        UserError: for an unknown key, or a value of another kind.
    """
    hints = get_type_hints(kind)
    allowed = set(hints) if known is None else known
    for key in given:
        if key not in allowed:
            raise UserError(f"{where}: unknown key {key!r}.{near_matches(str(key), allowed)}")
    return {key: _checked(where, key, value, hints[key]) for key, value in given.items()}


def _checked(where: str, key: str, value: Any, hint: Any) -> Any:
    """A value from somebody's file; the name becomes a folder's, and all of it is written into results."""
    if key == "trained_on":
        entries = [value] if isinstance(value, str | Mapping) else value
        if entries is None or (isinstance(entries, list) and all(isinstance(e, str | Mapping) for e in entries)):
            return entries if entries is None else tuple(entries)
        raise UserError(f"{where}: expected trained_on to be a list of names or of mappings, but got {value!r}.")
    if key == "name" and not (isinstance(value, str) and _NAME.fullmatch(value)):
        raise UserError(f"{where}: expected name to be letters, digits and . _ + - or spaces, but got {value!r}.")
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected {key} to be a mapping, but got {value!r}.")
        return hint(**checked_fields(f"{where}: {key}", hint, value))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise UserError(f"{where}: expected {key} to be one of {choices}, but got {value!r}.")
        return value
    if get_origin(hint) is tuple:
        if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise UserError(f"{where}: expected {key} to be a list of texts, but got {value!r}.")
        return tuple(value)
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected {key} to be a mapping, but got {value!r}.")
        if get_args(hint)[1] is str and not all(isinstance(one, str) for pair in value.items() for one in pair):
            raise UserError(f"{where}: expected {key} to map texts to texts, but got {value!r}.")
        return dict(value)
    kinds = {int: "a number", float: "a number", str: "a text"}
    if isinstance(value, bool) or not isinstance(value, (int, float) if hint is float else hint):
        raise UserError(f"{where}: expected {key} to be {kinds[hint]}, got {value!r}.")
    return value

"""The catalogue: one YAML card in `catalogue/` for each backend, and for each model of the field that one can run.

Cards are read here alone: a backend takes its own by `backend_card`, `medvlm models` lists them without torch, and a
checkpoint that is named by its Hub id (or by `card=NAME`) gets the card of that model into its results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.model_backends.cards import ModelCard, checked_fields, read_mapping

__all__ = [
    "PARAMETER_LIMIT",
    "Entry",
    "Run",
    "backend_card",
    "catalogue",
    "find",
    "over_limit",
    "published_card",
    "state",
    "variant_card",
]

PARAMETER_LIMIT = 10_000_000_000  # this benchmark is about small models


@dataclass(frozen=True, slots=True)
class Run:
    """How a model is run, and what stands in the way."""

    model: str | None = None  # --model; None if nothing here runs it
    args: str = ""  # --model_args, with DIR and FILE for what lies on the user's disk
    # Where the weights come from: with the package, from the card's source, from the user; or nobody published any.
    weights: Literal["packaged", "published", "yours", "none"] = "published"
    access: str = ""  # what must be agreed to, or done, before they can be had
    cannot: str = ""  # why it cannot run
    answers: str = ""  # which tracks it takes part in, where that is less than its family does


@dataclass(frozen=True, slots=True)
class Entry:
    """A card with how it is run."""

    card: ModelCard
    run: Run


@cache
def catalogue() -> Mapping[str, Entry]:
    """Every card by its name, in the order of names.

    Raises:
        UserError: if a file is not what is declared above.
    """
    return {path.stem: _read(path.stem) for path in sorted(_folder().glob("*.yaml"))}


def find(name: str) -> Entry:
    """One card by its name, any case.

    Raises:
        UserError: with near matches, if there is none.
    """
    names = {path.stem for path in _folder().glob("*.yaml")}
    if name.lower() not in names:
        raise UserError(f"No model {name!r} in the catalogue.{near_matches(name.lower(), names)}")
    return _read(name.lower())


def backend_card(name: str) -> ModelCard:
    """The card of a backend, by the name that --model has for it."""
    return find(name).card


def variant_card(name: str, card: ModelCard) -> ModelCard:
    """The card of a backend's variant, by its name, on the scale that this run's options chose for `card`."""
    return replace(backend_card(name), probability_scale=card.probability_scale)


def published_card(model: str, location: str, revision: str | None) -> ModelCard | None:
    """The card of a published checkpoint that a backend (`--model`) is pointed at; None for one without a card."""
    for entry in catalogue().values():
        card = entry.card
        if entry.run.model == model and card.source is not None and card.source.location == location:
            same = card.source.revision in (None, revision)
            # A pinned hash is of the pinned revision alone.
            pinned = card.source.sha256 if same else {}
            return replace(card, source=replace(card.source, revision=revision, sha256=pinned))
    return None


def state(entry: Entry, registered: Collection[str]) -> str:
    """Whether a model can be run here: yes, needs weights from ..., or no because ..."""
    run, source = entry.run, entry.card.source
    if run.model is None or run.cannot:
        return f"no: {run.cannot}"
    if run.model not in registered:
        return f"no: this installation has no --model {run.model}"
    if run.weights == "packaged":
        return "yes"
    if run.weights == "yours":
        return "yes, with weights of yours"
    if run.weights == "none":
        return "needs weights of yours: none were published"
    where = "its publication" if source is None else source.location
    return f"needs weights from {where}" + (f" ({run.access})" if run.access else "")


def over_limit(card: ModelCard) -> bool:
    """Whether a model is larger than this benchmark is about."""
    return (card.parameters or (card.billions or 0) * 1e9) > PARAMETER_LIMIT


def _folder() -> Path:
    return Path(str(files("medvlm_harness.model_backends"))) / "catalogue"


@cache
def _read(name: str) -> Entry:
    path = _folder() / f"{name}.yaml"
    given = _extended(path)
    run = given.pop("run", {})
    if not isinstance(run, Mapping):
        raise UserError(f"{path}: expected run to be a mapping, but got {run!r}.")
    if given.get("name") != name:
        raise UserError(f"{path}: expected name to be {name}, but got {given.get('name')!r}.")
    for one in fields(ModelCard):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in given:
            raise UserError(f"{path}: expected a {one.name}.")
    card = ModelCard(**checked_fields(str(path), ModelCard, given))
    return Entry(card, Run(**checked_fields(f"{path}: run", Run, run)))


def _extended(path: Path) -> dict[str, Any]:
    """The keys of a file over those of the one that it `extends`; of `run`, key by key."""
    given = dict(read_mapping(path))
    base = given.pop("extends", None)
    if base is None:
        return given
    if not (path.parent / f"{base}.yaml").is_file():
        raise UserError(f"{path}: extends {base!r}, which has no card.")
    below = _extended(path.parent / f"{base}.yaml")
    run = {**below.get("run", {}), **given.pop("run", {})}
    return {**below, **given, "run": run}

"""What a folder of sentence-transformers says beside the weights: pooling, longest text, and words before each text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medvlm_harness.errors import UserError

__all__ = ["SentenceLayout", "read_layout", "vocabulary_is_cased"]

MODULES = "modules.json"
CASED_SHARE = 0.02  # of the words of a vocabulary: those of an uncased one have no capitals at all


@dataclass(frozen=True, slots=True)
class SentenceLayout:
    """How texts become vectors; the defaults are for a folder that does not say."""

    pooling: Literal["mean", "cls"] = "mean"
    max_length: int | None = None
    prefix: str = ""
    lower: bool = False


def read_layout(folder: Path) -> SentenceLayout:
    """Read modules.json and what it names; the defaults where there is none.

    Raises:
        UserError: if its vectors are made by something that is not done here (a dense layer, another pooling).
    """
    if not (folder / MODULES).is_file():
        return SentenceLayout()
    pooling: Literal["mean", "cls"] = "mean"
    for module in _read(folder / MODULES, list):
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, Mapping) else ""
        if kind == "Pooling":
            pooling = _pooling(folder / str(module.get("path", "")) / "config.json", folder)
        elif kind == "Transformer" and module.get("path"):
            raise UserError(f"{folder}: its model lies in {module['path']}: name that folder by pretrained=.")
        elif kind not in ("Transformer", "Normalize"):
            raise UserError(f"{folder}: its vectors pass through a {kind or 'module without a type'}, not done here.")
    sentences = _optional(folder / "sentence_bert_config.json")
    prompts = _optional(folder / "config_sentence_transformers.json")
    default = prompts.get("default_prompt_name")
    length = sentences.get("max_seq_length")
    return SentenceLayout(
        pooling,
        length if isinstance(length, int) and length > 0 else None,
        "" if default is None else str((prompts.get("prompts") or {}).get(default, "")),
        sentences.get("do_lower_case") is True,
    )


def vocabulary_is_cased(vocabulary: Path) -> bool:
    """Whether BERT's vocab.txt has words with capitals, its [special] ones aside."""
    words = [word for word in vocabulary.read_text(encoding="utf-8").split("\n") if word and not word.startswith("[")]
    return sum(word != word.lower() for word in words) > CASED_SHARE * len(words)


def _pooling(path: Path, folder: Path) -> Literal["mean", "cls"]:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / MODULES}: {path} lies outside the folder.")
    settings = _read(path, dict)
    flags = {name.removeprefix("pooling_mode_") for name, on in settings.items() if on is True}
    modes = sorted(flags - settings.keys()) or [str(settings.get("pooling_mode", "mean_tokens"))]
    known: dict[str, Literal["mean", "cls"]] = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise UserError(f"{path}: expected pooling by the mean or the first token, but got {' and '.join(modes)}.")
    return known[modes[0]]


def _optional(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = _read(path, dict) if path.is_file() else {}
    return found


def _read(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, kind):
        raise UserError(f"{path}: expected JSON's {'list' if kind is list else 'object'}, but got {found!r}.")
    return found

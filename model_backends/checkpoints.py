"""Which files a checkpoint is made of, found without reading them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from medvlm_harness.errors import UserError, first_line

__all__ = [
    "LOAD_ERRORS",
    "OPEN_CLIP_CONFIG",
    "Checkpoint",
    "find_folder",
    "gguf_checkpoint",
    "hub_folder",
    "open_clip_folder",
    "tensor_names",
    "tensor_shapes",
    "transformers_folder",
]

# What torch.load(weights_only=True) and safetensors raise on a file that is damaged, foreign or holds code.
LOAD_ERRORS = (
    UnpicklingError,
    SafetensorError,
    RuntimeError,
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
# The names that open_clip looks for, in its order (open_clip 3, factory.py).
_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_SETTING_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # configuration, tokenizer, image processor


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files and options that a model is built from.

    Without weights (a name that is looked up on the Hub) the model is known by its tensors, once it is loaded.
    """

    weights: tuple[Path, ...] = ()
    settings: tuple[Path, ...] = ()  # every other file that may decide an answer
    options: Mapping[str, Any] = field(default_factory=dict)  # what the user says beside them, such as an architecture

    def label(self, weights: Path) -> str:
        """What a file of weights is called in results: its name, with folders where that is not one file's alone."""
        same = [path.absolute() for path in self.weights if path.name == weights.name]
        if len(same) < 2:
            return weights.name
        return str(weights.absolute().relative_to(os.path.commonpath([path.parent for path in same])))


def open_clip_folder(folder: Path) -> Checkpoint:
    """A folder in open_clip's `local-dir:` layout.

    Raises:
        UserError: if it holds no weights, or several among which none has a known name.
    """
    found = _files(folder, _WEIGHT_SUFFIXES)
    named = [path for name in _OPEN_CLIP_WEIGHTS for path in found if path.name == name]
    if not found:
        raise UserError(f"{folder} has {OPEN_CLIP_CONFIG} but no weights (*.safetensors, *.bin or *.pth).")
    if not named and len(found) > 1:
        raise UserError(f"{folder} holds several weights ({', '.join(path.name for path in found)}): keep one.")
    return Checkpoint(((named or found)[0],), _files(folder, _SETTING_SUFFIXES))


def transformers_folder(folder: Path) -> Checkpoint:
    """A folder as transformers saves a model.

    Raises:
        UserError: if it holds no weights.
    """
    weights = _files(folder, (".safetensors",)) or _files(folder, (".bin",))  # as transformers prefers them
    if not weights:
        raise UserError(f"{folder} has config.json but no weights (*.safetensors or *.bin).")
    return Checkpoint(weights, _files(folder, _SETTING_SUFFIXES))


def gguf_checkpoint(folder: Path, name: str) -> Checkpoint:
    """A GGUF file, which holds configuration and tokenizer as well.

    Raises:
        UserError: if it is not there.
    """
    path = folder / name
    if not path.is_file():
        there = ", ".join(sorted(one.name for one in folder.glob("*.gguf"))) or "none"
        raise UserError(f"Expected gguf_file to name a file in {folder} (it holds {there}), but got {name!r}.")
    return Checkpoint((path,))


def find_folder(pretrained: str, what: str, **hub: Any) -> tuple[Path, bool]:
    """The folder that `pretrained` names, and whether it is a snapshot of the Hub.

    Args:
        pretrained: a local folder, or a name on the Hub.
        what: what it may be, for the error.
        **hub: for `hub_folder`.

    Raises:
        UserError: if it is neither.
    """
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return path, False
    if path.exists() or pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1:
        raise UserError(f"Expected pretrained to be {what}, but got {pretrained}.")
    return hub_folder(pretrained, **hub), True


def hub_folder(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Path:
    """A model on the Hub as a local folder: downloaded once, afterwards read from huggingface_hub's cache.

    Only the files of the top folder that transformers reads: no other formats, and no Python.

    Raises:
        UserError: if there is none of that name, or the Hub cannot be reached and the cache has none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    settings = [f"*{suffix}" for suffix in _SETTING_SUFFIXES]
    options: dict[str, Any] = {"revision": revision, "ignore_patterns": ["*/*"]}
    try:
        if gguf_file is not None:
            return Path(snapshot_download(name, allow_patterns=[gguf_file], **options))
        folder = Path(snapshot_download(name, allow_patterns=[*settings, "*.safetensors"], **options))
        if not _files(folder, (".safetensors",)):
            folder = Path(snapshot_download(name, allow_patterns=[*settings, "*.bin"], **options))
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"There is no folder {name} here, and it cannot be fetched from the Hub: {first_line(error)} "
            "Name a local folder by pretrained=DIR."
        ) from error
    return folder


def tensor_names(weights: Sequence[Path]) -> set[str]:
    """The names of all tensors in the files, without reading any.

    Raises:
        UserError: if a file is not what it is called.
    """
    names: set[str] = set()
    for path in weights:
        try:
            if path.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(path, framework="pt") as file:
                    names |= set(file.keys())
            else:
                names |= set(tensor_shapes(path))
        except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise UserError(f"{path} cannot be read as weights: {first_line(error)}") from error
    return names


def tensor_shapes(path: Path) -> dict[str, Any]:
    """The tensors of a .bin file by name, without their numbers (on torch's device `meta`)."""
    import torch

    try:
        state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except RuntimeError:  # torch's format before 1.6, which the first BERTs are in, cannot be mapped
        state = torch.load(path, map_location="meta", weights_only=True)
    named = state if isinstance(state, Mapping) else {}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _files(folder: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file()))

"""The two towers of a contrastive model as open_clip or transformers build them, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image

from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from medvlm_harness.model_backends.dual_encoder import EncodedTexts

__all__ = ["LENGTH_STEP", "Towers", "below", "linear", "parameter_count", "refuse_key_mismatch"]

# Tokens; the padded length of a batch of texts is a multiple of it. For each new shape torch's CPU kernels are compiled
# anew and keep memory: with every length from 7 to 77 a quarter of the time and 900 MB (bf16, ViT-B/32, 64 texts).
LENGTH_STEP = 8

# What the keys of a published checkpoint begin with, by the model that reads it.
_MARKS = {
    "medclip": ("vision_model.model.", "text_model.projection_head."),
    "medfilip": ("image_model.", "text_model.", "text_projection."),
    "biomedclip": ("visual.trunk.", "text.transformer."),
    "chexzero": ("visual.conv1.", "visual.transformer.resblocks.", "token_embedding."),
}


@dataclass(frozen=True, slots=True)
class Towers:
    """A loaded model in float32, and how it is asked; it may be cast and moved afterwards."""

    model: torch.nn.Module
    preprocess: Callable[[Image], torch.Tensor]  # -> (channels, height, width)
    encode_images: Callable[[torch.Tensor], torch.Tensor]  # (n, channels, height, width) -> (n, d)
    encode_texts: Callable[[list[str]], EncodedTexts]
    encode_ids: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # token ids (n, length), mask -> (n, d)
    logit_scale: float
    parameters: int
    preprocessing: str
    text_lengths: Callable[[Sequence[str]], list[int]] | None = None  # in tokens
    encode_image_maps: Callable[[torch.Tensor], torch.Tensor] | None = None  # -> (n, c, h, w); None: vectors only
    revision: str | None = None


def refuse_key_mismatch(
    where: str, target: str, missing: Iterable[str], unexpected: Iterable[str], *, held: Iterable[str] = ()
) -> None:
    """A checkpoint must fit exactly: a tower left at random would answer without a word.

    Args:
        where: the file.
        target: what it was to be.
        missing: names that it lacks.
        unexpected: names that nothing takes.
        held: all names in it, where it is not known yet which are unexpected.

    Raises:
        UserError: naming how many keys do not fit, the first few, and the model that is known to read them.
    """
    absent, extra = list(missing), list(unexpected)
    if absent or extra:
        sample = ", ".join((extra or absent)[:2])
        names = [*extra, *held]
        model = next((m for m, marks in _MARKS.items() if all(_any_begins(mark, names) for mark in marks)), None)
        known = f" It looks like a checkpoint for --model {model}." if model else ""
        raise UserError(
            f"{where} does not fit {target}: {len(absent)} keys missing, {len(extra)} unexpected ({sample}...).{known}"
        )


def below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    """A linear layer without bias, of these weights (out, in)."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight)
    return layer


def parameter_count(module: torch.nn.Module) -> int:
    """Parameters of a module; buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def _any_begins(mark: str, keys: Iterable[str]) -> bool:
    return any(key.startswith(mark) for key in keys)

"""The two towers of a contrastive model as open_clip or transformers build them, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.dual_encoder import EncodedTexts

__all__ = ["LENGTH_STEP", "Towers", "refuse_key_mismatch"]

# Tokens; the padded length of a batch of texts is a multiple of it. For each new shape torch's CPU kernels are compiled
# anew and keep memory: with every length from 7 to 77 a quarter of the time and 900 MB (bf16, ViT-B/32, 64 texts).
LENGTH_STEP = 8


@dataclass(frozen=True, slots=True)
class Towers:
    """A loaded model in float32, and how it is asked; it may be cast and moved afterwards."""

    model: torch.nn.Module
    preprocess: Callable[[Image], torch.Tensor]  # -> (channels, height, width)
    encode_images: Callable[[torch.Tensor], torch.Tensor]  # (n, channels, height, width) -> (n, d)
    encode_texts: Callable[[list[str]], EncodedTexts]
    logit_scale: float
    parameters: int
    preprocessing: str
    text_lengths: Callable[[Sequence[str]], list[int]] | None = None  # in tokens
    revision: str | None = None


def refuse_key_mismatch(where: str, target: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """A checkpoint must fit exactly: a tower left at random would answer without a word.

    Raises:
        UserError: naming how many keys do not fit, and the first few.
    """
    absent, extra = list(missing), list(unexpected)
    if absent or extra:
        sample = ", ".join((extra or absent)[:2])
        raise UserError(
            f"{where} does not fit {target}: {len(absent)} keys missing, {len(extra)} unexpected ({sample}...)."
        )

"""A dual encoder small enough to ship: it makes every path of the package run, and is of no use beyond that.

Trained on phantoms only (see `tiny.json` beside the weights, and benchmarks/demo/train_tiny.py).
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "CONFIG_FILE",
    "IMAGE_SIZE",
    "MAX_TOKENS",
    "WEIGHTS_FILE",
    "TinyDualEncoder",
    "Tokens",
    "load_tiny",
    "preprocess",
]

WEIGHTS_FILE, CONFIG_FILE = "tiny.safetensors", "tiny.json"
IMAGE_SIZE = 96
PIXEL_MEAN, PIXEL_STD = 0.45, 0.25
MAX_TOKENS = 96  # the start token included
WIDTH = 64  # of the embeddings
HASH_BUCKETS = 64  # for words outside the vocabulary
PAD, START = 0, 1  # then the hash buckets, then the vocabulary


class Tokens(NamedTuple):
    """Texts as the text tower takes them."""

    ids: Tensor  # (n, length) int64, 0 where padded, length at most MAX_TOKENS
    truncated: Tensor  # (n,) bool, where words were cut off


class TinyDualEncoder(nn.Module):
    """Pictures and texts into one space of 64 dimensions.

    No layer looks across a batch, so a result does not depend on what else is in it.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        first_word = START + 1 + HASH_BUCKETS
        self._word_ids = {word: first_word + k for k, word in enumerate(vocabulary)}
        self.image_tower = nn.Sequential(
            _stage(1, 16), _stage(16, 32), _stage(32, 48), _stage(48, 64), nn.Conv2d(64, 24, 1), nn.Flatten()
        )
        # Flattened, not pooled: on which side a shadow lies must not be lost.
        self.image_head = nn.Linear(24 * (IMAGE_SIZE // 16) ** 2, WIDTH)
        self.embedding = nn.Embedding(first_word + len(vocabulary), WIDTH, padding_idx=PAD)
        self.mixers = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.attention = nn.Linear(WIDTH, 1)
        self.text_head = nn.Linear(2 * WIDTH, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied with to give logits."""
        return self.log_scale.exp()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Preprocessed pictures (n, 1, 96, 96) -> unit vectors (n, 64)."""
        return functional.normalize(self.image_head(self.image_tower(pixels)), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Lower-case words to ids; words that the vocabulary lacks share a few hashed ids."""
        rows = [[START, *map(self._word_id, re.findall(r"[a-z0-9]+", text.lower()))] for text in texts]
        ids = torch.zeros(len(rows), max((min(len(row), MAX_TOKENS) for row in rows), default=1), dtype=torch.long)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row[:MAX_TOKENS])
        return Tokens(ids, torch.tensor([len(row) > MAX_TOKENS for row in rows], dtype=torch.bool))

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Token ids (n, length) -> unit vectors (n, 64)."""
        valid = (ids != PAD).unsqueeze(-1)  # (n, length, 1)
        hidden = self.embedding(ids)
        for mixer in self.mixers:
            # Masked before each convolution, so that a text means the same however far it is padded.
            mixed = mixer((hidden * valid).transpose(1, 2)).transpose(1, 2)
            hidden = hidden + functional.gelu(mixed)
        weight = self.attention(hidden).masked_fill(~valid, -torch.inf).softmax(dim=1)
        attended = (weight * hidden).sum(dim=1)
        largest = hidden.masked_fill(~valid, -torch.inf).amax(dim=1)
        return functional.normalize(self.text_head(torch.cat([attended, largest], dim=-1)), dim=-1)

    def _word_id(self, word: str) -> int:
        known = self._word_ids.get(word)
        return START + 1 + zlib.crc32(word.encode()) % HASH_BUCKETS if known is None else known


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), nn.GroupNorm(4, channels_out), nn.GELU()
    )


def preprocess(image: Image.Image) -> Tensor:
    """A picture of any size and mode -> (1, 96, 96), grey, about zero mean and unit spread."""
    grey = image.convert("L").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)
    return ((pixels - PIXEL_MEAN) / PIXEL_STD).unsqueeze(0)


def load_tiny() -> TinyDualEncoder:
    """The packaged model, ready to use, in fp32.

    Raises:
        RuntimeError: if the weights and the code do not fit to the key.
    """
    folder = resources.files("medvlm_harness.demo")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    model = TinyDualEncoder(config["vocabulary"])
    weights = load_safetensors((folder / WEIGHTS_FILE).read_bytes())
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    return model.eval().requires_grad_(False)

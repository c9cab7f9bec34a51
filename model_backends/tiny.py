"""`medvlm-tiny`: the demo's dual encoder, trained on phantoms."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import torch
from PIL.Image import Image

from medvlm_harness.demo import tiny
from medvlm_harness.demo.tiny import CONFIG_FILE, WEIGHTS_FILE, load_tiny, preprocess
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts

__all__ = ["TinyBackend"]

PACKAGED = "packaged"


class TinyBackend(DualEncoder):
    """Takes no checkpoint: its weights come with the package."""

    card: ModelCard = backend_card("medvlm-tiny")

    def __init__(self, *, pretrained: str = PACKAGED, **options: Any) -> None:
        super().__init__(pretrained=pretrained, **options)

    def locate(self) -> Checkpoint:
        """The packaged weights, with their vocabulary."""
        if self.pretrained != PACKAGED:
            raise UserError(f"medvlm-tiny comes with its weights: leave out pretrained={self.pretrained}.")
        paths = []
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            with as_file(files("medvlm_harness.demo") / name) as path:
                paths.append(path)
        return Checkpoint((paths[0],), (paths[1],))

    def load(self) -> None:
        """The model, on the CPU."""
        self.tiny = load_tiny()
        self.model = self.tiny
        self.logit_scale = float(self.tiny.logit_scale)
        self.parameters = sum(parameter.numel() for parameter in self.tiny.parameters())

    def preprocessing(self) -> dict[str, Any]:
        """The constants of demo/tiny.py."""
        return {"size": tiny.IMAGE_SIZE, "mean": tiny.PIXEL_MEAN, "std": tiny.PIXEL_STD, "tokens": tiny.MAX_TOKENS}

    def preprocess(self, image: Image) -> torch.Tensor:
        """(1, 96, 96)."""
        return preprocess(image)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 1, 96, 96) -> (n, 64)."""
        return self.tiny.encode_images(pixels)

    def encode_image_maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 1, 96, 96) -> (n, 24, 6, 6), before it is flattened."""
        maps: torch.Tensor = self.tiny.image_tower[:-1](pixels)
        return maps

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """(n, 64), and which texts were cut."""
        ids, truncated = self.tiny.tokenize(texts)
        return EncodedTexts(self.encode_ids(ids.to(self.device), None), truncated.tolist())

    def encode_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(n, length) -> (n, 64); padding is 0."""
        return self.tiny.encode_texts(input_ids)

"""`medvlm-clip`: any contrastive model that open_clip or transformers can build."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard, Source
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import (
    OPEN_CLIP_CONFIG,
    Checkpoint,
    open_clip_folder,
    transformers_folder,
)
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts
from medvlm_harness.model_backends.towers import Towers

__all__ = ["ClipBackend", "TowerBackend"]


class TowerBackend(DualEncoder):
    """A dual encoder whose towers another library builds."""

    def load(self) -> None:
        """Build the towers, and keep what they say of themselves."""
        self.towers = self.build()
        self.model = self.towers.model
        self.logit_scale = self.towers.logit_scale
        self.parameters = self.towers.parameters
        self.transform = self.towers.preprocessing

    def preprocessing(self) -> dict[str, Any]:
        """The transform in words, of a model whose files are not known beforehand."""
        if self.checkpoint.settings:
            return {}
        self.ensure_loaded()
        return {"transform": self.transform}

    @abstractmethod
    def build(self) -> Towers:
        """The towers of `self.pretrained`."""

    def preprocess(self, image: Image) -> torch.Tensor:
        """The model's own evaluation transform."""
        return self.towers.preprocess(image)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tower."""
        return self.towers.encode_images(pixels)

    def encode_image_maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """The last map of the image tower, where the library gives it."""
        maps = self.towers.encode_image_maps
        return super().encode_image_maps(pixels) if maps is None else maps(pixels)

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """Text tower."""
        return self.towers.encode_texts(texts)

    def encode_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Text tower on token ids."""
        return self.towers.encode_ids(input_ids, attention_mask)

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """In tokens, where the tower runs as far as the longest text of a batch."""
        measure = super().text_lengths if not texts or self.towers.text_lengths is None else self.towers.text_lengths
        return measure(texts)


class ClipBackend(TowerBackend):
    """Towers from wherever `pretrained=` says.

    - a folder in open_clip's layout (open_clip_config.json) or in transformers' (config.json), also as `local-dir:DIR`
    - a checkpoint file, with `architecture=` (an open_clip name, such as ViT-B-32-quickgelu)
    - `hf-hub:org/name` for open_clip models on the Hub; `org/name` for transformers models
    - `NAME/TAG` of open_clip, such as ViT-B-32/laion2b_s34b_b79k, or the tag with `architecture=`
    """

    card: ModelCard = backend_card("medvlm-clip")

    def __init__(self, *, architecture: str | None = None, model_revision: str | None = None, **options: Any) -> None:
        self.architecture, self.model_revision = architecture, model_revision
        super().__init__(**options)

    def locate(self) -> Checkpoint:
        """Decide by what `pretrained` is."""
        location = self.pretrained.removeprefix("local-dir:")
        path = Path(location).expanduser()
        name = path.name if path.exists() else location
        source = None if path.exists() else Source(location, self.model_revision)
        self.card = replace(self.card, name=name, source=source)
        if path.is_dir():
            if (path / OPEN_CLIP_CONFIG).is_file():
                return open_clip_folder(path)
            if (path / "config.json").is_file():
                return transformers_folder(path)
            raise UserError(
                f"Expected {path} to hold {OPEN_CLIP_CONFIG} (open_clip) or config.json (transformers), "
                "but it has neither."
            )
        if path.is_file():
            if self.architecture is None:
                raise UserError(
                    f"{path} is a checkpoint file: name its open_clip architecture too, such as "
                    f"--model_args pretrained={path},architecture=ViT-B-32-quickgelu"
                )
            return Checkpoint((path,), options={"architecture": self.architecture})
        named = self.architecture is not None or location.startswith("hf-hub:")
        looks_like_a_path = location.startswith((".", "/", "~")) or location.count("/") > 1
        if not named and (self.pretrained.startswith("local-dir:") or looks_like_a_path):
            raise UserError(f"Expected pretrained to be a folder or a file, but there is nothing at {location}.")
        return Checkpoint()

    def build(self) -> Towers:
        """From the files found, or by name."""
        from open_clip import list_models

        from medvlm_harness.model_backends.open_clip_towers import folder_towers, named_towers
        from medvlm_harness.model_backends.transformers_towers import transformers_towers

        location = self.pretrained.removeprefix("local-dir:")
        if self.checkpoint.settings:
            folder = self.checkpoint.settings[0].parent
            if (folder / OPEN_CLIP_CONFIG).is_file():
                return folder_towers(folder, self.checkpoint.weights[0])
            return transformers_towers(str(folder))
        if self.architecture is not None:
            files = [str(path) for path in self.checkpoint.weights]
            return named_towers(self.architecture, files[0] if files else location)
        if location.startswith("hf-hub:"):
            return named_towers(location, "")
        name, _, tag = location.partition("/")
        if name in list_models():
            return named_towers(name, tag)
        return transformers_towers(location, revision=self.model_revision)

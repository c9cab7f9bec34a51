"""`medvlm-clip`: any contrastive model that open_clip or transformers can build."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard, Source
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts
from medvlm_harness.model_backends.towers import Towers

__all__ = ["ClipBackend", "TowerBackend"]


class TowerBackend(DualEncoder):
    """A dual encoder whose towers another library builds."""

    def load(self) -> None:
        """Build the towers and complete the card from them and from the file beside the weights."""
        self.towers = self.build()
        self.logit_scale = self.towers.logit_scale
        self.weight_files = self.towers.weight_files
        measured = {"parameters": self.towers.parameters, "preprocessing": self.towers.preprocessing}
        self.card = replace(self.card, **measured)  # type: ignore[arg-type]  # the two fields' own types
        if self.weight_files:
            self.complete_card(self.weight_files[0])

    @abstractmethod
    def build(self) -> Towers:
        """The towers of `self.pretrained`."""

    def preprocess(self, image: Image) -> torch.Tensor:
        """The model's own evaluation transform."""
        return self.towers.preprocess(image)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tower."""
        return self.towers.encode_images(pixels)

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """Text tower."""
        return self.towers.encode_texts(texts)


class ClipBackend(TowerBackend):
    """Towers from wherever `pretrained=` says.

    - a folder in open_clip's layout (open_clip_config.json) or in transformers' (config.json), also as `local-dir:DIR`
    - a checkpoint file, with `architecture=` (an open_clip name, such as ViT-B-32-quickgelu)
    - `hf-hub:org/name` for open_clip models on the Hub; `org/name` for transformers models
    - `NAME/TAG` of open_clip, such as ViT-B-32/laion2b_s34b_b79k, or the tag with `architecture=`
    """

    card: ModelCard = ModelCard(
        name="medvlm-clip",
        family="dual encoder",
        summary="any open_clip model, and any CLIP- or SigLIP-like model of transformers",
    )

    def __init__(self, *, architecture: str | None = None, model_revision: str | None = None, **options: Any) -> None:
        self.architecture, self.model_revision = architecture, model_revision
        super().__init__(**options)

    def build(self) -> Towers:
        """Decide by what `pretrained` is."""
        from open_clip import list_models

        from medvlm_harness.model_backends.open_clip_towers import CONFIG_FILE, folder_towers, named_towers
        from medvlm_harness.model_backends.transformers_towers import transformers_towers

        location = self.pretrained.removeprefix("local-dir:")
        path = Path(location).expanduser()
        name = path.name if path.exists() else location
        source = None if path.exists() else Source(location, self.model_revision)
        self.card = replace(self.card, name=name, source=source)
        if path.is_dir():
            if (path / CONFIG_FILE).is_file():
                return folder_towers(path, self.device)
            if (path / "config.json").is_file():
                return transformers_towers(str(path), self.device)
            raise UserError(
                f"Expected {path} to hold {CONFIG_FILE} (open_clip) or config.json (transformers), but it has neither."
            )
        name_and_tag = location.split("/")
        if self.architecture is None and len(name_and_tag) == 2 and name_and_tag[0] in list_models():
            return named_towers(name_and_tag[0], name_and_tag[1], self.device)
        if self.architecture is not None:
            return named_towers(self.architecture, location, self.device)
        if location.startswith("hf-hub:"):
            return named_towers(location, "", self.device)
        if path.is_file():
            raise UserError(
                f"{path} is a checkpoint file: name its open_clip architecture too, such as "
                f"--model_args pretrained={path},architecture=ViT-B-32-quickgelu"
            )
        if self.pretrained.startswith("local-dir:") or location.startswith((".", "/", "~")) or location.count("/") > 1:
            raise UserError(f"Expected pretrained to be a folder or a file, but there is nothing at {location}.")
        return transformers_towers(location, self.device, revision=self.model_revision)

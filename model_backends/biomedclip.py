"""`biomedclip`: BiomedCLIP from a local copy of its Hub folder, without asking the Hub for its text tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard, Source
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import OPEN_CLIP_CONFIG, Checkpoint, open_clip_folder
from medvlm_harness.model_backends.clip import TowerBackend
from medvlm_harness.model_backends.towers import Towers

__all__ = ["BiomedClipBackend"]

HUB_ID = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"


class BiomedClipBackend(TowerBackend):
    """BiomedCLIP.

    `pretrained=` is a folder with open_clip_config.json, open_clip_pytorch_model.bin and the tokenizer's files, or
    `hf-hub:` and the published name.
    """

    card: ModelCard = backend_card("biomedclip")

    def locate(self) -> Checkpoint:
        """The folder's files; through the Hub there are none yet."""
        location = self.pretrained.removeprefix("local-dir:")
        folder = Path(location).expanduser()
        if folder.is_dir():
            if not (folder / OPEN_CLIP_CONFIG).is_file():
                raise UserError(f"Expected {folder} to hold {OPEN_CLIP_CONFIG}, as {HUB_ID} does, but it does not.")
            return open_clip_folder(folder)
        if not location.startswith("hf-hub:"):
            raise UserError(
                f"Expected pretrained to be a folder or hf-hub:{HUB_ID}, but there is nothing at {location}."
            )
        self.card = replace(self.card, source=Source(location.removeprefix("hf-hub:")))
        return Checkpoint()

    def build(self) -> Towers:
        """From a folder, or through the Hub."""
        from medvlm_harness.model_backends.open_clip_towers import folder_towers, named_towers

        if not self.checkpoint.weights:
            return named_towers(self.pretrained.removeprefix("local-dir:"), "")
        (weights,) = self.checkpoint.weights
        return folder_towers(weights.parent, weights)

"""`llava-med`: LLaVA-Med 1.5 as published, straight through transformers' Llava (Li et al. 2023, NeurIPS).

Facts from microsoft/LLaVA-Med, tag v1.0.0: llava/mm_utils.py (padding), llava/conversation.py (`mistral_instruct`),
llava/model/builder.py (which vision tower is loaded).

Version 1 is not loaded. It is published as the difference of its weights from LLaMA-7B's: it would need those, the sum
of both (of embeddings on the rows that both have), openai/clip-vit-large-patch14 at 224 pixels, which its files leave
out, one linear layer as projector, and its own prompt, with the image after the question between <im_start> and
<im_end>.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image as PilImage
from PIL.Image import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration, MistralConfig
from transformers.image_utils import OPENAI_CLIP_MEAN
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import Checkpoint, transformers_folder
from medvlm_harness.model_backends.interleaved import IMAGE_TOKEN, InterleavedBackend

__all__ = ["LlavaMedBackend", "expand_to_square", "preprocess"]

HUB_ID = "microsoft/llava-med-v1.5-mistral-7b"
MODEL_TYPE = "llava_mistral"
STOCK_TOWER = "openai/clip-vit-large-patch14-336"
# That tower's published configuration; all else is CLIPVisionConfig's default (quick_gelu).
STOCK_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TOWER = "model.vision_tower."
# From the names of the checkpoint to those of transformers' Llava.
KEYS = {
    r"^model\.vision_tower\.vision_tower": "model.vision_tower",
    r"^model\.mm_projector\.0": "model.multi_modal_projector.linear_1",
    r"^model\.mm_projector\.2": "model.multi_modal_projector.linear_2",
    r"^model\.(layers|embed_tokens|norm)": r"model.language_model.\1",
}
# Settings that change what is computed, and the only values that are built here.
BUILT = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
}
CONVERSATION = "[INST] {q} [/INST]"

Tower = Literal["checkpoint", "stock"]


def expand_to_square(image: Image) -> Image:
    """Centred on a square of CLIP's mean colour; a grey image stays grey and gets the mean of its three channels.

    The publication's code draws the offset of an odd border at random (floor or ceiling); here it is the floor.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    colour = tuple(int(255 * mean) for mean in OPENAI_CLIP_MEAN)
    grey = int(255 * sum(OPENAI_CLIP_MEAN) / len(OPENAI_CLIP_MEAN))
    square = PilImage.new(image.mode, (side, side), grey if image.mode == "L" else colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def preprocess(image: Image, side: int = 336, *, square: bool = True) -> torch.Tensor:
    """Pixels as LLaVA-Med prepares them, (3, side, side): padded if `square` (image_aspect_ratio=pad), bicubic."""
    # The processor that stands on torchvision differs from the publication's by 0.03.
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    shown = expand_to_square(image) if square else image
    pixels: torch.Tensor = processor(shown, return_tensors="pt")["pixel_values"][0]
    return pixels


class LlavaMedBackend(InterleavedBackend):
    """LLaVA-Med 1.5: CLIP ViT-L/14 at 336 pixels, a two-layer projector, Mistral-7B-Instruct.

    The checkpoint holds a vision tower of its own, which the publication's loader passes over for the stock CLIP tower:
    `tower=checkpoint` (default) takes the checkpoint's, `tower=stock` that of the folder `stock_tower=`. Results and
    stored answers of the two are kept apart.
    """

    card: ModelCard = backend_card("llava-med")
    IMAGE_BEFORE: ClassVar[str] = "<image>\n"

    def __init__(self, *, tower: Tower = "checkpoint", stock_tower: str | None = None, **options: Any) -> None:
        if tower not in ("checkpoint", "stock"):
            raise UserError(f"Expected tower to be checkpoint or stock, but got {tower!r}.")
        if tower == "stock" and stock_tower is None:
            raise UserError(f"tower=stock needs stock_tower=DIR, a folder with {STOCK_TOWER}.")
        if options.get("gguf_file") is not None:
            raise UserError("llava-med loads the published safetensors, not GGUF files.")
        self.tower = tower
        self.stock_folder = None if stock_tower is None else Path(stock_tower).expanduser()
        if self.stock_folder is not None and not (self.stock_folder / "config.json").is_file():
            raise UserError(f"Expected stock_tower to be a folder with config.json and weights, but got {stock_tower}.")
        super().__init__(**options)

    # --- files

    def locate(self) -> Checkpoint:
        """The published folder, and the stock tower's weights where they are asked for."""
        name = self.card.name
        found = super().locate()
        self.card = replace(self.card, name=name)  # whatever the folder is called
        weights = found.weights
        if self.tower == "stock" and self.stock_folder is not None:
            weights = (*weights, *transformers_folder(self.stock_folder).weights)
        return Checkpoint(
            weights, found.settings, {"tower": self.tower, "vision": self.config.vision_config.to_diff_dict()}
        )

    @cached_property
    def config(self) -> LlavaConfig:
        """What transformers needs to know, from the folder's config.json.

        Raises:
            UserError: if it is no LLaVA-Med 1.5, or one that was changed in a way that is not built here.
        """
        raw = self._raw_config
        where = self.folder / "config.json"
        if raw.get("model_type") != MODEL_TYPE:
            raise UserError(
                f"{where}: expected model_type {MODEL_TYPE} (LLaVA-Med 1.5), but got {raw.get('model_type')!r}. "
                "Version 1 is not loaded; other Llava models: --model medvlm-vlm."
            )
        for name, built in BUILT.items():
            if raw.get(name) not in built:
                raise UserError(f"{where}: {name}={raw.get(name)!r} is not built here, only {built[0]!r}.")
        own = {
            key: value for key, value in raw.items() if key not in ("model_type", "architectures", *_llava_keys(raw))
        }
        with self._one_line("configuration"):
            return LlavaConfig(
                text_config=MistralConfig.from_dict(own),
                vision_config=self._vision_config(raw),
                image_token_index=IMAGE_TOKEN,
                vision_feature_layer=raw.get("mm_vision_select_layer", -2),
                vision_feature_select_strategy="full"
                if raw.get("mm_vision_select_feature") == "cls_patch"
                else "default",
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            )

    @cached_property
    def _raw_config(self) -> dict[str, Any]:
        where = self.folder / "config.json"
        try:
            raw = json.loads(where.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise UserError(f"{where}: expected an object, but got {raw!r}.")
        return raw

    def _vision_config(self, raw: Mapping[str, Any]) -> CLIPVisionConfig:
        """The stock tower's: config.json names the tower and no sizes, and the number of heads is in no weight."""
        if self.stock_folder is not None:
            return CLIPVisionConfig.from_pretrained(self.stock_folder, local_files_only=True)
        named = str(raw.get("mm_vision_tower", ""))
        if named.rstrip("/").rpartition("/")[2] != STOCK_TOWER.rpartition("/")[2]:
            raise UserError(
                f"{self.folder / 'config.json'} names the vision tower {named!r}, whose sizes are not known here: "
                "say where its config.json lies by stock_tower=DIR."
            )
        return CLIPVisionConfig(**STOCK_SIZES)

    # --- loading

    def model_class(self) -> Any:
        """Transformers' Llava."""
        return LlavaForConditionalGeneration

    def loading_options(self) -> dict[str, Any]:
        """The configuration, and what the checkpoint calls what."""
        return {"config": self.config, "key_mapping": KEYS}

    def read(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The checkpoint; with tower=stock its tower is replaced before anything is rounded."""
        model, info = super().read(**options)
        if self.tower == "stock":
            tower, of_tower = CLIPVisionModel.from_pretrained(self.stock_folder, **options)
            model.model.vision_tower = tower
            kept = {key for key in info["missing_keys"] if not key.startswith(TOWER)}
            # A whole CLIP has a text tower too, which is not read.
            extra = {
                key for key in of_tower["unexpected_keys"] if not key.startswith(("text_", "visual_proj", "logit"))
            }
            info = {"missing_keys": kept | of_tower["missing_keys"], "unexpected_keys": info["unexpected_keys"] | extra}
        return model, info

    # --- images and prompts

    @property
    def image_positions(self) -> int:
        """576 of the published tower: one per patch."""
        vision = self.config.vision_config
        patches: int = (vision.image_size // vision.patch_size) ** 2
        return patches + int(self.config.vision_feature_select_strategy == "full")

    def pixels(self, image: Image) -> torch.Tensor:
        """As published; an image is padded where config.json says so."""
        square = self._raw_config.get("image_aspect_ratio") == "pad"
        return preprocess(image, self.config.vision_config.image_size, square=square)

    def conversation(self, turn: str) -> str:
        """Mistral's instruction template."""
        return CONVERSATION.format(q=turn)

    @torch.inference_mode()
    def projected(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the language model gets of images, (n, features, width)."""
        found = self._network.get_image_features(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return torch.stack(list(found)).float().cpu()

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds which vision tower answered."""
        return {**super().describe(), "tower": self.tower}


def _llava_keys(raw: Mapping[str, Any]) -> list[str]:
    """Settings of LLaVA's own, which no Mistral has."""
    return [key for key in raw if key.startswith(("mm_", "use_mm_", "tune_mm_", "freeze_mm_", "image_", "tokenizer_"))]

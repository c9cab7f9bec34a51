"""`medvlm-image-encoder`: models of transformers that see images alone, such as RadDINO, DINOv2, ViT, Swin, ResNet."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import PIL.Image
import torch

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.model_backends.cards import ModelCard, Source
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import OPEN_CLIP_CONFIG, Checkpoint, find_folder, transformers_folder
from medvlm_harness.model_backends.image_vectors import ImageVectors
from medvlm_harness.model_backends.towers import parameter_count, refuse_key_mismatch
from medvlm_harness.model_backends.transformers_towers import without_load_report

__all__ = ["ImageEncoderBackend"]

_log = logging.getLogger("lm_eval.medvlm")

Pooling = Literal["pooler", "class", "mean"]
CLASS_TOKENS = ("cls_token", "class_embedding")
# What transformers' vision transformers call the tokens that stand before the patches.
LEADING_TOKENS = (*CLASS_TOKENS, "distillation_token", "register_tokens")


class ImageEncoderBackend(ImageVectors):
    """Vectors of images by whatever AutoModel and AutoImageProcessor build from a folder or a Hub name.

    `pooling=` says what an image's vector is; the result records it.

    - `pooler` (the default): the model's own pooler. DINOv2, DINOv3, also with registers: the class token after the
      last layer norm. ViT, DeiT: a dense layer and tanh on the class token. BEiT: the layer norm of the mean patch, or
      the class token, as its configuration says. CLIP's image tower by itself: the class token after a layer norm, not
      projected; SigLIP's: its attention over the patches. Swin and ResNet: the mean over the places of the last map;
      ConvNeXt: the layer norm of that mean.
    - `class`: the class token of the last layer.
    - `mean`: the mean over the patches of the last layer, or over the places of the last map.

    Where the checkpoint holds no weights of a pooler (a ViT that was trained without, or as a classifier), or the model
    has none, the default is the class token, and without one the mean. A classification head is left aside, logged;
    every other key must fit.
    """

    FACTS: ClassVar[tuple[str, ...]] = (*ImageVectors.FACTS, "pooling", "unused")
    card: ModelCard = backend_card("medvlm-image-encoder")
    pooling: Pooling  # what vectors are
    unused: list[str]  # keys of the checkpoint that no vector depends on

    def __init__(self, *, pooling: Pooling | None = None, model_revision: str | None = None, **options: Any) -> None:
        if pooling is not None and pooling not in get_args(Pooling):
            raise UserError(f"Expected pooling to be {', '.join(get_args(Pooling))}, but got {pooling!r}.")
        self.pooling_asked, self.model_revision = pooling, model_revision
        super().__init__(**options)

    # --- the checkpoint

    def locate(self) -> Checkpoint:
        """A folder as transformers saves it, or a snapshot of the Hub.

        Raises:
            UserError: if it is none, or another backend reads it.
        """
        self.folder, published = find_folder(
            self.pretrained, "a folder as transformers saves it, or a name on the Hub", revision=self.model_revision
        )
        source = Source(self.pretrained, self.model_revision) if published else self.card.source
        name = self.pretrained.rpartition("/")[2] if published else self.folder.name
        self.card = replace(self.card, name=name, source=source)
        if (self.folder / OPEN_CLIP_CONFIG).is_file():
            raise UserError(f"{self.pretrained} is a dual encoder of open_clip: use --model medvlm-clip.")
        path = self.folder / "config.json"
        if not path.is_file():
            raise UserError(f"Expected {self.folder} to hold config.json (transformers), but it has none.")
        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: expected a JSON mapping: {error}") from error
        other = _other_backend(str(kind))
        if other is not None:
            raise UserError(f"{self.pretrained} is no encoder of images alone ({kind}): use --model {other}.")
        return transformers_folder(self.folder)

    def preprocessing(self) -> dict[str, Any]:
        """What was asked for: what it comes to is decided by the files."""
        return {"pooling": self.pooling_asked}

    def load(self) -> None:
        """Build model and image processor, and settle on the pooling.

        Raises:
            UserError: if a key is missing or unexpected, or the pooling that was asked for is not to be had.
        """
        from transformers import AutoImageProcessor, AutoModel

        source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with without_load_report():
                model, info = AutoModel.from_pretrained(
                    self.folder, dtype=torch.float32, output_loading_info=True, **source
                )
            self.processor = AutoImageProcessor.from_pretrained(self.folder, use_fast=False, **source)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise UserError(f"Cannot load {self.pretrained} with transformers: {first_line(error)}") from error
        name = type(model).__name__
        if model.main_input_name != "pixel_values" or model.config.is_encoder_decoder:
            raise UserError(f"{self.pretrained} holds a {name}, which is no encoder of images.")
        if getattr(model.config, "mask_ratio", 0):
            raise UserError(
                f"{self.pretrained} holds a {name}, which hides patches at random: an encoder of the same weights is "
                'ViT ("model_type": "vit" in a copy of its config.json).'
            )
        self.model = model.eval()
        self.leading = _leading_tokens(model)
        self._image_shape = tuple(self._pixels_of(_blank()).shape)
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        pooler = {key for key in missing if "pooler" in key.split(".")}
        self.unused = sorted(unexpected & _head_keys(model.config)) if unexpected else []
        refuse_key_mismatch(
            self.pretrained, f"transformers' {name}", sorted(missing - pooler), sorted(unexpected - set(self.unused))
        )
        self.pooling = self._settle(lacking=sorted(pooler))
        if self.unused:
            _log.info("%s: %d tensors of a classification head are not used", self.card.name, len(self.unused))
        self.parameters = parameter_count(model)
        self.transform = " ".join(str(self.processor).split())

    def _settle(self, *, lacking: list[str]) -> Pooling:
        """The pooling that was asked for, or the default.

        Raises:
            UserError: if it is not to be had.
        """
        why = ""
        if lacking:
            why = f"the checkpoint has no trained pooler ({lacking[0]} is missing)"
        elif self.pooling_asked in (None, "pooler"):
            with torch.inference_mode():
                output = self._output(self._pixels_of(_blank())[None])
            if getattr(output, "pooler_output", None) is None:
                why = f"transformers' {type(self.model).__name__} has no pooler"
        if self.pooling_asked == "pooler" and why:
            raise UserError(f"pooling=pooler cannot be used with {self.pretrained}: {why}; use pooling=class or mean.")
        if self.pooling_asked == "class" and not self._has_class_token:
            raise UserError(f"pooling=class cannot be used with {self.pretrained}: it has no class token.")
        if self.pooling_asked is not None:
            return self.pooling_asked
        if not why:
            return "pooler"
        found: Pooling = "class" if self._has_class_token else "mean"
        _log.warning("%s: %s; the vectors are pooling=%s", self.card.name, why, found)
        return found

    # --- vectors

    def preprocess(self, image: PIL.Image.Image) -> torch.Tensor:
        """Pixels by the model's own image processor.

        Raises:
            UserError: if their size depends on the image's, so that images cannot be encoded together.
        """
        pixels = self._pixels_of(image)
        if tuple(pixels.shape) != self._image_shape:
            raise UserError(
                f"The image processor of {self.pretrained} makes images of different sizes ({self._image_shape}, "
                f"{tuple(pixels.shape)}): its preprocessor_config.json must crop or resize to one."
            )
        return pixels

    def _pixels_of(self, image: PIL.Image.Image) -> torch.Tensor:
        pixels: torch.Tensor = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels

    def _output(self, pixels: torch.Tensor) -> Any:
        """What transformers' model gives for pixels, (n, channels, height, width)."""
        network: Any = self.model
        return network(pixel_values=pixels)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) -> (n, d), as `pooling` says."""
        output = self._output(pixels)
        if self.pooling == "pooler":
            pooled: torch.Tensor = output.pooler_output
            return pooled.flatten(1)  # of a CNN it is a map of one place
        hidden: torch.Tensor = output.last_hidden_state
        if self.pooling == "class":
            return hidden[:, 0]
        return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden[:, sum(self.leading.values()) :].mean(dim=1)

    @property
    def _has_class_token(self) -> bool:
        return any(name in self.leading for name in CLASS_TOKENS)

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds what vectors are, and what of the checkpoint is not used."""
        described = super().describe()
        return {**described, "pooling": self.pooling, "unused_keys": self.unused}


def _blank() -> PIL.Image.Image:
    return PIL.Image.new("RGB", (64, 48))


def _leading_tokens(model: torch.nn.Module) -> dict[str, int]:
    """Name -> number of the tokens that stand before the patches; the class token is the first."""
    found = {name.rpartition(".")[2]: value.shape for name, value in model.named_parameters()}
    return {name: shape[1] if len(shape) == 3 else 1 for name, shape in found.items() if name in LEADING_TOKENS}


def _head_keys(config: Any) -> set[str]:
    """The names of what transformers' classifier of this kind has beside the encoder; none where it has no such one."""
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return set()
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    return {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}


def _other_backend(kind: str) -> str | None:
    """The backend that reads models of this kind, which see more than images or none at all."""
    from transformers.models.auto import modeling_auto as auto

    readers: Iterable[tuple[Any, str]] = (
        (auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES, "medvlm-clip"),
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "medvlm-vlm"),
        (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "medvlm-text-encoder"),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "medvlm-lm"),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "medvlm-lm"),
    )
    return next((model for names, model in readers if kind in names), None)

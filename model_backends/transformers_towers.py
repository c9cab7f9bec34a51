"""Towers built by transformers: CLIP, SigLIP and other models with get_image_features and get_text_features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.dual_encoder import EncodedTexts
from medvlm_harness.model_backends.towers import LENGTH_STEP, Towers, refuse_key_mismatch

__all__ = ["transformers_towers"]


def transformers_towers(location: str, *, revision: str | None = None) -> Towers:
    """A folder (or Hub name) as transformers saves it: config.json, weights, tokenizer and image processor.

    Raises:
        UserError: if it does not load, is not a dual encoder, or leaves a weight unset or unused.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    local = Path(location).is_dir()
    source: dict[str, Any] = {"local_files_only": local, **({} if local else {"revision": revision})}
    try:
        model, info = AutoModel.from_pretrained(
            location, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **source)
        processor = AutoImageProcessor.from_pretrained(location, trust_remote_code=False, use_fast=False, **source)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"Cannot load {location} with transformers: {line}") from error
    refuse_key_mismatch(
        location, f"transformers' {type(model).__name__}", info["missing_keys"], info["unexpected_keys"]
    )
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise UserError(f"{location} holds a {type(model).__name__}, which is no dual encoder of images and texts.")
    model = model.eval()
    length = int(model.config.text_config.max_position_embeddings)
    # SigLIP was trained with texts padded to full length; the others mask padding.
    masks = "siglip" not in model.config.model_type

    def preprocess(image: Image) -> torch.Tensor:
        pixels: torch.Tensor = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels

    def encode_images(pixels: torch.Tensor) -> torch.Tensor:
        return _pooled(model.get_image_features(pixel_values=pixels))

    def encode_texts(texts: list[str]) -> EncodedTexts:
        lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        padded = min(length, math.ceil(max(lengths) / LENGTH_STEP) * LENGTH_STEP) if masks else length
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=padded, return_tensors="pt").to(
            model.device
        )
        names = ("input_ids", "attention_mask") if masks else ("input_ids",)
        vectors = _pooled(model.get_text_features(**{name: batch[name] for name in names}))
        return EncodedTexts(vectors, [n > length for n in lengths])

    return Towers(
        model=model,
        preprocess=preprocess,
        encode_images=encode_images,
        encode_texts=encode_texts,
        logit_scale=float(model.logit_scale.detach().exp()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        preprocessing=" ".join(str(processor).split()),
        revision=getattr(model.config, "_commit_hash", None),
    )


def _pooled(output: Any) -> torch.Tensor:
    """Transformers 5 wraps the features in an output object; earlier releases return the tensor."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features

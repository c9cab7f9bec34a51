"""Towers built by transformers: CLIP, SigLIP and other models with get_image_features and get_text_features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.model_backends.dual_encoder import EncodedTexts
from medvlm_harness.model_backends.towers import LENGTH_STEP, Towers, refuse_key_mismatch

__all__ = ["bert_config", "build_exactly", "numbered", "transformers_towers", "without_load_report"]


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
        raise UserError(f"Cannot load {location} with transformers: {first_line(error)}") from error
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

    def encode_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        mask = {"attention_mask": attention_mask} if masks and attention_mask is not None else {}
        return _pooled(model.get_text_features(input_ids=input_ids, **mask))

    def encode_image_maps(pixels: torch.Tensor) -> torch.Tensor:
        return _as_maps(model.vision_model(pixel_values=pixels).last_hidden_state)

    def encode_texts(texts: list[str]) -> EncodedTexts:
        lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        padded = min(length, math.ceil(max(lengths) / LENGTH_STEP) * LENGTH_STEP) if masks else length
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=padded, return_tensors="pt").to(
            model.device
        )
        vectors = encode_ids(batch["input_ids"], batch["attention_mask"])
        return EncodedTexts(vectors, [n > length for n in lengths])

    return Towers(
        model=model,
        preprocess=preprocess,
        encode_images=encode_images,
        encode_texts=encode_texts,
        encode_ids=encode_ids,
        logit_scale=float(model.logit_scale.detach().exp()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        preprocessing=" ".join(str(processor).split()),
        encode_image_maps=encode_image_maps if hasattr(model, "vision_model") else None,
        revision=getattr(model.config, "_commit_hash", None),
    )


def build_exactly(model_class: Any, config: Any, state: Mapping[str, torch.Tensor], where: str) -> Any:
    """A model of transformers in float32 with the weights of a state dict in any layout that transformers converts.

    Args:
        model_class: a class with `from_pretrained`.
        config: its configuration, complete: nothing is looked up.
        state: weights by the names of the model's own checkpoints, without what stands before them in a larger one.
        where: the file, for errors.

    Raises:
        UserError: if a key is missing or unexpected, or a shape differs.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with without_load_report():  # what it says, the errors below say
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    for name, given, expected in sorted(info["mismatched_keys"])[:1]:
        raise UserError(
            f"{where} does not fit transformers' {model_class.__name__}: {name} is {tuple(given)}, "
            f"expected {tuple(expected)}."
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        names = set(revert_weight_conversion(model, model.state_dict()))  # by the names of the checkpoint
        refuse_key_mismatch(
            where,
            f"transformers' {model_class.__name__}",
            sorted(names - state.keys()) or sorted(info["missing_keys"]),
            sorted(state.keys() - names) or sorted(info["unexpected_keys"]),
        )
    return model.eval()


@contextmanager
def without_load_report() -> Iterator[None]:
    """Transformers neither reports which keys did not fit, which whoever loads has to judge, nor shows its bar."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def bert_config(state: Mapping[str, torch.Tensor], prefix: str = "") -> Any:
    """BERT's configuration, read from the shapes of its weights, whose names begin with `prefix`.

    Raises:
        KeyError: if they are no BERT's.
    """
    from transformers import BertConfig

    vocabulary, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=len(numbered(state, f"{prefix}encoder.layer.")),
        num_attention_heads=max(1, width // 64),  # BERT's heads are 64 wide at every published size
        intermediate_size=state[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=state[f"{prefix}embeddings.position_embeddings.weight"].shape[0],
    )


def numbered(state: Mapping[str, torch.Tensor], prefix: str) -> set[str]:
    """The numbers that follow a prefix in the names of weights: one for each layer."""
    return {name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)}


def _pooled(output: Any) -> torch.Tensor:
    """Transformers 5 wraps the features in an output object; earlier releases return the tensor."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features


def _as_maps(hidden: torch.Tensor) -> torch.Tensor:
    """The last layer of a CNN as it is; of a ViT the patches of its square of patches, without a class token."""
    if hidden.ndim == 4:
        return hidden
    side = math.isqrt(hidden.shape[1])
    patches = hidden[:, hidden.shape[1] - side * side :]  # SigLIP has no class token, CLIP has one before the patches
    return patches.transpose(1, 2).reshape(len(hidden), hidden.shape[2], side, side)

"""Towers built by open_clip: from a built-in name and tag, the Hub, a folder, or a checkpoint file."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file

from medvlm_harness.errors import UserError, first_line, near_matches
from medvlm_harness.model_backends.checkpoints import LOAD_ERRORS, OPEN_CLIP_CONFIG
from medvlm_harness.model_backends.dual_encoder import EncodedTexts
from medvlm_harness.model_backends.towers import LENGTH_STEP, Towers, refuse_key_mismatch
from medvlm_harness.model_backends.transformers_towers import bert_config

__all__ = ["folder_towers", "load_exactly", "named_towers", "read_checkpoint", "truncated", "wrap"]

# Entries that hold the state dict where a file keeps an optimizer and other things beside it.
_INSIDE = ("state_dict", "network")


def named_towers(architecture: str, pretrained: str) -> Towers:
    """A built-in architecture with a published tag or a checkpoint file, or an `hf-hub:` name.

    Raises:
        UserError: if the name or tag is unknown, the file does not fit, or the Hub cannot be reached.
    """
    on_hub = architecture.startswith("hf-hub:")
    file = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    if not on_hub:
        known = open_clip.list_models()
        if architecture not in known:
            raise UserError(f"open_clip has no architecture {architecture!r}.{near_matches(architecture, known)}")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if file is None and pretrained not in tags:
            raise UserError(
                f"{pretrained!r} is neither a file nor a published tag of {architecture}."
                f"{near_matches(pretrained, tags)}"
            )
    if file is not None:
        model = _without_weights(architecture)
        _load(model, read_checkpoint(file), file, f"architecture {architecture}")
    else:
        # Weights trained with QuickGELU load into a model with GELU as well, and every embedding is then wrong.
        tag = {} if on_hub else open_clip.get_pretrained_cfg(architecture, pretrained)
        quick_gelu = {"force_quick_gelu": True} if tag.get("quick_gelu") else {}
        try:
            model = open_clip.create_model(
                architecture, pretrained=pretrained or None, require_pretrained=True, **quick_gelu
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"Cannot load {architecture} {pretrained}: {first_line(error)} "
                "Without a network, give a local folder or file: pretrained=PATH."
            ) from error
    tokenizer = open_clip.get_tokenizer(architecture)
    return wrap(model, tokenizer)


def folder_towers(folder: Path, weights: Path) -> Towers:
    """A folder in open_clip's `local-dir:` layout: open_clip_config.json, weights, and tokenizer files if it has any.

    No part of it is looked for on the Hub: the configuration of a BERT text tower is read from the folder's
    config.json or, without one, from the shapes of the weights.

    Raises:
        UserError: if a file is missing or does not fit.
    """
    try:
        config = json.loads((folder / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
        model_config = config["model_cfg"]
        text_config = model_config["text_cfg"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / OPEN_CLIP_CONFIG}: expected JSON with model_cfg.text_cfg ({error!r}).") from error
    state = read_checkpoint(weights)
    options: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if "hf_model_name" in text_config:
            home = folder if (folder / "config.json").is_file() else _write_bert_config(state, folder, Path(scratch))
            options["text_cfg"] = {**text_config, "hf_model_name": str(home), "hf_model_pretrained": False}
        model = _without_weights(f"local-dir:{folder}", **options)
    _load(model, state, weights, f"{OPEN_CLIP_CONFIG} of its folder")
    try:
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no tokenizer that loads: {first_line(error)}") from error
    return wrap(model, tokenizer)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors, or from a pickle that holds nothing but tensors and plain containers.

    Raises:
        UserError: if it is no such file; it is never unpickled with code.
    """
    try:
        # Not open_clip's own loader: on a TypeError it loads again without weights_only.
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except LOAD_ERRORS as error:
        raise UserError(
            f"{path} is no checkpoint that loads safely (safetensors, or a state dict with weights_only): "
            f"{first_line(error)}"
        ) from error
    inside = next((name for name in _INSIDE if isinstance(loaded, Mapping) and name in loaded), None)
    state = loaded if inside is None else loaded[inside]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path}: expected a state dict (names to tensors), but got other values.")
    if state and all(name.startswith("module.") for name in state):  # saved under DataParallel
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def _without_weights(name: str, **options: Any) -> torch.nn.Module:
    """The model as configured; `_load` fills it, so open_clip's warning that it is random would mislead."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model: torch.nn.Module = open_clip.create_model(name, load_weights=False, pretrained_text=False, **options)
    finally:
        logging.disable(disabled)
    return model


def _load(model: torch.nn.Module, state: dict[str, torch.Tensor], path: Path, target: str) -> None:
    # Buffers that older transformers saved and newer ones compute.
    state.pop("text.transformer.embeddings.position_ids", None)
    load_exactly(model, state, str(path), target)


def load_exactly(model: torch.nn.Module, state: dict[str, torch.Tensor], where: str, target: str) -> None:
    """Load a state dict that fits in every name and shape.

    Raises:
        UserError: if a key is missing or unexpected, or a shape differs.
    """
    expected = model.state_dict()
    refuse_key_mismatch(where, target, expected.keys() - state.keys(), state.keys() - expected.keys())
    fitting = dict(state)
    for name, tensor in state.items():
        if tensor.numel() == 1 and expected[name].numel() == 1:
            fitting[name] = tensor.reshape(expected[name].shape)  # logit scales come as scalars and as (1,)
        elif tensor.shape != expected[name].shape:
            raise UserError(
                f"{where} does not fit {target}: {name} is {tuple(tensor.shape)}, "
                f"expected {tuple(expected[name].shape)}."
            )
    model.load_state_dict(fitting, strict=True)


def wrap(model: Any, tokenizer: Any, preprocess: Any = None) -> Towers:
    """Towers around an open_clip model; `preprocess` replaces the model's own evaluation transform."""
    model = model.float().eval()
    config = open_clip.transform.PreprocessCfg(**open_clip.model.get_model_preprocess_cfg(model))
    transform = preprocess or open_clip.transform.image_transform_v2(config, is_train=False)
    # Where no token sees those behind it and the end token gives the vector, padding need not be computed.
    trims = (
        type(model) is open_clip.CLIP
        and isinstance(tokenizer, open_clip.SimpleTokenizer)
        and model.text_pool_type in ("argmax", "eos")
    )

    def encode_texts(texts: list[str]) -> EncodedTexts:
        ids = tokenizer(texts)
        cut = truncated(tokenizer, texts, ids)
        ids = ids.to(model.logit_scale.device)
        return EncodedTexts(_encode_trimmed(model, ids) if trims else model.encode_text(ids), cut)

    def encode_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        vectors: torch.Tensor = model.encode_text(input_ids)  # it tells padding from the ids
        return vectors

    def text_lengths(texts: Sequence[str]) -> list[int]:
        lengths: list[int] = (tokenizer(list(texts)) != 0).sum(dim=1).tolist()
        return lengths

    return Towers(
        model=model,
        preprocess=transform,
        encode_images=model.encode_image,
        encode_texts=encode_texts,
        encode_ids=encode_ids,
        logit_scale=float(model.logit_scale.detach().exp()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        preprocessing=str(config),
        text_lengths=text_lengths if trims else None,
        encode_image_maps=_encode_image_maps(model.visual),
    )


def _encode_image_maps(visual: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The last feature map of a CNN, or the patches of a ViT as a map; class tokens are left out."""
    if not hasattr(getattr(visual, "trunk", visual), "forward_intermediates"):
        return None

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        found = visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW"
        )
        maps: torch.Tensor = found["image_intermediates"][-1]
        return maps

    return encode


def _encode_trimmed(model: open_clip.CLIP, ids: torch.Tensor) -> torch.Tensor:
    """The text tower of a CLIP on the longest text of the batch instead of the whole context: the same vectors.

    Reports are shorter than 77 tokens, labels much shorter. Source: Radford et al. 2021, arXiv 2103.00020, section 2.4:
    masked self-attention, features from the end token.
    """
    longest = int((ids != 0).sum(dim=1).max())  # the tokenizer pads with 0 behind the end token
    ids = ids[:, : math.ceil(longest / LENGTH_STEP) * LENGTH_STEP]
    length = ids.shape[1]
    hidden = model.token_embedding(ids) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    end = ids.argmax(dim=-1)  # the end token has the largest number
    pooled = model.ln_final(hidden)[torch.arange(len(ids), device=ids.device), end]
    projection = model.text_projection
    vectors: torch.Tensor = projection(pooled) if isinstance(projection, torch.nn.Module) else pooled @ projection
    return vectors


def truncated(tokenizer: Any, texts: list[str], ids: torch.Tensor) -> list[bool]:
    """Which texts were cut: of those that fill the context, the ones that are longer without a limit."""
    full = (ids[:, -1] != 0).tolist()
    longest = tokenizer.context_length
    if hasattr(tokenizer, "tokenizer"):  # a Hugging Face tokenizer inside
        lengths = [len(row) for row in tokenizer.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        return [length > longest for length in lengths]
    return [filled and len(tokenizer.encode(text)) + 2 > longest for filled, text in zip(full, texts, strict=True)]


def _write_bert_config(state: dict[str, torch.Tensor], source: Path, folder: Path) -> Path:
    try:
        bert_config(state, "text.transformer.").save_pretrained(folder)
    except KeyError as error:
        raise UserError(
            f"{source} needs a config.json for its text tower: only BERT's can be read from the weights."
        ) from error
    return folder

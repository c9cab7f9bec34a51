"""The files of XrayGPT: which there are, where they are published, and their weights under transformers' names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig

from medvlm_harness.errors import UserError, first_line, near_matches
from medvlm_harness.model_backends.checkpoints import LOAD_ERRORS, transformers_folder
from medvlm_harness.model_backends.interleaved import IMAGE_TOKEN

__all__ = ["PARTS", "Part", "XrayGptFiles", "published_state"]

LAVIS = "storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
README = "link in the README of github.com/mbzuai-oryx/XrayGPT"
CONFIG_SUFFIX = "_config.json"
# The published sizes (models/eva_vit.py: ViT-g/14 without its last block; models/blip2.py: bert-base with queries).
VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
QFORMER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "cross_attention_frequency": 2,
}
QUERIES = 32


@dataclass(frozen=True, slots=True)
class Part:
    """One of the published files; `option` says where it lies, if not in the folder under its `name`."""

    option: str
    name: str
    role: str
    source: str
    needed: bool = True


# In the order in which the publication's code reads them (models/mini_gpt4.py).
PARTS = (
    Part("eva", "eva_vit_g.pth", "the vision tower", f"{LAVIS}eva_vit_g.pth"),
    Part("blip2", "blip2_pretrained_flant5xxl.pth", "the Q-Former", f"{LAVIS}blip2_pretrained_flant5xxl.pth"),
    Part("vicuna", "Vicuna_Radiology_fp16", "the language model and its tokenizer", f"SharePoint, {README}"),
    # What XrayGPT's training starts from; the checkpoint has all of it anew.
    Part("minigpt4", "pretrained_minigpt4_7b.pth", "MiniGPT-4's projection", f"Google Drive, {README}", needed=False),
    Part("checkpoint", "xraygpt_pretrained1.pth", "XrayGPT's own weights: the projection", f"SharePoint, {README}"),
)
# Where a weight comes from, by its name in transformers; the first that fits.
ORIGINS = (
    ("vision_model.post_layernorm", "blip2"),
    ("vision_model", "eva"),
    ("language_projection", "checkpoint"),
    ("language_model", "vicuna"),
    ("", "blip2"),
)
# From the publication's names to transformers', applied in turn.
RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
        (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
        (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
        (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
        (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
        (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
        (r"^ln_vision\.", "vision_model.post_layernorm."),
        (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
        (r"^Qformer\.bert\.encoder\.(layer\.\d+\.\w+)\.self\.", r"qformer.encoder.\1.attention."),
        (r"^Qformer\.bert\.encoder\.", "qformer.encoder."),
        (r"^llama_proj\.", "language_projection."),
        (r"^llama_model\.", "language_model."),
    )
)
# What the published files hold beside what the model has a place for: buffers that are computed now, the parts of
# BLIP-2 that read and write text, and what stands on top of the vision tower (models/mini_gpt4.py removes the same).
UNUSED = re.compile(
    r"position_ids$|\.rotary_emb\.inv_freq$|^t5_proj\.|^Qformer\.cls\.|^Qformer\.bert\.embeddings\.\w+_embeddings\."
    r"|^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.|^visual_encoder\.(norm|fc_norm|head)\."
)
_CONFIGS = {"vision_config": Blip2VisionConfig, "qformer_config": Blip2QFormerConfig, "text_config": LlamaConfig}


@dataclass(frozen=True, slots=True)
class XrayGptFiles:
    """The files of one model: the set as published by option, or one file with everything (`whole`)."""

    parts: Mapping[str, Path]
    whole: Path | None
    language: Path  # the folder with the tokenizer
    sizes: Path | None  # a configuration beside the weights

    @classmethod
    def find(cls, pretrained: Path, elsewhere: Mapping[str, str | None]) -> XrayGptFiles:
        """The files, none of them read.

        Raises:
            UserError: naming every missing file, what it is for, and where it is published.
        """
        named = {option: Path(path).expanduser() for option, path in elsewhere.items() if path is not None}
        if pretrained.is_file():
            sizes = pretrained.with_name(pretrained.stem + CONFIG_SUFFIX)
            if not sizes.is_file():
                raise UserError(
                    f"Expected the sizes of {pretrained} beside it, in {sizes.name}, but there is no such file."
                )
            others = sorted(named.keys() - {"vicuna"})
            if others:
                raise UserError(f"{pretrained} is one file with all weights: leave out {', '.join(others)}.")
            return cls({}, pretrained, named.get("vicuna", pretrained.parent), sizes)
        if not pretrained.is_dir():
            raise UserError(
                f"Expected pretrained to be a folder with XrayGPT's files, or one file, but got {pretrained}."
            )
        parts = {part.option: named.get(part.option, pretrained / part.name) for part in PARTS}
        missing = [
            f"{part.option}={parts[part.option]}: {part.role} ({part.source})"
            for part in PARTS
            if not parts[part.option].exists() and (part.needed or part.option in named)
        ]
        if missing:
            raise UserError(
                f"{len(missing)} of XrayGPT's files are missing; put them into {pretrained}, or say where they lie by "
                "the option before the `=`:\n       " + "\n       ".join(missing)
            )
        sizes = pretrained / f"xraygpt{CONFIG_SUFFIX}"
        found = {option: path for option, path in parts.items() if path.exists()}
        return cls(found, None, parts["vicuna"], sizes if sizes.is_file() else None)

    @property
    def weights(self) -> tuple[Path, ...]:
        """Every file of weights, in loading order."""
        if self.whole is not None:
            return (self.whole,)
        return tuple(file for option in self.parts for file in self._files(option))

    @property
    def settings(self) -> tuple[Path, ...]:
        """The tokenizer's files."""
        return tuple(path for path in sorted(self.language.glob("tokenizer*")) if path.is_file())

    def _files(self, option: str) -> tuple[Path, ...]:
        return transformers_folder(self.parts[option]).weights if option == "vicuna" else (self.parts[option],)

    def config(self) -> Blip2Config:
        """The published sizes, or those of the file beside the weights; Vicuna's are its own.

        Raises:
            UserError: if a configuration is missing, no JSON, or has unknown keys.
        """
        given = {} if self.sizes is None else _json(self.sizes)
        known = {*_CONFIGS, "num_query_tokens"}
        for key in given:
            if key not in known:
                raise UserError(f"{self.sizes}: unknown key {key!r}.{near_matches(key, known)}")
        if self.whole is not None and known - given.keys():
            raise UserError(f"{self.sizes}: expected {', '.join(sorted(known))}, but it lacks some of them.")
        text = given.get("text_config") or _json(self.language / "config.json")
        return Blip2Config(
            vision_config=Blip2VisionConfig(**given.get("vision_config", VISION)).to_dict(),
            qformer_config=Blip2QFormerConfig(**given.get("qformer_config", QFORMER)).to_dict(),
            text_config=LlamaConfig.from_dict(text).to_dict(),
            num_query_tokens=given.get("num_query_tokens", QUERIES),
            image_token_index=IMAGE_TOKEN,
        )

    def tensors(self) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
        """Each file's weights under the names of the publication's model."""
        if self.whole is not None:
            yield self.whole, _tensors(self.whole)
            return
        prefixes = {"eva": "visual_encoder.", "vicuna": "llama_model."}
        for option in self.parts:
            for file in self._files(option):
                prefix = prefixes.get(option, "")
                yield file, {prefix + name: value for name, value in _tensors(file).items()}

    def stored_dtype(self) -> torch.dtype | None:
        """The language model's type; of one file, that of its first weight."""
        text = self.config().text_config
        if self.whole is None and text.dtype is not None:
            return text.dtype if isinstance(text.dtype, torch.dtype) else getattr(torch, str(text.dtype))
        file = self.whole or self._files("vicuna")[0]
        return next((value.dtype for value in _tensors(file).values() if value.is_floating_point()), None)

    def expected_in(self, missing: Iterable[str]) -> str:
        """`, expected in FILE`, for the weights that no file had."""
        if self.whole is not None:
            return ""
        origins = {next(option for prefix, option in ORIGINS if name.startswith(prefix)) for name in missing}
        return "".join(f", {self.parts[part.option].name}" for part in PARTS if part.option in origins)


def published_state(files: XrayGptFiles, config: Blip2Config) -> dict[str, torch.Tensor]:
    """All weights under transformers' names; what nothing has a place for is left in, so that loading refuses it.

    Raises:
        UserError: if a file cannot be read, or has one of the two biases of a block alone.
    """
    depth = config.vision_config.num_hidden_layers
    state: dict[str, torch.Tensor] = {}
    for _, tensors in files.tensors():
        state.update({name: value for name, value in tensors.items() if not _is_unused(name, depth)})
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        block = name.removesuffix("q_bias")
        if block + "v_bias" not in state:
            raise UserError(f"{block}v_bias is missing beside {name}.")
        query, value = state.pop(name), state.pop(block + "v_bias")
        state[block + "qkv.bias"] = torch.cat([query, torch.zeros_like(value), value])  # keys have no bias
    return {_renamed(name): value for name, value in state.items()}


def _is_unused(name: str, depth: int) -> bool:
    block = re.match(r"visual_encoder\.blocks\.(\d+)\.", name)
    return bool(UNUSED.search(name)) or (block is not None and int(block[1]) >= depth)


def _renamed(name: str) -> str:
    for pattern, new in RENAMES:
        name = pattern.sub(new, name)
    return name


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a file, alone or under `model`; mapped from the disk where the format allows it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        try:
            loaded = torch.load(path, "cpu", mmap=True, weights_only=True)
        except RuntimeError:  # torch's format before 1.6
            loaded = torch.load(path, "cpu", weights_only=True)
    except LOAD_ERRORS as error:
        raise UserError(
            f"{path} is no checkpoint that loads safely (a state dict, with weights_only): {first_line(error)}"
        ) from error
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict (names to tensors), alone or under `model`.")
    return dict(state)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, but got {found!r}.")
    return found

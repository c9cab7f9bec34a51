"""Weights rounded to 8 or 4 bits: `quantization=`, on any device that has the kernels.

| name               | library      | weights              | activations                  |
|--------------------|--------------|----------------------|------------------------------|
| `int8`             | bitsandbytes | int8 per row         | int8, outlier columns fp16   |
| `nf4`              | bitsandbytes | 4-bit normal float   | in the precision of the run  |
| `int8-dynamic`     | torchao      | int8 per row         | int8, scaled for each token  |
| `int8-weight-only` | torchao      | int8 per row         | in the precision of the run  |

All linear layers are rounded, attention projections included (`attention.py`), but for output embeddings. Embeddings,
convolutions, norms and biases stay as they are. Where activations are rounded, an item is computed alone: int8 of
bitsandbytes keeps those columns in fp16 that have an outlier in any item of a batch (LLM.int8, arXiv 2208.07339), and
what differs by 1e-7 with padding may be rounded to another integer. Images have no padding: under int8-dynamic they
are computed together on a CPU, where no batch was seen to change one by more than 2e-7 (docs/quantization.md).
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.model_backends.attention import reads_weights, unpack_attention
from medvlm_harness.model_backends.footprint import footprint, unrounded

__all__ = [
    "QUANTIZATIONS",
    "Quantization",
    "check_rounded",
    "choose_nf4_kernel",
    "find_quantization",
    "loading_options",
    "quantize_loaded",
]

_log = logging.getLogger("lm_eval.medvlm")

ENOUGH = 0.9  # of the matrices: below, what was left is named
INT8_THRESHOLD = 6.0  # of an activation that is an outlier; the paper's, and transformers' default


@dataclass(frozen=True, slots=True)
class Quantization:
    """One way to round weights."""

    name: str
    library: str  # as it is imported, and as pip knows it
    install: str  # what to type where it is missing
    alone: bool = False  # one item at a time, so that its answer is its own
    images_together: bool = False  # but for images, whose size is fixed, on a CPU

    def batches_images(self, device: torch.device) -> bool:
        """Whether several images may be computed together without changing one another."""
        return not self.alone or (self.images_together and device.type == "cpu")

    def identity(self) -> dict[str, str]:
        """What decides answers: the way and the library's version."""
        return {"name": self.name, self.library: importlib.metadata.version(self.library)}


_TORCHAO = "pip install 'medvlm-harness[torchao]'"
QUANTIZATIONS: Mapping[str, Quantization] = {
    way.name: way
    for way in (
        Quantization("int8", "bitsandbytes", "pip install bitsandbytes", alone=True),
        Quantization("nf4", "bitsandbytes", "pip install bitsandbytes"),
        Quantization("int8-dynamic", "torchao", _TORCHAO, alone=True, images_together=True),
        Quantization("int8-weight-only", "torchao", _TORCHAO),
    )
}


def find_quantization(asked: str | None) -> Quantization | None:
    """The way that is asked for by name; None for none.

    Raises:
        UserError: if there is none of that name, or its library is not installed.
    """
    if asked in (None, "", "none"):
        return None
    way = QUANTIZATIONS.get(str(asked))
    if way is None:
        raise UserError(
            f"Expected quantization to be {', '.join(QUANTIZATIONS)} or none, but got {asked!r}."
            f"{near_matches(str(asked), QUANTIZATIONS)}"
        )
    if find_spec(way.library) is None:
        raise UserError(f"quantization={way.name} needs {way.library}, which is not installed: {way.install}")
    return way


def loading_options(way: Quantization | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' `from_pretrained` is told, for the ways that round while weights are read."""
    if way is None or way.library != "bitsandbytes":
        return {}
    from transformers import BitsAndBytesConfig

    if way.name == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": str(device)}}


def quantize_loaded(way: Quantization, model: nn.Module, dtype: torch.dtype) -> None:
    """Round the linear layers of a loaded model in place; those that are rounded already stay as they are.

    Args:
        way: how.
        model: on its device, in its precision.
        dtype: that precision.
    """
    if way.library == "bitsandbytes":
        # It says for each matrix product that inputs become fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):  # while it was read
        unpack_attention(model)
        layers = _to_round(model, way)
        if way.library == "bitsandbytes":
            _round_with_bitsandbytes(way, model, layers, dtype)
        else:
            _round_with_torchao(way, model, layers)
    choose_nf4_kernel(model)


def choose_nf4_kernel(model: nn.Module) -> None:
    """Of the kernels for nf4 take the one that is the same everywhere, and that has gradients.

    On CPUs with bf16 bitsandbytes packs the weights anew at the first evaluation, for a kernel that rounds the scales
    to bf16, cannot do every shape, and silently gives an adapter no gradients from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # torch's types know no such one


def check_rounded(way: Quantization, model: nn.Module, name: str) -> None:
    """Refuse a way that rounded nothing; warn where it left more than a tenth of the matrices.

    Raises:
        UserError: if nothing of the model is rounded.
    """
    found = footprint(model)
    if not found.quantized:
        raise UserError(
            f"quantization={way.name} rounds no weights of {name}: it has no linear layers that can be rounded "
            "(convolutions and embeddings are not)."
        )
    share = found.quantized_share or 0.0
    if share < ENOUGH:
        left = unrounded(model)
        _log.warning(
            "quantization=%s rounded %.0f%% of the matrices of %s, not %s%s",
            way.name,
            100 * share,
            name,
            ", ".join(left[:3]),
            f" and {len(left) - 3} more" if len(left) > 3 else "",
        )


def _to_round(model: nn.Module, way: Quantization) -> dict[str, nn.Linear]:
    """The linear layers by name, without output embeddings and those that are not called."""
    kept = {id(getattr(module, "get_output_embeddings", lambda: None)()) for module in model.modules()}
    kept |= {id(child) for module in model.modules() if reads_weights(module) for child in module.children()}
    # Code that casts to the type of a weight (T5's wo) would cast to integers.
    parts = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if way.library == "bitsandbytes" else set()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in kept and not parts.intersection(name.split("."))
    }


def _round_with_torchao(way: Quantization, model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig() if way.name == "int8-dynamic" else Int8WeightOnlyConfig()
    quantize_(model, config, filter_fn=lambda _, name: name in layers)


def _round_with_bitsandbytes(
    way: Quantization, model: Any, layers: Mapping[str, nn.Linear], dtype: torch.dtype
) -> None:
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, layer in layers.items():
        device, weight = layer.weight.device, layer.weight.data
        sizes = {"bias": layer.bias is not None, "device": "meta"}
        rounded: Any
        if way.name == "int8":
            rounded = Linear8bitLt(
                layer.in_features, layer.out_features, has_fp16_weights=False, threshold=INT8_THRESHOLD, **sizes
            )
            rounded.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            rounded = Linear4bit(
                layer.in_features,
                layer.out_features,
                compute_dtype=dtype,
                compress_statistics=False,
                quant_type="nf4",
                **sizes,
            )
            rounded.weight = Params4bit(weight.cpu(), requires_grad=False, compress_statistics=False, quant_type="nf4")
        rounded.bias = layer.bias
        rounded.int8_original_dtype = dtype  # what open_clip casts its inputs to, instead of the weight's type
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, rounded.to(device).train(layer.training))  # rounds as it moves
    # Where PEFT looks to find which layers an adapter is put on.
    setattr(model, "is_loaded_in_8bit" if way.name == "int8" else "is_loaded_in_4bit", True)

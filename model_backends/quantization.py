"""Weights rounded after loading: `quantization=int8`, `nf4` or `int8-dynamic`, on any device that has the kernels.

| name           | library      | weights                 | activations                  |
|----------------|--------------|-------------------------|------------------------------|
| `int8`         | bitsandbytes | int8 per row            | int8, outlier columns fp16   |
| `nf4`          | bitsandbytes | 4-bit normal float      | in the precision of the run  |
| `int8-dynamic` | torchao      | int8 per row            | int8, scaled for each token  |

Output embeddings stay as they are in all of them. Where activations are rounded, an item is computed alone: int8 of
bitsandbytes keeps those columns in fp16 that have an outlier in any item of a batch (LLM.int8, arXiv 2208.07339), and
what differs by 1e-7 with padding may be rounded to another integer.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from medvlm_harness.errors import UserError, near_matches

__all__ = ["QUANTIZATIONS", "Quantization", "find_quantization", "loading_options", "quantize_loaded"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """One way to round weights."""

    name: str
    library: str  # as it is imported, and as pip knows it
    install: str  # what to type where it is missing
    alone: bool = False  # one item at a time, so that its answer is its own

    def identity(self) -> dict[str, str]:
        """What decides answers: the way and the library's version."""
        return {"name": self.name, self.library: importlib.metadata.version(self.library)}


QUANTIZATIONS: Mapping[str, Quantization] = {
    way.name: way
    for way in (
        Quantization("int8", "bitsandbytes", "pip install bitsandbytes", alone=True),
        Quantization("nf4", "bitsandbytes", "pip install bitsandbytes"),
        Quantization("int8-dynamic", "torchao", "pip install 'medvlm-harness[torchao]'", alone=True),
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

    # It says for each matrix product that inputs become fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if way.name == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": str(device)}}


def quantize_loaded(way: Quantization | None, model: torch.nn.Module) -> None:
    """Round a loaded model's linear layers in place, for the ways that do it afterwards.

    Of nf4 only the kernel is chosen: on CPUs with bf16 bitsandbytes takes one that rounds the scales to bf16 as well,
    and that cannot do every shape. Without it a machine of one kind answers as one of another.
    """
    if way is not None and way.name == "nf4":
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # torch's types know no such one
    if way is None or way.library != "torchao":
        return
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    kept = getattr(model, "get_output_embeddings", lambda: None)()
    quantize_(
        model,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, _: isinstance(module, torch.nn.Linear) and module is not kept,
    )

"""The number format that a model computes in: asked for, or chosen by what the device is good at."""

from __future__ import annotations

import torch

from medvlm_harness.errors import UserError, near_matches

__all__ = ["PRECISIONS", "choose_precision", "dtype_of"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CAPABILITY = 8  # CUDA's compute capability from which bf16 has tensor cores (Ampere)


def choose_precision(asked: str, device: torch.device) -> str:
    """The name of a format; `auto` is the fastest that the device has units for.

    Half precision where there are matrix units for it: bf16 on CUDA from Ampere on and on CPUs with AMX, fp16 on older
    CUDA devices. Elsewhere fp32: emulated, the others are slower.

    Raises:
        UserError: if it is none of fp32, bf16, fp16 and auto.
    """
    if asked == "auto":
        return _best(device)
    if asked not in PRECISIONS:
        known = (*PRECISIONS, "auto")
        raise UserError(
            f"Expected precision to be one of {', '.join(known)}, but got {asked!r}.{near_matches(asked, known)}"
        )
    return asked


def dtype_of(precision: str) -> torch.dtype:
    """Torch's type of a named format."""
    return PRECISIONS[precision]


def _best(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= BF16_CAPABILITY else "fp16"
    if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False):
        return "bf16"
    return "fp32"

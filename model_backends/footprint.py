"""What a loaded model's weights come to: how many there are, how many are rounded, and the bytes that they take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Footprint", "footprint", "unrounded"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Counts are of weights as they were before rounding: two 4-bit ones in a byte are two."""

    parameters: int
    trainable: int
    matrices: int  # weights of linear layers and attention projections; no embeddings (in or out), convolutions, norms
    quantized: int  # of these, in less than 16 bits
    bytes: int  # in memory, with the scales of what is rounded and with buffers

    @property
    def quantized_share(self) -> float | None:
        """Of the matrices, how much is rounded, in [0, 1]; None for a model without any."""
        return self.quantized / self.matrices if self.matrices else None


def footprint(model: torch.nn.Module) -> Footprint:
    """Count the weights of a model whose layers may be torch's, bitsandbytes' or torchao's."""
    seen: dict[int, torch.Tensor] = {}
    total = trainable = 0
    for tensor in model.parameters():
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor
            total += _weights(tensor)
            trainable += _weights(tensor) if tensor.requires_grad else 0
    matrices = {id(tensor): tensor for _, tensor in _matrices(model)}
    rounded = sum(_weights(tensor) for tensor in matrices.values() if _is_rounded(tensor))
    held = {**seen, **{id(buffer): buffer for buffer in model.buffers()}}
    return Footprint(
        parameters=total,
        trainable=trainable,
        matrices=sum(map(_weights, matrices.values())),
        quantized=rounded,
        bytes=sum(map(_bytes, held.values())) + sum(map(_scale_bytes, model.modules())),
    )


def unrounded(model: torch.nn.Module) -> list[str]:
    """Names of the matrices that are not rounded, the largest first."""
    found = {name: tensor for name, tensor in _matrices(model) if not _is_rounded(tensor)}
    return sorted(found, key=lambda name: -_weights(found[name]))


def _matrices(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    outputs = {id(getattr(module, "get_output_embeddings", lambda: None)()) for module in model.modules()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):  # also bitsandbytes' own, which are subclasses
            if id(module) not in outputs:
                yield name, module.weight
        elif isinstance(projection := getattr(module, "in_proj_weight", None), torch.nn.Parameter):
            yield f"{name}.in_proj_weight", projection
        elif isinstance(module, torch.nn.MultiheadAttention):
            for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                yield f"{name}.{part}", getattr(module, part)


def _weights(tensor: torch.Tensor) -> int:
    state = getattr(tensor, "quant_state", None)  # bitsandbytes packs two weights into a byte
    return tensor.numel() if state is None else math.prod(state.shape)


def _is_rounded(tensor: torch.Tensor) -> bool:
    # torchao's subclasses say the type that they stand for; what they hold is narrower.
    return any(not part.is_floating_point() for part in _parts(tensor)) or tensor.element_size() < 2


def _bytes(tensor: torch.Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in _parts(tensor))


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of: itself, or those of a subclass that wraps some."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or (isinstance(tensor, torch.nn.Parameter) and type(tensor) is torch.nn.Parameter):
        return [tensor]
    names, _ = flatten()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _scale_bytes(module: torch.nn.Module) -> int:
    """Scales that bitsandbytes keeps beside a module's parameters."""
    weight: Any = getattr(module, "weight", None)
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        nested = state.state2 if state.nested else None
        tensors = [state.absmax, state.code, *([nested.absmax, nested.code] if nested is not None else [])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)  # where it is after the first forward pass
    return scales.numel() * scales.element_size() if isinstance(scales, torch.Tensor) else 0

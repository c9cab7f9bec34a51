"""Attention whose projections are linear layers of their own, in place of torch's, so that each can be rounded.

`torch.nn.MultiheadAttention` keeps its input projections in one bare parameter, and reads the weight of its output
projection without calling it: layers that keep rounded weights cannot stand in for either.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from medvlm_harness.errors import UserError

__all__ = ["Attention", "reads_weights", "unpack_attention"]


class Attention(nn.Module):
    """Answers as the attention that it takes over from, in evaluation: no dropout.

    Args:
        packed: its weights are shared, not copied.

    Raises:
        UserError: if it has a bias for keys and values or an added zero, which no model here has.
    """

    in_proj_bias = None  # so torch.nn.TransformerEncoderLayer calls this module instead of reading weights

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        if packed.bias_k is not None or packed.add_zero_attn:
            raise UserError("An attention layer with add_bias_kv or add_zero_attn cannot be rounded.")
        self.heads, self.batch_first = packed.num_heads, packed.batch_first
        if packed._qkv_same_embed_dim:
            weights = packed.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(getattr(packed, f"{part}_proj_weight").detach() for part in "qkv")
        biases = [None] * 3 if packed.in_proj_bias is None else packed.in_proj_bias.detach().chunk(3)
        self.q, self.k, self.v = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        out_bias = None if packed.out_proj.bias is None else packed.out_proj.bias.detach()
        self.out = _linear(packed.out_proj.weight.detach(), out_bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `torch.nn.MultiheadAttention`, whose masks are True where nothing is to be seen, or added if floating.

        Args:
            query: (n, length, d), or (length, n, d) unless batch_first; (length, d) without a batch.
            key: likewise, of any length.
            value: likewise, as many as keys.
            key_padding_mask: (n, keys).
            need_weights: whether to give the attention weights.
            attn_mask: (length, keys), or (n * heads, length, keys).
            average_attn_weights: the mean over heads.
            is_causal: a hint that attn_mask is causal; the mask itself is what counts.

        Returns:
            The answers, shaped as the query; the weights, (n, length, keys), or None.
        """
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._split(self.q(query)), self._split(self.k(key)), self._split(self.v(value))
        mask = self._mask(q, k.shape[2], attn_mask, key_padding_mask)
        weights: torch.Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            found = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            found = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        answer: torch.Tensor = self.out(found.transpose(1, 2).flatten(2))
        if not batched:
            return answer[0], None if weights is None else weights[0]
        return answer if self.batch_first else answer.transpose(0, 1), weights

    def _split(self, projected: torch.Tensor) -> torch.Tensor:
        """(n, length, d) -> (n, heads, length, d / heads)."""
        n, length, _ = projected.shape
        return projected.view(n, length, self.heads, -1).transpose(1, 2)

    def _mask(
        self, q: torch.Tensor, keys: int, attn_mask: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Both masks as one to add, in the type of the query; (n or 1, heads or 1, length, keys)."""
        mask = None
        if attn_mask is not None:
            added = _to_add(attn_mask, q.dtype)
            mask = added[None, None] if added.ndim == 2 else added.view(len(q), self.heads, q.shape[2], keys)
        if padding is not None:
            hidden = _to_add(padding, q.dtype)[:, None, None]
            mask = hidden if mask is None else mask + hidden
        return mask


def unpack_attention(model: nn.Module) -> None:
    """Let every attention below a model call its projections as layers.

    `torch.nn.MultiheadAttention` is replaced; timm's BEiT, EVA and Swin V2, which join three biases and read the weight
    of one matrix, are told to add them afterwards.
    """
    for parent in list(model.modules()):
        if isinstance(getattr(parent, "qkv", None), nn.Linear) and hasattr(parent, "qkv_bias_separate"):
            setattr(parent, "qkv_bias_separate", True)  # noqa: B010  # torch's types know no such one
        for name, child in parent.named_children():
            if type(child) is nn.MultiheadAttention:
                setattr(parent, name, Attention(child).train(child.training))


def reads_weights(module: nn.Module) -> bool:
    """Whether a module computes with the weights of its linear children itself, as open_clip's pooling of ResNets."""
    return type(module).__name__ == "AttentionPool2d" and hasattr(module, "c_proj")  # timm's has none, and calls them


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _to_add(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)

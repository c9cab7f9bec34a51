"""Attention with layers of its own against torch's, and against what open_clip, timm and transformers build on it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.attention import Attention, unpack_attention

N, LENGTH, KEYS, WIDTH, HEADS = 3, 5, 7, 24, 4


def packed(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


CAUSAL = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
PADDING = torch.tensor([[False] * LENGTH, [False] * 3 + [True] * 2, [False] * 4 + [True]])
PER_HEAD = torch.rand(N * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.6
PER_HEAD[..., 0] = False


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL.bool(), "key_padding_mask": PADDING},
        {"attn_mask": PER_HEAD},
        {"key_padding_mask": PADDING, "attn_mask": CAUSAL.bool()},
    ],
)
@torch.inference_mode()
def test_answers_and_weights_are_torchs(batch_first: bool, bias: bool, masks: dict[str, torch.Tensor]) -> None:
    theirs = packed(batch_first=batch_first, bias=bias)
    ours = Attention(theirs)
    shape = (N, LENGTH, WIDTH) if batch_first else (LENGTH, N, WIDTH)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected, found = theirs(x, x, x, **masks, **options), ours(x, x, x, **masks, **options)
        assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-5)
        if expected[1] is None:
            assert found[1] is None
        else:
            assert torch.allclose(found[1], expected[1], rtol=0, atol=1e-6)
    if masks:  # the mask counts
        assert not torch.allclose(ours(x, x, x, **masks)[0], ours(x, x, x)[0], rtol=0, atol=1e-3)


@torch.inference_mode()
def test_other_keys_other_widths_and_no_batch() -> None:
    theirs = packed(batch_first=True, kdim=10, vdim=12)
    ours = Attention(theirs)
    query, key, value = torch.randn(N, LENGTH, WIDTH), torch.randn(N, KEYS, 10), torch.randn(N, KEYS, 12)
    assert torch.allclose(ours(query, key, value)[0], theirs(query, key, value)[0], rtol=0, atol=1e-5)
    for theirs in (packed(), packed(batch_first=True)):
        one = torch.randn(LENGTH, WIDTH)
        expected, found = theirs(one, one, one), Attention(theirs)(one, one, one)
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-5)


def test_what_no_model_here_has_is_refused() -> None:
    with pytest.raises(UserError, match="add_bias_kv"):
        Attention(packed(add_bias_kv=True))


@pytest.mark.parametrize("kind", ["torch", "siglip", "beit", "eva"])
@torch.inference_mode()
def test_a_model_answers_the_same_with_its_attention_unpacked(kind: str) -> None:
    """Rounded layers must be called: each linear one is seen at work afterwards."""
    torch.manual_seed(3)
    model: Any
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 6, 16)
    elif kind == "siglip":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=16, **sizes))
        x = torch.randn(2, 3, 32, 32)
    else:
        name = "beit_base_patch16_224" if kind == "beit" else "eva02_tiny_patch14_224"
        model = timm.create_model(name, depth=1, embed_dim=32, num_heads=2, num_classes=0, img_size=28, patch_size=14)
        x = torch.randn(2, 3, 28, 28)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = model.eval()

    def answer() -> torch.Tensor:
        given = model(x)
        return given if isinstance(given, torch.Tensor) else given.pooler_output

    expected = answer()
    unpack_attention(model)
    called: set[nn.Module] = set()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linear:
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    assert torch.allclose(answer(), expected, rtol=1e-5, atol=1e-5)
    assert called == set(linear)
    assert not any(type(module) is nn.MultiheadAttention for module in model.modules())

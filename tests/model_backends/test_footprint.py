from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from medvlm_harness.model_backends.footprint import footprint


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 64)
        self.attention = nn.MultiheadAttention(64, 4)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("scale", torch.ones(4))


MATRICES = 4 * 64 * 64 + 2 * 64 * 256
ALL = MATRICES + 10 * 64 + 4 * 64 + 256 + 2 * 64


def rounded(linear: nn.Linear, way: str) -> nn.Module:
    bias = linear.bias is not None
    if way == "int8":
        made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=bias, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = linear.bias
    return made.to("cpu").eval()


def test_counts_by_hand() -> None:
    found = footprint(Block())
    assert (found.parameters, found.matrices, found.quantized) == (ALL, MATRICES, 0)
    assert found.trainable == ALL
    assert found.bytes == 4 * (ALL + 4)
    assert found.quantized_share == 0


def test_a_shared_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert footprint(model).parameters == footprint(model).matrices == 64


@pytest.mark.parametrize(("way", "of_a_weight"), [("int8", 1.0), ("nf4", 0.5)])
def test_rounded_by_bitsandbytes(way: str, of_a_weight: float) -> None:
    model = Block()
    before = footprint(model)
    model.up, model.down = rounded(model.up, way), rounded(model.down, way)  # type: ignore[assignment]
    for _ in range(2):  # the first forward pass moves scales elsewhere
        found = footprint(model)
        assert (found.parameters, found.matrices) == (ALL, MATRICES)
        assert found.quantized == 2 * 64 * 256
        saved = before.bytes - found.bytes
        scales = 4 * (256 + 64) if way == "int8" else 4 * 2 * 64 * 256 / 64
        assert saved == pytest.approx((4 - of_a_weight) * 2 * 64 * 256 - scales, rel=0.05)
        with torch.inference_mode():
            model.down(model.up(torch.randn(2, 64)))


def test_rounded_by_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = Block()
    plain = copy.deepcopy(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, _: m is model.up or m is model.down)
    found = footprint(model)
    assert (found.parameters, found.quantized) == (ALL, 2 * 64 * 256)
    assert found.bytes < footprint(plain).bytes - 2.5 * 2 * 64 * 256


def test_no_matrices_have_no_share() -> None:
    assert footprint(nn.Conv2d(3, 4, 3)).quantized_share is None

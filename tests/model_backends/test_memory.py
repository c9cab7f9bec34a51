"""Predicted memory against the footprint of rounded models of full size, whose weights are whatever memory held."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, Gemma3ForCausalLM, Gemma3TextConfig, ViTConfig, ViTModel

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.footprint import footprint
from medvlm_harness.model_backends.memory import PRECISIONS, REFERENCES, Precision, parse_size, predict
from medvlm_harness.model_backends.quantization import QUANTIZATIONS, quantize_loaded


def vit_b_32() -> Any:
    vision = open_clip.CLIPVisionCfg(layers=12, width=768, patch_size=32, image_size=224)
    return open_clip.CLIP(512, vision, open_clip.CLIPTextCfg(), quick_gelu=True)


def gemma3_270m() -> Any:
    sizes = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "head_dim": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262144, **sizes, **heads))


def bert_base() -> Any:
    return BertForMaskedLM(BertConfig(vocab_size=28996))


def vit_b_16() -> Any:
    return ViTModel(ViTConfig())


@pytest.mark.parametrize(
    ("build", "family", "precision"),
    [
        (vit_b_32, "dual encoder", "fp32"),
        (vit_b_32, "dual encoder", "int8"),
        (vit_b_32, "dual encoder", "nf4"),
        (gemma3_270m, "generative", "bf16"),
        (gemma3_270m, "generative", "int8"),
        (bert_base, "text encoder", "nf4"),
        (vit_b_16, "image encoder", "int8"),
    ],
)
def test_a_prediction_is_within_a_tenth_of_what_the_weights_take(build: Any, family: str, precision: Precision) -> None:
    with torch.device("meta"):
        model = build()
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    parameters = footprint(model).parameters
    dtype = torch.bfloat16 if family == "generative" or precision == "bf16" else torch.float32
    model = model.to(dtype).to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if precision in QUANTIZATIONS:
        quantize_loaded(QUANTIZATIONS[precision], model, dtype)
    measured, found = footprint(model), predict(family, parameters, precision)
    assert found.weights == pytest.approx(measured.bytes, rel=0.1)
    if found.reference is not None:
        assert found.reference.share == pytest.approx(measured.quantized / measured.parameters, abs=0.001)
        assert found.weights != pytest.approx(4 * parameters, rel=0.1)


def test_more_bits_take_more_and_terms_add_up() -> None:
    for reference in REFERENCES:
        found = [predict(reference.family, reference.parameters, precision) for precision in PRECISIONS]
        fp32, bf16, int8, nf4 = (one.weights for one in found)
        assert nf4 < int8 < fp32 and bf16 < fp32
        assert {one.reference for one in found} == {None, reference}
        assert all(one.total == one.weights + one.working + one.libraries for one in found)


def test_a_generator_needs_room_for_keys_and_values() -> None:
    assert predict("generative", 10**9, "bf16").working > predict("dual encoder", 10**9, "bf16").working


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16e9), ("24GiB", 24 * 2**30), ("8000MB", 8e9), ("1.5 gib", 1.5 * 2**30), ("512K", 512e3), ("1TB", 1e12)],
)
def test_sizes_are_read_in_powers_of_1000_or_1024(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["16", "GB", "-16GB", "16 XB", "0GB", "16GBit"])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(UserError, match="Expected a size"):
        parse_size(text)


def test_a_family_that_was_never_counted_is_not_guessed() -> None:
    assert predict("image classifier", 10**6, "fp32").weights == 4 * 10**6
    with pytest.raises(UserError, match="No model of the family 'image classifier' was counted"):
        predict("image classifier", 10**6, "int8")

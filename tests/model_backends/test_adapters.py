"""Adapters on backends that transformers' `from_pretrained` does not build; language models: transformers_backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessor, ViTConfig, ViTModel

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import CARD_FILE
from medvlm_harness.model_backends.chexzero import CheXzeroBackend
from medvlm_harness.model_backends.clip import ClipBackend
from medvlm_harness.model_backends.image_encoder import ImageEncoderBackend

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
MLP = ("c_fc", "c_proj")
TEXTS = ["edema", "no acute cardiopulmonary process"]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("open_clip") / "tiny"
    path.mkdir()
    prepare = {"mean": [0.5] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": prepare}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    (path / CARD_FILE).write_text("trained_on: [MIMIC-CXR]")
    return path


def clip(folder: Path, **options: Any) -> ClipBackend:
    return ClipBackend(pretrained=str(folder), device="cpu", store="off", **options)


@torch.inference_mode()
def answers(backend: Any) -> torch.Tensor:
    """Of both towers, through what the backend keeps of them; scaled to length 1."""
    backend.ensure_loaded()
    vectors = torch.cat([backend.image_features(PIXELS), backend.encode_texts(TEXTS).vectors.float()])
    return nn.functional.normalize(vectors, dim=1)


def adapt(backend: Any, out: Path, targets: tuple[str, ...]) -> torch.Tensor:
    """Put a LoRA with random weights on a backend's whole model, save it, and give what the model then answers."""
    write_adapter(backend, out, LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))
    return answers(backend)


def write_adapter(backend: Any, out: Path, config: LoraConfig) -> None:
    backend.ensure_loaded()
    torch.manual_seed(5)
    get_peft_model(backend.model, config).eval().save_pretrained(out)


@pytest.mark.parametrize("targets", [MLP, ("attn",), ("attn", *MLP)])
def test_both_towers_have_the_adapter(folder: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    trained, plain = clip(folder), clip(folder)
    expected = adapt(trained, tmp_path / "lora", targets)
    backend = clip(folder, peft=str(tmp_path / "lora"))
    assert torch.allclose(answers(backend), expected, rtol=0, atol=1e-6)
    assert ((answers(plain) - expected).abs().amax(dim=1) > 1e-3).all()
    assert backend.parameters is not None and plain.parameters is not None
    assert backend.adapter is not None
    assert backend.parameters - plain.parameters == backend.adapter.parameters > 0
    assert backend.describe()["adapter"] == backend.adapter_identity()
    assert backend.identity is not None and plain.identity is not None
    assert backend.identity["adapter"] != plain.identity["adapter"] is None


@pytest.mark.parametrize("way", ["int8", "nf4", "int8-dynamic", "int8-weight-only"])
def test_an_adapter_goes_on_rounded_towers(folder: Path, tmp_path: Path, way: str) -> None:
    if way.startswith("int8-"):
        pytest.importorskip("torchao")
    whole = adapt(clip(folder), tmp_path / "lora", MLP)
    rounded = clip(folder, peft=str(tmp_path / "lora"), quantization=way)
    cosine = (answers(rounded) * whole).sum(dim=1)
    assert cosine.min() > (0.95 if way == "nf4" else 0.999)
    without = (answers(clip(folder, quantization=way)) * whole).sum(dim=1)
    assert (without < cosine).all()
    assert rounded.held is not None and rounded.adapter is not None
    # All matrices of the base, none of the adapter's.
    assert rounded.held["matrices"] - rounded.held["quantized"] == rounded.adapter.parameters


def test_an_adapter_can_be_trained_on_rounded_attention(folder: Path, tmp_path: Path) -> None:
    """On q, k, v and out, which only the rounded model has."""
    expected = adapt(clip(folder, quantization="nf4"), tmp_path / "lora", ("q", "v"))
    again = clip(folder, quantization="nf4", peft=str(tmp_path / "lora"))
    assert torch.allclose(answers(again), expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="does not fit CLIP") as error:
        clip(folder, peft=str(tmp_path / "lora")).ensure_loaded()
    assert "\n" not in str(error.value)


def test_an_adapter_on_whole_attention_layers_is_refused_where_these_are_taken_apart(
    folder: Path, tmp_path: Path
) -> None:
    adapt(clip(folder), tmp_path / "lora", ("attn",))
    with pytest.raises(UserError, match=r"is for visual\.transformer\.resblocks\.0\.attn as a whole .*quantization="):
        clip(folder, peft=str(tmp_path / "lora"), quantization="nf4").ensure_loaded()


def test_virtual_tokens_are_refused_where_towers_are_called_one_by_one(folder: Path, tmp_path: Path) -> None:
    adapt(clip(folder), tmp_path / "lora", MLP)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(UserError, match=r"holds virtual tokens .* tiny \(dual encoder\) does not take"):
        clip(folder, peft=str(tmp_path / "lora")).ensure_loaded()


@pytest.mark.parametrize(("added", "expected"), [("trained_on: [R2Gen]", ("MIMIC-CXR", "R2Gen")), (None, None)])
def test_training_data_of_both_count_once(folder: Path, tmp_path: Path, added: str | None, expected: Any) -> None:
    adapt(clip(folder), tmp_path / "lora", MLP)
    if added is not None:
        (tmp_path / "lora" / CARD_FILE).write_text(added)
    backend = clip(folder, peft=str(tmp_path / "lora"))
    assert backend.card.trained_on == expected
    backend.learn()  # the card is completed again
    assert backend.card.trained_on == expected


def test_one_chexzero_checkpoint_is_adapted_under_open_clips_own_names(shared: Path, tmp_path: Path) -> None:
    def chexzero(**options: Any) -> CheXzeroBackend:
        path = shared / "golden" / "chexzero_tiny.pt"
        return CheXzeroBackend(pretrained=str(path), device="cpu", store="off", **options)

    trained = chexzero()
    write_adapter(trained, tmp_path / "lora", LoraConfig(r=2, target_modules=list(MLP), init_lora_weights=False))
    side = trained.members[0].model.visual.image_size[0]
    pixels = torch.randn(1, 3, side, side)
    adapted = chexzero(peft=str(tmp_path / "lora"))
    assert torch.allclose(adapted.image_features(pixels), trained.image_features(pixels), rtol=0, atol=1e-6)
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any(name.startswith("base_model.model.visual.transformer.") for name in names)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(4)
    ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(tmp_path / "vit")
    CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "vit"
    )
    return tmp_path / "vit"


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_an_image_encoder_takes_one_too(
    vit: Path, tmp_path: Path, task_type: str | None, images: Callable[..., Any], embed_requests: Callable[..., Any]
) -> None:
    def encoder(**options: Any) -> ImageEncoderBackend:
        return ImageEncoderBackend(pretrained=str(vit), device="cpu", store="off", **options)

    trained = encoder()
    trained.ensure_loaded()
    base: Any = trained.model
    targets = [name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, nn.Linear)][:2]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type=task_type)
    write_adapter(trained, tmp_path / "lora", config)
    adapted, rounded = encoder(peft=str(tmp_path / "lora")), encoder(peft=str(tmp_path / "lora"), quantization="nf4")
    (expected,) = trained.image_features(PIXELS[:1])
    (found,) = adapted.image_features(PIXELS[:1])
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, encoder().image_features(PIXELS[:1])[0], rtol=0, atol=1e-3)
    assert nn.functional.cosine_similarity(rounded.image_features(PIXELS[:1])[0], expected, dim=0) > 0.9

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from medvlm_harness.model_backends.clip import ClipBackend
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.model_backends.tower_tokens import TokenTower, token_tower

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 3, "width": 48, "head_width": 24, "patch_size": 16},
    "timm vit": {"timm_model_name": "test_vit", "timm_proj": "linear", "timm_pool": "token", "image_size": 160},
    "timm resnet": {"timm_model_name": "test_resnet", "timm_proj": "linear", "timm_pool": "avg", "image_size": 64},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ClipBackend]:
    """A random open_clip model with an image tower of a kind, loaded."""

    def make(kind: str) -> ClipBackend:
        folder: Path = tmp_path_factory.mktemp("tower")
        config = {"embed_dim": 24, "vision_cfg": VISION[kind], "text_cfg": TEXT}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        backend = ClipBackend(pretrained=str(folder), device="cpu", store="off")
        backend.ensure_loaded()
        return backend

    return make


def maps(tower: TokenTower, pixels: torch.Tensor) -> torch.Tensor:
    return tower.run(tower.embed(pixels))


@pytest.mark.parametrize("kind", ["vit", "timm vit"])
def test_the_layers_one_by_one_are_the_tower(encoder: Callable[[str], ClipBackend], kind: str) -> None:
    backend = encoder(kind)
    tower = token_tower(backend)
    pixels = torch.randn(2, 3, VISION[kind]["image_size"], VISION[kind]["image_size"])
    with torch.inference_mode():
        whole = maps(tower, pixels)
        halves = tower.run(tower.run(tower.embed(pixels), 0, 1), 1)
        places = backend.encode_image_maps(pixels).flatten(2).transpose(1, 2)  # by the library's own forward
    assert len(tower.layers) > 1
    assert torch.equal(whole, halves)
    assert (whole[:, tower.prefix :] - places).abs().max() < 1e-5
    # Negative control: without the last layer it is another answer.
    assert (tower.run(tower.embed(pixels), 0, len(tower.layers) - 1)[:, tower.prefix :] - places).abs().max() > 1e-3


def test_the_class_token_of_open_clips_vit_gives_its_embedding(encoder: Callable[[str], ClipBackend]) -> None:
    backend = encoder("vit")
    tower, pixels = token_tower(backend), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        embedding = maps(tower, pixels)[:, 0] @ backend.model.visual.proj  # type: ignore[union-attr,operator]
        assert (embedding - backend.encode_images(pixels)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("build", "config", "prefix"),
    [(CLIPVisionModel, CLIPVisionConfig, 1), (SiglipVisionModel, SiglipVisionConfig, 0)],
)
def test_the_layers_of_transformers_towers_are_the_tower(build: Any, config: Any, prefix: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = build(config(image_size=32, patch_size=16, **sizes)).eval()

    class Model(torch.nn.Module):
        vision_model = vision

    class Encoder:
        model = Model()

    tower, pixels = token_tower(Encoder()), torch.randn(2, 3, 32, 32)  # type: ignore[arg-type]
    with torch.inference_mode():
        answer = vision(pixel_values=pixels)
        mine = maps(tower, pixels)
        # CLIP's own norm behind the last layer is on the class token alone.
        its = vision.post_layernorm(answer.last_hidden_state) if prefix else answer.last_hidden_state
    assert tower.prefix == prefix
    assert (mine - its).abs().max() < 1e-5


def test_a_cnn_has_no_layers_and_gives_the_places_of_its_map(encoder: Callable[[str], ClipBackend]) -> None:
    backend = encoder("timm resnet")
    tower, pixels = token_tower(backend), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        places = maps(tower, pixels)
        pooled = backend.model.visual.head(places.mean(dim=1))  # type: ignore[union-attr]
        assert (pooled - backend.encode_images(pixels)).abs().max() < 1e-5
    assert not tower.layers
    assert places.shape[1] == 4


def test_the_packaged_model_gives_its_places() -> None:
    backend = TinyBackend(device="cpu", store="off")
    backend.ensure_loaded()
    tower = token_tower(backend)
    assert not tower.layers
    assert maps(tower, torch.zeros(1, 1, 96, 96)).shape == (1, 36, 24)

"""Rounded weights in every family of backends: how near they answer, how much is rounded, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.biomedclip import BiomedClipBackend
from medvlm_harness.model_backends.chexzero import CheXzeroBackend
from medvlm_harness.model_backends.clip import ClipBackend
from medvlm_harness.model_backends.footprint import footprint
from medvlm_harness.model_backends.llava_med import LlavaMedBackend
from medvlm_harness.model_backends.medbridge import MedBridgeBackend
from medvlm_harness.model_backends.medclip import MedClipBackend
from medvlm_harness.model_backends.quantization import (
    QUANTIZATIONS,
    check_rounded,
    choose_nf4_kernel,
    find_quantization,
    quantize_loaded,
)
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.model_backends.xraygpt import XrayGptBackend
from medvlm_harness.requests import ImageRef

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 128, "head_width": 32, "patch_size": 8}
TEXTS = ["edema", "no acute cardiopulmonary process", "the heart is enlarged"]
# The least cosine to fp32, as measured on random weights, whose 4 bits cost more than trained ones'.
NEAR = {"int8": 0.999, "nf4": 0.95, "int8-dynamic": 0.999, "int8-weight-only": 0.999}
# Of images and of texts, where 8 is asked for.
EXPECTED_BATCH = {"int8": (1, 1), "nf4": (8, 8), "int8-dynamic": (8, 1), "int8-weight-only": (8, 8)}
OF_A_WEIGHT = {"int8": 1.0, "nf4": 0.5, "int8-dynamic": 1.0, "int8-weight-only": 1.0}  # bytes, without scales

Images = Callable[..., list[ImageRef]]
Requests = Callable[..., list[Instance]]


@pytest.fixture(params=QUANTIZATIONS)
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if importlib.util.find_spec(QUANTIZATIONS[name].library) is None:
        pytest.skip(f"needs {QUANTIZATIONS[name].library}")
    return name


def write_model(folder: Path, vision: dict[str, Any]) -> Path:
    """A random dual encoder of open_clip."""
    folder.mkdir()
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    prepare = {"mean": [0.5] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": prepare}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embedding" not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vit") / "vit", VIT)


def clip(folder: Path, way: str | None = None, **options: Any) -> ClipBackend:
    return ClipBackend(pretrained=str(folder), device="cpu", quantization=way, **{"store": "off", **options})


def vectors(backend: Any, requests: list[Instance]) -> NDArray[np.float32]:
    return np.stack([embedding.vector for embedding in backend.embed(requests)])


# --- dual encoders


def test_both_towers_are_rounded_whole_and_answer_nearly_as_before(
    vit: Path, way: str, images: Images, embed_requests: Requests
) -> None:
    whole, rounded = clip(vit), clip(vit, way)
    requests = embed_requests([*images(4), *TEXTS])
    expected, found = vectors(whole, requests), vectors(rounded, requests)
    assert (expected * found).sum(axis=1).min() > NEAR[way]
    assert np.abs(expected - found).max() > 1e-5  # what rounds nothing answers exactly the same
    assert whole.held is not None and rounded.held is not None
    matrices = (2 * 12 * 128**2) + (2 * 12 * 64**2)  # q, k, v, out and the two layers of four widths, in both towers
    assert (rounded.held["matrices"], rounded.held["quantized"]) == (matrices, matrices)
    saved = whole.held["bytes"] - rounded.held["bytes"]
    scales = 4 - OF_A_WEIGHT[way] - saved / matrices
    assert 0 < scales < 0.07  # bytes a weight
    assert whole.card.parameters == rounded.card.parameters


def test_every_projection_of_the_attention_is_rounded(vit: Path, way: str) -> None:
    backend = clip(vit, way)
    backend.ensure_loaded()
    block: Any = backend.towers.model
    attention = block.visual.transformer.resblocks[1].attn
    for projection in (attention.q, attention.k, attention.v, attention.out):
        assert footprint(projection).quantized == 128**2
    assert not any(isinstance(module, nn.MultiheadAttention) for module in block.modules())


def test_the_batch_changes_no_answer(
    tmp_path: Path, vit: Path, way: str, images: Images, embed_requests: Requests
) -> None:
    """With outliers in some columns for some items, which int8 treats column by column of a whole batch."""
    folder = tmp_path / "outliers"
    shutil.copytree(vit, folder)
    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.ln_pre.weight"][::5] *= 6
    state["token_embedding.weight"][::3] *= 40
    save_file(state, folder / "open_clip_model.safetensors")
    requests = embed_requests([*images(5), *TEXTS])
    single, batched = (clip(folder, way, batch_size=n) for n in (1, 8))
    assert np.abs(vectors(single, requests) - vectors(batched, requests)).max() < 1e-5
    described = batched.describe()
    assert (described["image_batch_size"], described["batch_size"]) == EXPECTED_BATCH[way]


def test_lower_precision_and_rounding_go_together(
    vit: Path, way: str, images: Images, embed_requests: Requests
) -> None:
    requests = embed_requests([*images(2), *TEXTS])
    expected, found = vectors(clip(vit), requests), vectors(clip(vit, way, precision="bf16"), requests)
    assert (expected * found).sum(axis=1).min() > NEAR[way] - 0.001


def test_what_is_rounded_is_known_without_loading_and_stored_apart(
    vit: Path, way: str, tmp_path: Path, images: Images, embed_requests: Requests
) -> None:
    store = {"store": str(tmp_path / "store.sqlite")}
    requests = embed_requests([*images(2), *TEXTS])
    first, whole = clip(vit, way, **store), clip(vit, **store)
    answers, others = vectors(first, requests), vectors(whole, requests)
    assert not np.array_equal(answers, others)
    expected = first.describe()["quantization"]
    again = clip(vit, way, **store)
    assert np.array_equal(vectors(again, requests), answers)
    described = again.describe()["quantization"]
    assert not again.loaded and again.images_recalled == 2
    assert described == expected
    assert described["name"] == way and described[QUANTIZATIONS[way].library]
    assert first.held is not None
    assert described["share"] == 1 and described["bytes"] == first.held["bytes"]
    assert described["parameters_share"] == first.held["quantized"] / first.held["parameters"]
    assert whole.describe()["quantization"] is None


def test_the_attention_pooling_of_a_resnet_is_left_alone_and_named(
    tmp_path: Path, way: str, images: Images, embed_requests: Requests, caplog: pytest.LogCaptureFixture
) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    folder = write_model(tmp_path / "rn", vision)
    requests = embed_requests(images(3))
    with caplog.at_level(logging.WARNING):
        rounded = clip(folder, way)
        found = vectors(rounded, requests)
    # Its image tower has no other linear layers, so that nothing of it is rounded.
    assert np.array_equal(found, vectors(clip(folder, batch_size=rounded.image_batching.found), requests))
    share = rounded.describe()["quantization"]["share"]
    assert 0 < share < 0.5
    assert f"rounded {100 * share:.0f}% of the matrices of rn, not visual.attnpool." in caplog.text


# --- other families, on the reference models


def medclip(golden: Path, **options: Any) -> MedClipBackend:
    return MedClipBackend(pretrained=str(golden / "medclip_tiny_pytorch_model.bin"), **options)


def chexzero(golden: Path, **options: Any) -> CheXzeroBackend:
    return CheXzeroBackend(pretrained=str(golden / "chexzero_tiny.pt"), **options)


def ensemble(golden: Path, **options: Any) -> CheXzeroBackend:
    return CheXzeroBackend(pretrained=str(golden / "chexzero"), **options)


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference models, and two of CheXzero's kind in a folder."""
    folder = tmp_path_factory.mktemp("golden")
    for path in (shared / "golden").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chexzero").mkdir()
    for name in ("a.pt", "b.pt"):
        (folder / "chexzero" / name).symlink_to(shared / "golden" / "chexzero_tiny.pt")
    return folder


@pytest.mark.parametrize(
    ("family", "way"),
    [(medclip, "int8"), (medclip, "nf4"), (chexzero, "int8"), (ensemble, "nf4"), (ensemble, "int8-weight-only")],
    indirect=["way"],
)
def test_published_dual_encoders_are_rounded_whole(golden: Path, family: Callable[..., Any], way: str) -> None:
    whole, rounded = (family(golden, device="cpu", store="off", quantization=name) for name in (None, way))
    whole.ensure_loaded()
    pixels = torch.stack([whole.preprocess(image) for image in golden_images(golden)])
    expected, found = whole.image_features(pixels), rounded.image_features(pixels)
    cosine = nn.functional.cosine_similarity(expected, found)
    assert cosine.min() > NEAR[way]
    assert not torch.equal(expected, found)
    assert rounded.describe()["quantization"]["share"] == 1
    assert rounded.identity["quantization"] != whole.identity["quantization"] is None


def golden_images(golden: Path) -> Iterator[Any]:
    from PIL import Image

    for path in sorted(golden.glob("img_*.png")):
        yield Image.open(path)


def test_published_generators_are_rounded_while_they_are_read(golden: Path, way: str) -> None:
    reference = torch.load(golden / "llavamed15_tiny_ref.pt", weights_only=True)
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32", "store": "off"}
    options |= {"pretrained": str(golden / "llavamed15_tiny"), "stock_tower": str(golden / "tiny_clip")}
    rounded = LlavaMedBackend(**options, quantization=way)
    logits = rounded.logits(reference["ids"], reference["px"])
    cosine = nn.functional.cosine_similarity(logits.flatten(1), reference["logits"].flatten(1))
    assert cosine.min() > (0.9 if way == "nf4" else 0.999)
    assert not torch.allclose(logits, reference["logits"], rtol=0, atol=1e-4)
    assert rounded.describe()["quantization"]["share"] > 0.9


def test_what_transformers_leaves_is_told(golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps BLIP-2's Q-Former in float32, which in the tiny model is a fifth of the matrices."""
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32", "store": "off"}
    rounded = XrayGptBackend(pretrained=str(golden / "xraygpt_tiny.pth"), **options, quantization="nf4")
    share = rounded.describe()["quantization"]["share"]
    assert 0.7 < share < 0.9
    assert f"quantization=nf4 rounded {100 * share:.0f}% of the matrices of xraygpt, not qformer." in caplog.text


def test_the_demo_model_is_rounded_where_it_has_linear_layers() -> None:
    described = TinyBackend(device="cpu", store="off", quantization="nf4").describe()["quantization"]
    assert described["share"] == 1
    assert described["parameters_share"] < 0.9  # it has convolutions and embeddings


# --- what is refused


def test_a_way_that_would_round_nothing_is_refused(way: str) -> None:
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    quantize_loaded(QUANTIZATIONS[way], cnn, torch.float32)
    with pytest.raises(UserError, match=rf"quantization={way} rounds no weights of cnn: it has no linear layers"):
        check_rounded(QUANTIZATIONS[way], cnn, "cnn")


@pytest.mark.parametrize("option", [{"quantization": "nf4"}, {"peft": "somewhere"}])
def test_medbridge_is_run_as_it_was_trained(option: dict[str, str]) -> None:
    with pytest.raises(UserError, match="medbridge takes no quantization= and no peft="):
        MedBridgeBackend(pretrained="nowhere", **option)


def test_none_is_no_rounding_and_an_unknown_way_is_told() -> None:
    assert find_quantization(None) is find_quantization("none") is None
    with pytest.raises(UserError, match=r"Expected quantization to be int8, nf4.*Did you mean int8"):
        find_quantization("int9")


def test_every_torch_backend_takes_both_options() -> None:
    for backend in (TorchBackend, ClipBackend, BiomedClipBackend, CheXzeroBackend, MedClipBackend, LlavaMedBackend):
        assert {"quantization", "peft"} <= backend.options()


# --- kernels


def test_an_adapter_on_nf4_has_gradients_after_an_evaluation() -> None:
    """Without the choice of the kernel, bitsandbytes packs weights at the first evaluation on CPUs with bf16."""
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_loaded(QUANTIZATIONS["nf4"], model, torch.float32)
    layer: Any = model[0]
    assert layer.support_avx512bf16_for_cpu is False
    layer.support_avx512bf16_for_cpu = True
    choose_nf4_kernel(model)
    assert layer.support_avx512bf16_for_cpu is False
    x = torch.randn(2, 64, requires_grad=True)
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0

"""`medvlm-image-encoder` against transformers itself, one image at a time; and what it refuses."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from medvlm_harness import plugin
from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.catalogue import published_card
from medvlm_harness.model_backends.image_encoder import ImageEncoderBackend
from medvlm_harness.requests import ImageRef

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
SIZES = {**VIT, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
# Kind -> class of the model, its configuration, and the number of tokens before the patches.
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "dinov2": ("Dinov2", {**VIT, "image_size": 28, "patch_size": 14}, 1),
    "registers": ("Dinov2WithRegisters", {**VIT, "image_size": 28, "patch_size": 14, "num_register_tokens": 4}, 5),
    "vit": ("ViT", SIZES, 1),
    "deit": ("DeiT", SIZES, 2),
    "msn": ("ViTMSN", SIZES, 1),
    "clip": ("CLIPVision", SIZES, 1),
    "swin": ("Swin", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 4}, 0),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny random model with an image processor, as transformers saves both."""

    def save(kind: str, head: str = "Model") -> Path:
        name, sizes, _ = KINDS[kind]
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**sizes))
        out = tmp_path_factory.mktemp(kind)
        model.save_pretrained(out)
        side = {"height": sizes.get("image_size", 32), "width": sizes.get("image_size", 32)}
        transformers.ViTImageProcessor(size=side, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(out)
        return out

    return save


def ours(folder: Path, **options: Any) -> ImageEncoderBackend:
    return ImageEncoderBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})


def vectors(backend: ImageEncoderBackend, refs: Sequence[ImageRef]) -> NDArray[np.float32]:
    return np.stack([one.vector for one in backend.embed([Instance("embed", {}, (ref,), 0) for ref in refs])])


def by_transformers(folder: Path, refs: Sequence[ImageRef], take: Callable[[Any], torch.Tensor]) -> NDArray[np.float32]:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    found = []
    for ref in refs:
        pixels = processor(PIL.Image.open(ref.path).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            vector = take(model(**pixels)).flatten()
        found.append((vector / vector.norm()).numpy())
    return np.stack(found)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- vectors


@pytest.mark.parametrize("kind", KINDS)
def test_each_pooling_is_what_transformers_gives(
    folder: Callable[..., Path], images: Callable[..., list[ImageRef]], kind: str
) -> None:
    path, refs, leading = folder(kind), images(3), KINDS[kind][2]
    expected = {
        "pooler": lambda output: output.pooler_output,
        "class": lambda output: output.last_hidden_state[:, 0],
        "mean": lambda output: output.last_hidden_state[:, leading:].mean(dim=1),
    }
    if kind == "resnet":
        expected["mean"] = lambda output: output.last_hidden_state.mean(dim=(2, 3))
    if kind == "msn":
        del expected["pooler"]
    if not leading:
        del expected["class"]
    found = {}
    for pooling, take in expected.items():
        backend = ours(path, pooling=pooling, batch_size=2)
        found[pooling] = vectors(backend, refs)
        assert np.abs(found[pooling] - by_transformers(path, refs, take)).max() < 1e-6
        assert backend.describe()["pooling"] == backend.pooling == pooling
        assert backend.describe()["images_encoded"] == 3
        # Negative control: images differ by more than that.
        assert np.abs(found[pooling][0] - found[pooling][1]).max() > 1e-3
    default = ours(path)
    assert np.array_equal(vectors(default, refs), vectors(ours(path, pooling=default.pooling), refs))
    assert default.pooling == ("class" if kind == "msn" else "pooler")
    if leading:
        assert np.abs(found["class"] - found["mean"]).max() > 1e-3
    if kind in ("dinov2", "registers"):
        assert np.array_equal(found["pooler"], found["class"])  # its pooler is the normalised class token


def test_without_a_trained_pooler_the_class_token_is_taken_and_said(
    folder: Callable[..., Path], images: Callable[..., list[ImageRef]], caplog: pytest.LogCaptureFixture
) -> None:
    path, refs = folder("vit", "ForImageClassification"), images(2)
    backend = ours(path)
    with caplog.at_level(logging.WARNING, logger="lm_eval.medvlm"):
        found = vectors(backend, refs)
    assert np.abs(found - by_transformers(path, refs, lambda output: output.last_hidden_state[:, 0])).max() < 1e-6
    (line,) = [record.message for record in caplog.records if record.name == "lm_eval.medvlm"]
    assert "has no trained pooler (pooler.dense.bias is missing); the vectors are pooling=class" in line
    assert backend.describe()["pooling"] == "class"
    assert backend.describe()["unused_keys"] == ["classifier.bias", "classifier.weight"]
    with pytest.raises(UserError, match=r"pooling=pooler cannot be used with .* use pooling=class or mean"):
        vectors(ours(path, pooling="pooler"), refs)


def test_the_store_tells_poolings_apart_and_needs_no_model(
    folder: Callable[..., Path], images: Callable[..., list[ImageRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, refs = folder("dinov2"), images(3)
    first = {pooling: vectors(ours(path, pooling=pooling, store="auto"), refs) for pooling in ("pooler", "mean")}
    assert ours(path, store="auto").identity != ours(path, pooling="mean", store="auto").identity
    ours(path, pooling="mean", store="auto").describe()  # keeps what was learnt while loading
    monkeypatch.setattr(ImageEncoderBackend, "load", None)
    for pooling, expected in first.items():
        backend = ours(path, pooling=pooling, store="auto")
        assert np.array_equal(vectors(backend, refs), expected)
        assert (backend.images_recalled, backend.images_encoded) == (3, 0)
    assert ours(path, pooling="mean", store="auto").describe()["pooling"] == "mean"


def test_a_plan_counts_and_times_images_alone(
    folder: Callable[..., Path], images: Callable[..., list[ImageRef]]
) -> None:
    backend, refs = ours(folder("vit"), store="auto"), images(4)
    vectors(ours(backend.folder, store="auto"), refs[:3])
    missing = backend.missing(refs, ["a text"])
    assert missing == ([refs[3]], [])
    seconds, none = backend.seconds_per_item(*missing)
    assert seconds is not None and seconds > 0 and none is None


# --- what is refused


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("layernorm.weight"), r"1 keys missing, 0 unexpected \(layernorm.weight"),
        (lambda state: state.update(surplus=torch.zeros(2)), r"0 keys missing, 1 unexpected \(surplus"),
        (lambda state: state.update({"layernorm.weight": torch.zeros(3)}), "Cannot load .* with transformers: "),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    folder: Callable[..., Path], edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        ours(change(folder("dinov2"), edit)).ensure_loaded()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("clip", "medvlm-clip"),
        ("siglip", "medvlm-clip"),
        ("bert", "medvlm-text-encoder"),
        ("gpt2", "medvlm-lm"),
        ("t5", "medvlm-lm"),
        ("llava", "medvlm-vlm"),
    ],
)
def test_a_model_of_another_backend_is_named_before_anything_is_read(tmp_path: Path, kind: str, model: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=rf"no encoder of images alone \({kind}\): use --model {model}\."):
        ours(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "to hold config.json"),
        ({"open_clip_config.json": "{}"}, "use --model medvlm-clip"),
        ({"config.json": "[]"}, "expected a JSON mapping"),
        ({"config.json": '{"model_type": "vit"}'}, "no weights"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        ours(tmp_path)


def test_what_is_no_folder_and_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder as transformers saves it, or a name on the Hub, but got"):
        ours(tmp_path / "nowhere")


def test_options_that_do_not_fit_are_refused(
    folder: Callable[..., Path], images: Callable[..., list[ImageRef]]
) -> None:
    path = folder("resnet")
    with pytest.raises(UserError, match=r"Expected pooling to be pooler, class, mean, but got .max.\."):
        ours(path, pooling="max")
    with pytest.raises(UserError, match=r"pooling=class cannot be used with .*: it has no class token"):
        vectors(ours(path, pooling="class"), images(1))
    with pytest.raises(UserError, match="ViTMSNModel has no pooler; use pooling=class or mean"):
        vectors(ours(folder("msn"), pooling="pooler"), images(1))
    with pytest.raises(UserError, match="takes images alone, but was given a text"):
        ours(path).embed([Instance("embed", {}, ("a text",), 0)])


def test_a_model_that_hides_patches_at_random_is_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hides patches at random"):
        ours(tmp_path).ensure_loaded()


def test_images_of_different_sizes_are_refused(
    folder: Callable[..., Path], images: Callable[..., list[ImageRef]]
) -> None:
    path = folder("resnet")
    written = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps({**written, "do_resize": False}))
    with pytest.raises(UserError, match="makes images of different sizes"):
        vectors(ours(path), images(1))


# --- in the benchmark


def test_rad_dino_is_run_by_it_under_its_own_card(folder: Callable[..., Path]) -> None:
    card = published_card("medvlm-image-encoder", "microsoft/rad-dino", None)
    assert card is not None and (card.name, card.family, card.licence) == ("rad-dino", "image encoder", "mit")
    assert ours(folder("dinov2"), card="rad-dino").card.name == "rad-dino"


def test_it_takes_part_in_the_image_probe_and_in_nothing_about_texts(
    folder: Callable[..., Path], demo: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.install()
    import lm_eval

    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    results = lm_eval.simple_evaluate(
        model="medvlm-image-encoder",
        model_args=f"pretrained={folder('vit')}",
        tasks=["demo_cxr_image_probe", "demo_cxr_retrieval", "demo_cxr_zeroshot"],
        metadata={"data_dir": str(demo.folder)},
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    assert 0 < results["demo_cxr_image_probe"]["auroc,none"] < 1
    for name, request in (("retrieval", "embed:text"), ("zeroshot", "classify:image")):
        (reason,) = [value for key, value in results[f"demo_cxr_{name}"].items() if key.startswith("unsupported")]
        assert request in reason or request.replace(":", " ") in reason

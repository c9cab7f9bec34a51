from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from open_clip import factory
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.clip import ClipBackend
from medvlm_harness.model_backends.towers import LENGTH_STEP
from medvlm_harness.requests import ImageRef

CONTEXT = 12
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 24, "patch_size": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
TEXTS = ["edema", "no acute cardiopulmonary process", "edema " * 30]
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "edema", "no", "pleural", "effusion", "lung")

Requests = Callable[..., list[Instance]]


def vectors(backend: ClipBackend, requests: list[Instance]) -> NDArray[np.float32]:
    return np.stack([embedding.vector for embedding in backend.embed(requests)])


def unit(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = torch.nn.functional.normalize(tensor, dim=-1).numpy()
    return array


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in open_clip's `local-dir:` layout."""
    path: Path = tmp_path_factory.mktemp("open_clip") / "tiny"
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.logit_scale, 3.0)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same architecture under a name of its own in open_clip's registry."""
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {**factory._MODEL_CONFIGS})
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ViT-Nano-16.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "configs")
    return "ViT-Nano-16"


# --- open_clip


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@torch.inference_mode()
def test_a_folder_gives_open_clips_own_vectors(
    folder: Path, prefix: str, images: Callable[..., list[ImageRef]], embed_requests: Requests, no_network: None
) -> None:
    refs = images(3)
    backend = ClipBackend(pretrained=f"{prefix}{folder}", device="cpu")
    backend.learn()
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    pixels = torch.stack([transform(Image.open(ref.path)) for ref in refs])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    ours = vectors(backend, embed_requests([*refs, *TEXTS]))
    assert np.allclose(ours[:3], unit(model.encode_image(pixels)), rtol=0, atol=1e-6)
    assert np.allclose(ours[3:], unit(model.encode_text(tokens)), rtol=0, atol=1e-6)
    assert torch.allclose(backend.image_features(pixels), model.encode_image(pixels), rtol=0, atol=1e-5)
    assert torch.allclose(backend.text_features(tokens), model.encode_text(tokens), rtol=0, atol=1e-5)
    assert backend.logit_scale == pytest.approx(np.exp(3.0))
    assert backend.card.name == "tiny"
    assert backend.card.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_batch_1_and_batch_64_agree(
    folder: Path, images: Callable[..., list[ImageRef]], embed_requests: Requests
) -> None:
    requests = embed_requests([*images(9), *TEXTS])
    one, many = (vectors(ClipBackend(pretrained=str(folder), device="cpu", batch_size=n), requests) for n in (1, 64))
    assert np.abs(one - many).max() < 1e-5


def test_truncation_is_told_for_texts_beyond_the_context(folder: Path, embed_requests: Requests) -> None:
    backend = ClipBackend(pretrained=str(folder), device="cpu")
    backend.learn()
    # One token per word, and one each for start and end.
    texts = [" ".join(["lung"] * words) for words in (1, CONTEXT - 2, CONTEXT - 1, 4 * CONTEXT)]
    tokens = open_clip.SimpleTokenizer(context_length=100)(["lung"])
    assert int((tokens != 0).sum()) == 3
    assert [e.truncated for e in backend.embed(embed_requests(texts))] == [False, False, True, True]


@torch.inference_mode()
def test_a_checkpoint_file_with_its_architecture_gives_the_same_vectors(
    folder: Path, architecture: str, tmp_path: Path, embed_requests: Requests, no_network: None
) -> None:
    state = load_file(folder / "open_clip_model.safetensors")
    plain, parallel = tmp_path / "plain.pt", tmp_path / "parallel.pt"
    torch.save(state, plain)
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, parallel)
    expected = vectors(ClipBackend(pretrained=str(folder), device="cpu"), embed_requests(TEXTS))
    for path in (folder / "open_clip_model.safetensors", plain, parallel):
        backend = ClipBackend(pretrained=str(path), architecture=architecture, device="cpu")
        backend.learn()
        assert np.allclose(vectors(backend, embed_requests(TEXTS)), expected, rtol=0, atol=1e-6)
        assert backend.checkpoint.weights == (path,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.proj"), "1 keys missing, 0 unexpected"),
        (lambda state: state.update({"a.b": torch.zeros(1), "a.c": torch.zeros(1)}), "0 keys missing, 2 unexpected"),
        (lambda state: state.update({"visual.proj": torch.zeros(2, 2)}), r"visual\.proj is \(2, 2\), expected \(48"),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_checkpoint_that_does_not_fit_is_refused(
    folder: Path,
    architecture: str,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    layout: str,
) -> None:
    state = load_file(folder / "open_clip_model.safetensors")
    change(state)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    save_file(state, copy / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        if layout == "folder":
            ClipBackend(pretrained=str(copy), device="cpu").ensure_loaded()
        else:
            ClipBackend(
                pretrained=str(copy / "open_clip_model.safetensors"), architecture=architecture, device="cpu"
            ).ensure_loaded()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/nowhere/weights", "./weights", "~/no/such", "local-dir:weights", "a/b/c"])
def test_a_path_where_nothing_lies_is_never_looked_for_on_the_hub(name: str, no_network: None) -> None:
    with pytest.raises(UserError, match="there is nothing at"):
        ClipBackend(pretrained=name, device="cpu").ensure_loaded()


def test_a_folder_without_a_configuration_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"open_clip_config\.json \(open_clip\) or config\.json"):
        ClipBackend(pretrained=str(tmp_path), device="cpu").ensure_loaded()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    with pytest.raises(UserError, match="no weights"):
        ClipBackend(pretrained=str(tmp_path), device="cpu").ensure_loaded()
    (tmp_path / "open_clip_config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="expected JSON"):
        ClipBackend(pretrained=str(tmp_path), device="cpu").ensure_loaded()


def test_a_checkpoint_file_alone_asks_for_its_architecture(folder: Path) -> None:
    with pytest.raises(UserError, match=r"architecture=ViT-B-32-quickgelu"):
        ClipBackend(pretrained=str(folder / "open_clip_model.safetensors"), device="cpu").ensure_loaded()


def test_unknown_architectures_and_tags_name_near_ones(folder: Path, no_network: None) -> None:
    file = str(folder / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"'ViT-B-33'.* Did you mean .*ViT-B-32"):
        ClipBackend(pretrained=file, architecture="ViT-B-33", device="cpu").ensure_loaded()
    with pytest.raises(UserError, match=r"neither a file nor a published tag.*laion2b_s34b_b79k"):
        ClipBackend(pretrained="laion2b_s34b_b79", architecture="ViT-B-32", device="cpu").ensure_loaded()


# --- transformers


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))  # noqa: S106
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


TEXT_CONFIG = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("transformers") / "clip"
    torch.manual_seed(1)
    projection = {"projection_dim": 16}
    config = CLIPConfig(text_config=TEXT_CONFIG | projection, vision_config=VISION_CONFIG | projection, **projection)
    CLIPModel(config).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("transformers") / "siglip"
    torch.manual_seed(2)
    model = SiglipModel(SiglipConfig(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG))
    torch.nn.init.constant_(model.logit_scale, 2.0)
    model.save_pretrained(path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    write_tokenizer(path)
    return path


SHORT = ["edema", "no pleural effusion lung", "lung edema"]


@torch.inference_mode()
def test_a_clip_of_transformers_gives_its_own_vectors(
    clip_folder: Path, images: Callable[..., list[ImageRef]], embed_requests: Requests, no_network: None
) -> None:
    refs = images(3)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = AutoImageProcessor.from_pretrained(clip_folder, use_fast=False)  # Pillow's, the same everywhere
    tokenizer = PreTrainedTokenizerFast.from_pretrained(clip_folder)
    pixels = torch.cat(
        [processor(Image.open(r.path).convert("RGB"), return_tensors="pt")["pixel_values"] for r in refs]
    )
    one_by_one = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in SHORT]
    backend = ClipBackend(pretrained=str(clip_folder), device="cpu")
    backend.learn()
    ours = vectors(backend, embed_requests([*refs, *SHORT]))
    images_expected = model.get_image_features(pixel_values=pixels).pooler_output
    assert np.allclose(ours[:3], unit(images_expected), rtol=0, atol=1e-5)
    assert np.allclose(ours[3:], unit(torch.cat(one_by_one)), rtol=0, atol=1e-5)  # padding is masked
    assert torch.allclose(backend.image_features(pixels), images_expected, rtol=0, atol=1e-5)
    padded = tokenizer(SHORT, padding="max_length", max_length=CONTEXT, return_tensors="pt")
    text = backend.text_features(padded["input_ids"], padded["attention_mask"])
    assert torch.allclose(text, torch.cat(one_by_one), rtol=0, atol=1e-5)
    assert backend.checkpoint.weights == (clip_folder / "model.safetensors",)


@pytest.mark.parametrize("which", ["folder", "clip_folder"])
def test_batches_of_texts_have_few_lengths(
    which: str, embed_requests: Requests, request: pytest.FixtureRequest
) -> None:
    backend = ClipBackend(pretrained=str(request.getfixturevalue(which)), device="cpu", batch_size=1)
    backend.ensure_loaded()
    lengths: set[int] = set()
    for module in backend.towers.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given: lengths.update(given[0].shape[1:-1]))
    backend.embed(embed_requests(["lung " * n for n in range(1, 30)]))
    assert lengths == {LENGTH_STEP, CONTEXT}  # 12 is less than the next multiple of 8


@torch.inference_mode()
def test_a_siglip_of_transformers_pads_texts_to_full_length(
    siglip_folder: Path, images: Callable[..., list[ImageRef]], embed_requests: Requests, no_network: None
) -> None:
    refs = images(3)
    model = SiglipModel.from_pretrained(siglip_folder).eval()
    processor = AutoImageProcessor.from_pretrained(siglip_folder, use_fast=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(siglip_folder)
    pixels = torch.cat(
        [processor(Image.open(r.path).convert("RGB"), return_tensors="pt")["pixel_values"] for r in refs]
    )
    padded = tokenizer(SHORT, padding="max_length", max_length=CONTEXT, return_tensors="pt")["input_ids"]
    backend = ClipBackend(pretrained=str(siglip_folder), device="cpu")
    backend.learn()
    ours = vectors(backend, embed_requests([*refs, *SHORT]))
    image = model.get_image_features(pixel_values=pixels).pooler_output
    assert np.allclose(ours[:3], unit(image), rtol=0, atol=1e-5)
    text = model.get_text_features(input_ids=padded).pooler_output
    assert np.allclose(ours[3:], unit(text), rtol=0, atol=1e-5)
    assert torch.allclose(backend.text_features(padded), text, rtol=0, atol=1e-5)
    assert backend.logit_scale == pytest.approx(np.exp(2.0))
    # Negative control: padded to the longest only, the vectors are others.
    short = tokenizer(SHORT, padding="longest", return_tensors="pt")["input_ids"]
    assert not np.allclose(ours[3:], unit(model.get_text_features(input_ids=short).pooler_output), atol=1e-3)


def test_transformers_truncation_is_told(clip_folder: Path, embed_requests: Requests) -> None:
    backend = ClipBackend(pretrained=str(clip_folder), device="cpu")
    backend.learn()
    texts = [" ".join(["edema"] * words) for words in (1, CONTEXT - 2, CONTEXT - 1, 40)]
    assert [e.truncated for e in backend.embed(embed_requests(texts))] == [False, False, True, True]


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_transformers_weights_that_do_not_fit_are_refused(clip_folder: Path, tmp_path: Path, kind: str) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(clip_folder / "model.safetensors")
    if kind == "missing":
        state.pop("text_projection.weight")
    else:
        state["surplus.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    counts = {"missing": "1 keys missing, 0 unexpected", "unexpected": "0 keys missing, 1 unexpected"}
    with pytest.raises(UserError, match=counts[kind]):
        ClipBackend(pretrained=str(tmp_path), device="cpu").ensure_loaded()


def test_a_model_with_one_tower_is_refused(tmp_path: Path, clip_folder: Path) -> None:
    size = {k: v for k, v in TEXT_CONFIG.items() if k != "eos_token_id"}
    BertModel(BertConfig(**size)).save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(UserError, match="no dual encoder"):
        ClipBackend(pretrained=str(tmp_path), device="cpu").ensure_loaded()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_file_is_refused_in_one_line(clip_folder: Path, tmp_path: Path, name: str) -> None:
    for file in clip_folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"Cannot load|no weights") as error:
        ClipBackend(pretrained=str(tmp_path), device="cpu").ensure_loaded()
    assert "\n" not in str(error.value)

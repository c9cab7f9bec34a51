from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from lm_eval.api.instance import Instance
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from PIL import Image
from torch.nn.functional import normalize
from torchvision.models.resnet import Bottleneck, ResNet, resnet50
from torchvision.transforms import Compose, Normalize, Resize, ToTensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.medfilip import MedFilipBackend, preprocess
from medvlm_harness.requests import ImageRef, LabelSet

State = dict[str, torch.Tensor]
full_width = pytest.mark.skipif(
    "MEDVLM_FULL_WIDTH" not in os.environ, reason="writes and loads 1 GB: set MEDVLM_FULL_WIDTH=1"
)
Requests = Callable[..., list[Instance]]
TEXT = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN, STD = 0.47, 0.31
TEXTS = ["edema", "mild basal effusion. A white level of fluid.", "", "No PNEUMOTHORAX  at 3.5 cm, left/right"]
LABELS = LabelSet.from_config("findings", ["Edema", "Pleural Effusion", "Support Devices"])


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """The publication's tokenizer, transformers', from the byte pairs that open_clip comes with."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=merges)


def randomised(model: torch.nn.Module, seed: int) -> Any:
    """Biases and normalisation away from 0 and 1, which would hide swapped names."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            kept = tensor if tensor.ndim == 1 else 0
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else kept + noise)
    return model.eval()


class Written:
    """What MedFILIP's training code saves, and the modules it was written from."""

    def __init__(self, path: Path, kind: str, *, full: bool = False) -> None:
        if kind == "resnet":
            self.image: Any = ResNet(Bottleneck, [3, 4, 6, 3] if full else [1, 1, 2, 1])
            self.image.fc = torch.nn.Linear(2048, 768)
        else:
            sizes = {} if full else {"embed_dim": 128, "depth": 2, "num_heads": 2}
            self.image = timm.create_model("eva02_base_patch14_448", num_classes=0, **sizes)
        randomised(self.image, 1)
        self.text = randomised(CLIPTextModel(CLIPTextConfig(**({} if full else TEXT))), 2)
        size = (768 if full or kind == "resnet" else 128, self.text.config.hidden_size)
        self.projection = 0.1 * torch.randn(*size, generator=torch.Generator().manual_seed(3))
        text = {f"text_model.{name}": t for name, t in self.text.state_dict().items()}
        text["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as the transformers of the time
        self.state: State = {
            "logit_scale": torch.tensor(2.0),
            "text_projection.weight": self.projection,
            **{f"image_model.{name}": t for name, t in self.image.state_dict().items()},
            **text,
        }
        self.path = path
        optimizer = torch.optim.SGD(self.image.parameters(), lr=0.1)
        beside = {"it": 3, "image_model": self.image.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": {}}
        torch.save({"network": self.state, **beside}, path)

    @torch.inference_mode()
    def images(self, refs: list[ImageRef]) -> np.ndarray:
        transform = Compose([ToTensor(), Resize((448, 448), antialias=True), Normalize([MEAN], [STD])])
        pixels = torch.stack([transform(Image.open(ref.path).convert("L")).repeat(3, 1, 1) for ref in refs])
        return normalize(self.image(pixels), dim=-1).numpy()

    @torch.inference_mode()
    def texts(self, texts: list[str], tokenizer: CLIPTokenizer) -> np.ndarray:
        """As published: padded with the end token to the longest, no mask."""
        ids = [tokenizer(text)["input_ids"] for text in texts]
        padded = torch.tensor([row + [49407] * (max(map(len, ids)) - len(row)) for row in ids])
        return normalize(self.text(padded).pooler_output @ self.projection.T, dim=-1).numpy()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("medfilip") / "epoch_5_score_0.5.pt", "resnet")


@pytest.fixture(scope="module")
def eva(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("medfilip") / "epoch_5_score_0.5.pt", "eva")


def backend(path: Path, **options: Any) -> MedFilipBackend:
    return MedFilipBackend(pretrained=str(path), device="cpu", **{"mean": MEAN, "std": STD, **options})


def vectors(model: MedFilipBackend, requests: list[Instance]) -> np.ndarray:
    return np.stack([embedding.vector for embedding in model.embed(requests)])


@pytest.mark.parametrize("kind", ["resnet", "eva"])
def test_both_image_towers_answer_as_the_modules_that_wrote_them(
    kind: str,
    resnet: Written,
    eva: Written,
    tokenizer: CLIPTokenizer,
    images: Callable[..., list[ImageRef]],
    embed_requests: Requests,
    no_network: None,
) -> None:
    made = {"resnet": resnet, "eva": eva}[kind]
    model, refs = backend(made.path), images(2)
    assert np.abs(vectors(model, embed_requests(refs)) - made.images(refs)).max() < 1e-5
    assert np.abs(vectors(model, embed_requests(TEXTS)) - made.texts(TEXTS, tokenizer)).max() < 1e-5
    counts = {"image": made.image, "text": made.text}
    expected = {name: sum(p.numel() for p in module.parameters()) for name, module in counts.items()}
    expected["text"] += made.projection.numel()
    assert model.describe()["tower_parameters"] == expected
    assert model.card.parameters == sum(expected.values()) + 1
    assert model.card.name == {"resnet": "medfilip", "eva": "medfilip-eva02"}[kind]
    assert model.logit_scale == pytest.approx(np.exp(2.0))


def test_tokens_are_those_of_the_published_processor(tokenizer: CLIPTokenizer) -> None:
    texts = [*TEXTS, 'Findings: XXXX, ___ [** 3 **] &c. (3.2 x 1.4 cm); A/P\'s view -- "stable"', "ß µm naïve"]
    ours = open_clip.SimpleTokenizer(context_length=77)(texts).tolist()
    for text, row in zip(texts, ours, strict=True):
        theirs = tokenizer(text)["input_ids"]
        assert row[: len(theirs)] == theirs
        assert not any(row[len(theirs) :])


def test_token_ids_give_the_same_features(eva: Written, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(TEXTS, padding=True, return_tensors="pt")
    features = backend(eva.path).text_features(ids["input_ids"])
    assert np.abs(normalize(features, dim=-1).numpy() - eva.texts(TEXTS, tokenizer)).max() < 1e-5


@torch.inference_mode()
def test_the_wrong_activation_is_seen(eva: Written, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(TEXTS[1:2], return_tensors="pt")["input_ids"]
    gelu = CLIPTextModel(CLIPTextConfig(**TEXT, hidden_act="gelu")).eval()
    gelu.load_state_dict(eva.text.state_dict())
    ours = backend(eva.path).text_features(ids)
    assert (ours - eva.text(ids).pooler_output @ eva.projection.T).abs().max() < 1e-4
    assert (ours - gelu(ids).pooler_output @ eva.projection.T).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(448, 448), (500, 300), (40, 900)])
def test_pixels_are_those_of_the_training_code(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    transform = Compose([ToTensor(), Resize((448, 448), antialias=True), Normalize([MEAN], [STD])])
    expected = transform(image.convert("L")).repeat(3, 1, 1)
    assert (preprocess(image, MEAN, STD) - expected).abs().max() < 1e-4
    if size != (448, 448):
        blocky = Compose([ToTensor(), Resize((448, 448), antialias=False), Normalize([MEAN], [STD])])
        assert (preprocess(image, MEAN, STD) - blocky(image.convert("L"))).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["bare", "module"])
def test_a_bare_state_dict_is_read_too(
    eva: Written, tmp_path: Path, form: str, images: Callable[..., list[ImageRef]], embed_requests: Requests
) -> None:
    state = dict(eva.state)
    if form == "module":  # under DataParallel
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "model.pt")
    refs = images(1)
    ours = vectors(backend(tmp_path / "model.pt"), embed_requests(refs))
    assert np.abs(ours - eva.images(refs)).max() < 1e-5


def test_descriptions_are_scored_alone_as_published(
    eva: Written,
    tmp_path: Path,
    tokenizer: CLIPTokenizer,
    images: Callable[..., list[ImageRef]],
    classify_requests: Requests,
) -> None:
    path = tmp_path / "constants.py"
    path.write_text(
        "disease_type = ['edema']\ndescription_book = {'edema': 'Wet.', 'effusion': 'A level.', 'x': 'y'}\n"
    )
    refs = images(3)
    asked = ["edema. Wet.", "effusion. A level.", "support devices"]
    cosine = eva.images(refs) @ eva.texts(asked, tokenizer).T
    for size in (1, 64):
        model = backend(eva.path, prompts="published", prompts_file=str(path), batch_size=size, store="off")
        scores = model.classify(classify_requests(refs, LABELS))
        assert np.allclose([s.margin for s in scores], cosine, rtol=0, atol=1e-5)
        logits = float(np.exp(2.0)) * cosine
        assert np.allclose([s.probability for s in scores], 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-5)
    described = model.describe()
    assert described["prompts_lacking"] == {"findings": ["Support Devices"]}
    assert described["normalisation"] == {"mean": MEAN, "std": STD}


@pytest.mark.parametrize(
    "options", [{"mean": None}, {"std": None}, {"mean": "grey"}, {"std": 0}, {"std": -1.0}, {"mean": float("nan")}]
)
def test_constants_that_nobody_published_are_asked_for(eva: Written, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"needs mean=NUMBER,std=NUMBER.*none were published"):
        backend(eva.path, **options)


def test_other_constants_are_another_model_to_the_store(eva: Written) -> None:
    assert backend(eva.path).identity == backend(eva.path).identity
    assert backend(eva.path).identity != backend(eva.path, mean=0.5).identity


def test_texts_over_the_context_are_cut_and_counted(eva: Written, embed_requests: Requests) -> None:
    long = [" ".join(["heart"] * words) for words in (75, 76)]
    assert [e.truncated for e in backend(eva.path).embed(embed_requests(long))] == [False, True]


@pytest.mark.parametrize(
    "name",
    [
        "logit_scale",
        "text_projection.weight",
        "image_model.fc.bias",
        "image_model.fc.weight",
        "image_model.layer3.1.bn2.running_mean",
        "text_model.encoder.layers.1.mlp.fc2.bias",
        "text_model.embeddings.token_embedding.weight",
    ],
)
def test_a_dropped_key_is_named(resnet: Written, tmp_path: Path, name: str) -> None:
    state = dict(resnet.state)
    del state[name]
    torch.save({"network": state, "it": 1}, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"short\.pt.* does not fit.*1 keys missing, 0 unexpected") as error:
        backend(tmp_path / "short.pt").ensure_loaded()
    assert name.removeprefix("image_model.") in str(error.value)


def test_an_unknown_key_is_named(resnet: Written, tmp_path: Path) -> None:
    for name in ("extra", "image_model.extra", "text_model.extra"):
        torch.save({**resnet.state, name: torch.zeros(1)}, tmp_path / "more.pt")
        with pytest.raises(UserError, match=r"0 keys missing, 1 unexpected .*extra"):
            backend(tmp_path / "more.pt").ensure_loaded()


def test_a_checkpoint_of_another_model_names_that_model(tmp_path: Path) -> None:
    names = ["vision_model.model.fc.weight", "text_model.projection_head.weight", "text_model.model.pooler.dense.bias"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="It looks like a checkpoint for --model medclip"):
        backend(tmp_path / "pytorch_model.bin").ensure_loaded()
    with pytest.raises(UserError, match="a file that MedFILIP's training code wrote"):
        backend(tmp_path)


@full_width
@pytest.mark.parametrize("kind", ["resnet", "eva"])
def test_the_published_sizes_load_and_answer(
    tmp_path: Path, kind: str, iu_cxr_images: Callable[[int], list[ImageRef]], classify_requests: Requests
) -> None:
    model = backend(Written(tmp_path / "full.pt", kind, full=True).path, prompts="ours")
    scores = np.array([s.margin for s in model.classify(classify_requests(iu_cxr_images(8), LABELS))])
    assert scores.shape == (8, 3)
    assert np.isfinite(scores).all()
    assert scores.std(axis=0).min() > 0
    with torch.device("meta"):
        if kind == "resnet":
            image = resnet50()
            image.fc = torch.nn.Linear(2048, 768)
        else:
            image = timm.create_model("eva02_base_patch14_448", num_classes=0)
    clip = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False)
    text = [p for name, p in clip.named_parameters() if not name.startswith(("visual.", "logit", "text_projection"))]
    assert model.describe()["tower_parameters"] == {
        "image": sum(p.numel() for p in image.parameters()),
        "text": sum(p.numel() for p in text) + 512 * 768,
    }

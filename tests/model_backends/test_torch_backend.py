from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from PIL import Image as PilImage
from PIL.Image import Image

from medvlm_harness.demo import tiny
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends import chexzero, torch_backend
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.requests import ImageRef, LabelSet, TextRef
from medvlm_harness.store import default_path

Requests = Callable[..., list[Instance]]
WIDTH = 8
LABELS = LabelSet.from_config("findings", {"Edema": {"positive": ["edema"], "negative": ["no edema"]}})


class FromFiles(DualEncoder):
    """A matrix in a file, a mean in another, and a constant in the code."""

    card: ModelCard = ModelCard(name="from-files", family="dual encoder")
    scale = 255.0
    loads = 0

    def __init__(self, *, shift: float = 0.0, **options: Any) -> None:
        self.shift = shift
        super().__init__(**options)

    def locate(self) -> Checkpoint:
        folder = Path(self.pretrained)
        return Checkpoint((folder / "weights.pt",), (folder / "config.json",), {"shift": self.shift})

    def load(self) -> None:
        type(self).loads += 1
        self.model = torch.nn.Linear(16, WIDTH)
        self.model.load_state_dict(torch.load(self.checkpoint.weights[0], weights_only=True))
        self.mean = float(json.loads(self.checkpoint.settings[0].read_text())["mean"])
        self.logit_scale = 5.0
        self.parameters = 16 * WIDTH + WIDTH
        self.transform = "16 pixels"

    def preprocessing(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def preprocess(self, image: Image) -> torch.Tensor:
        pixels = np.array(image.convert("L").resize((4, 4)), dtype=np.float32)
        return torch.from_numpy(pixels / self.scale - self.mean + self.shift)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        assert self.model is not None
        return self.model(pixels.flatten(1))

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        assert self.model is not None
        codes = [list(hashlib.sha256(text.encode()).digest()[:16]) for text in texts]
        vectors = self.model(torch.tensor(codes, dtype=self.dtype) / 255)
        return EncodedTexts(vectors, [len(text) > 9 for text in texts])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint of `FromFiles`."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    torch.manual_seed(1)
    torch.save(torch.nn.Linear(16, WIDTH).state_dict(), path / "weights.pt")
    (path / "config.json").write_text(json.dumps({"mean": 0.5}), encoding="utf-8")
    FromFiles.loads = 0
    return path


def answers(model: DualEncoder, refs: list[ImageRef], embed: Requests, classify: Requests) -> list[bytes]:
    """Every answer of a small run, bit for bit."""
    vectors = model.embed(embed([*refs, TextRef("a longer report")]))
    scores = model.classify(classify(refs, LABELS))
    return [vector.to_bytes() for vector in vectors] + [repr(one).encode() for one in scores]


def test_a_second_run_loads_nothing_and_gives_the_same_bits(
    folder: Path, images: Callable[..., list[ImageRef]], embed_requests: Requests, classify_requests: Requests
) -> None:
    refs = images(9)
    first = FromFiles(pretrained=str(folder), device="cpu", batch_size=4)
    expected = answers(first, refs, embed_requests, classify_requests)
    assert (first.images_encoded, first.texts_encoded, FromFiles.loads) == (9, 3, 1)
    second = FromFiles(pretrained=str(folder), device="cpu")
    assert answers(second, refs, embed_requests, classify_requests) == expected
    assert (second.images_encoded, second.texts_encoded, second.loaded, FromFiles.loads) == (0, 0, False, 1)
    assert (second.images_recalled, second.texts_recalled) == (9, 3)
    ours, theirs = first.describe(), second.describe()
    counts = {name for name in ours if name.endswith(("_encoded", "_recalled"))} | {"batch_size", "image_batch_size"}
    assert {k: v for k, v in ours.items() if k not in counts} == {k: v for k, v in theirs.items() if k not in counts}
    assert ours["card"]["parameters"] == 16 * WIDTH + WIDTH
    assert theirs["card"]["preprocessing"] == "16 pixels"


def test_neither_path_nor_name_is_part_of_the_key(
    folder: Path, images: Callable[..., list[ImageRef]], embed_requests: Requests, classify_requests: Requests
) -> None:
    refs = images(3)
    answers(FromFiles(pretrained=str(folder), device="cpu"), refs, embed_requests, classify_requests)
    moved = folder.with_name("elsewhere")
    shutil.move(folder, moved)
    (moved / "medvlm_card.yaml").write_text("name: another name\n", encoding="utf-8")
    other = FromFiles(pretrained=str(moved), device="cpu")
    copies = [ImageRef(str(ref), shutil.copy(ref.path, ref.path.with_suffix(".copy.png"))) for ref in refs]
    answers(other, copies, embed_requests, classify_requests)
    assert not other.loaded


EXAMPLES = itertools.count()
CHANGES = ("weight", "setting", "constant", "option", "precision", "pixel", "text", "library", "code")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.sampled_from(CHANGES), position=st.integers(0, 16 * WIDTH - 1), seed=st.integers(0, 10**6))
def test_whatever_decides_an_answer_misses_when_it_changes(
    folder: Path, tmp_path: Path, embed_requests: Requests, change: str, position: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 255, (5, 5), dtype=np.uint8)
    text = f"report {seed}"

    def ref(values: Any) -> ImageRef:
        path = tmp_path / f"{hashlib.sha256(values.tobytes()).hexdigest()}.png"
        PilImage.fromarray(values).save(path)
        return ImageRef(hashlib.sha256(path.read_bytes()).hexdigest(), path)

    def encoded(image: Any, report: str, **options: Any) -> int:
        model = FromFiles(pretrained=str(folder), device="cpu", **options)
        model.embed(embed_requests([ref(image), TextRef(report)]))
        return model.images_encoded + model.texts_encoded

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVLM_STORE", str(tmp_path / f"{next(EXAMPLES)}.sqlite"))
        encoded(pixels, text)
        assert encoded(pixels, text) == 0
        if change == "weight":
            kept = (folder / "weights.pt").read_bytes()
            state = torch.load(folder / "weights.pt", weights_only=True)
            value = state["weight"].view(-1)
            value[position] = torch.nextafter(value[position], torch.tensor(9.0))  # the least that can change
            torch.save(state, folder / "weights.pt")
            assert encoded(pixels, text) == 2
            (folder / "weights.pt").write_bytes(kept)
        elif change == "setting":
            kept = (folder / "config.json").read_bytes()
            (folder / "config.json").write_text(json.dumps({"mean": 0.5 + (1 + position) / 1000}), encoding="utf-8")
            assert encoded(pixels, text) == 2
            (folder / "config.json").write_bytes(kept)
        elif change == "constant":
            patch.setattr(FromFiles, "scale", 255.0 + (1 + position) / 100)
            assert encoded(pixels, text) == 2
        elif change == "option":
            assert encoded(pixels, text, shift=(1 + position) / 100 + seed) == 2
        elif change == "precision":
            assert encoded(pixels, text, precision="bf16") == 2
        elif change == "pixel":
            other = pixels.copy()
            other.flat[position % 25] ^= 1
            assert encoded(other, text) == 1
        elif change == "text":
            assert encoded(pixels, text + ".") == 1
        elif change == "library":
            patch.setattr(torch_backend, "library_versions", lambda: {"torch": f"9.{position}"})
            assert encoded(pixels, text) == 2
        else:
            patch.setattr(torch_backend, "code_sha256", lambda owner: f"{position}")
            assert encoded(pixels, text) == 2


@pytest.mark.parametrize(("module", "name"), [(tiny, "PIXEL_MEAN"), (tiny, "IMAGE_SIZE"), (tiny, "MAX_TOKENS")])
def test_our_constants_are_part_of_the_key_of_the_tiny_model(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = TinyBackend(device="cpu").identity
    monkeypatch.setattr(module, name, getattr(module, name) * 2)
    assert TinyBackend(device="cpu").identity != before


@pytest.mark.parametrize("name", ["CANVAS", "MEAN", "STD"])
def test_our_constants_are_part_of_the_key_of_chexzero(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "best.pt").write_bytes(b"weights")
    before = chexzero.CheXzeroBackend(pretrained=str(tmp_path), device="cpu").identity
    assert before is not None
    monkeypatch.setattr(chexzero, name, getattr(chexzero, name) + 1)
    after = chexzero.CheXzeroBackend(pretrained=str(tmp_path), device="cpu").identity
    assert after is not None
    assert after["preprocessing"] != before["preprocessing"]


def test_a_model_without_files_is_known_by_its_tensors(embed_requests: Requests) -> None:
    class FromTheHub(FromFiles):
        seed = 0

        def locate(self) -> Checkpoint:
            return Checkpoint()

        def load(self) -> None:
            torch.manual_seed(self.seed)
            self.model = torch.nn.Linear(16, WIDTH)

    def encoded() -> int:
        model = FromTheHub(pretrained="org/name", device="cpu")
        model.embed(embed_requests(["text"]))
        assert model.describe()["weights_sha256"] is not None
        return model.texts_encoded

    assert (encoded(), encoded()) == (1, 0)
    FromTheHub.seed = 1
    assert encoded() == 1


def test_a_model_that_nothing_tells_apart_is_never_stored(embed_requests: Requests) -> None:
    class Unknown(FromFiles):
        def locate(self) -> Checkpoint:
            return Checkpoint()

        def load(self) -> None:
            pass

        def encode_texts(self, texts: list[str]) -> EncodedTexts:
            return EncodedTexts(torch.ones(len(texts), 3), [False] * len(texts))

    for _ in range(2):
        model = Unknown(pretrained="?", device="cpu")
        model.embed(embed_requests(["text"]))
        assert model.texts_encoded == 1
        assert model.identity is None


@pytest.mark.parametrize("option", ["off", "elsewhere"])
def test_the_store_can_be_off_or_another(option: str, folder: Path, tmp_path: Path, embed_requests: Requests) -> None:
    store = "off" if option == "off" else str(tmp_path / "other" / "s.sqlite")
    for _ in range(2):
        model = FromFiles(pretrained=str(folder), device="cpu", store=store)
        model.embed(embed_requests(["text"]))
    assert not default_path().exists()
    assert model.texts_encoded == (1 if option == "off" else 0)
    assert model.describe()["store"] == ("off" if option == "off" else "on")
    with pytest.raises(UserError, match=r"named \*\.sqlite"):
        FromFiles(pretrained=str(folder), device="cpu", store="weights.pt").embed(embed_requests(["text"]))


def test_a_run_that_stops_in_the_middle_goes_on_with_the_same_batches(
    folder: Path, images: Callable[..., list[ImageRef]], embed_requests: Requests
) -> None:
    refs = images(20)
    undisturbed = FromFiles(pretrained=str(folder), device="cpu", batch_size=4, store="off")
    expected = [e.to_bytes() for e in undisturbed.embed(embed_requests(refs))]
    kept = refs[10].path.read_bytes()
    refs[10].path.write_bytes(b"damaged")
    broken = FromFiles(pretrained=str(folder), device="cpu", batch_size=4)
    with pytest.raises(UserError, match=r"10\.png changed"):
        broken.embed(embed_requests(refs))
    assert broken.images_encoded == 8
    refs[10].path.write_bytes(kept)
    resumed = FromFiles(pretrained=str(folder), device="cpu", batch_size=4)
    assert [e.to_bytes() for e in resumed.embed(embed_requests(refs))] == expected
    assert (resumed.images_encoded, resumed.images_recalled) == (12, 8)


def test_out_of_memory_in_a_batch_changes_no_number(
    folder: Path,
    images: Callable[..., list[ImageRef]],
    embed_requests: Requests,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refs = images(20)
    expected = FromFiles(pretrained=str(folder), device="cpu", batch_size=16, store="off").embed(embed_requests(refs))
    encode = FromFiles.encode_images

    def small_memory(self: FromFiles, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, pixels)

    monkeypatch.setattr(FromFiles, "encode_images", small_memory)
    model = FromFiles(pretrained=str(folder), device="cpu", batch_size=16)
    with caplog.at_level(logging.WARNING, "lm_eval.medvlm"):
        got = model.embed(embed_requests(refs))
    assert max(np.abs(a.vector - b.vector).max() for a, b in zip(got, expected, strict=True)) < 1e-6
    assert model.describe()["batch_size"] == 2
    assert len([record for record in caplog.records if "out of memory" in record.message]) == 3

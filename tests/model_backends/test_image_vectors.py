"""Images under a perturbation: encoded apart from the clean ones, kept in the store, and the same in every batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image

from medvlm_harness.data.images import open_reference
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts
from medvlm_harness.perturbations.image import Case, find_corruption
from medvlm_harness.requests import ImageRef

Images = Callable[..., list[ImageRef]]
Requests = Callable[..., list[Instance]]
# Of `picture()`; tests/perturbations/test_image.py has the whole table.
GOLDEN = {
    "contrast_down@1": "4df0a39b9f56cb726e8b93b6c6f17365dc68e182ac9e41f78bbfe009054c865d",
    "pixelate@5": "e0f9356d345267c1a8aad20ec7a282fa82ec3d95de8810729a7662caf6424d24",
    "left_right_flip@1": "a760454ef72cac815dffa0bf1472b1e686cef2a068efc8f85dd556e22a4b0e7c",
}


class Killed(BaseException):
    """As a signal would end a run."""


class Small(DualEncoder):
    """A random projection with a file of weights, so that the store keeps what it says; remembers what it saw."""

    card: ModelCard = ModelCard(name="small", family="dual encoder")
    batches_to_live: ClassVar[int | None] = None

    def locate(self) -> Checkpoint:
        return Checkpoint((Path(self.pretrained),))

    def load(self) -> None:
        self.seen: list[str] = []
        self.batches: list[int] = []
        self.matrix = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        self.seen.append(digest(image))
        return torch.from_numpy(np.array(image.convert("L").resize((48, 1)), dtype=np.float32)) / 255 - 0.5

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.batches_to_live is not None and len(self.batches) >= self.batches_to_live:
            raise Killed
        self.batches.append(len(pixels))
        return pixels.flatten(1) @ self.matrix

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        return EncodedTexts(torch.ones(len(texts), 6), [False] * len(texts))


def digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def picture() -> Image.Image:
    drawn = (Image.radial_gradient("L"), Image.linear_gradient("L"))
    disc, slope = (one.resize((160, 160), Image.Resampling.NEAREST) for one in drawn)
    return Image.composite(disc, slope, disc.point([255 * (value // 32 % 2) for value in range(256)]))


def under(refs: list[ImageRef], name: str, severity: int, seed: int = 0) -> list[ImageRef]:
    case = Case(find_corruption(name, "chest"), severity, seed)
    return [ImageRef(ref.file_sha256, ref.path, case) for ref in refs]


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Small]:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"weights")
    return lambda **options: Small(pretrained=str(weights), device="cpu", **options)


def vectors(model: Small, refs: list[ImageRef], embed_requests: Requests) -> np.ndarray[Any, Any]:
    return np.array([answer.vector for answer in model.embed(embed_requests(refs))])


def test_clean_and_perturbed_images_are_encoded_apart_and_recalled_both(
    small: Callable[..., Small], images: Images, embed_requests: Requests
) -> None:
    clean = images(5)
    noisy, other_draw = under(clean, "gaussian_noise", 5), under(clean, "gaussian_noise", 5, seed=1)
    everything = [one for three in zip(clean, noisy, other_draw, strict=True) for one in three]  # in turns
    model = small(batch_size=4)
    first = vectors(model, everything, embed_requests)
    assert model.images_encoded == 15 and len(np.unique(first.round(6), axis=0)) == 15
    # Trying a batch size may look at one image more than once.
    assert set(model.seen) == {digest(open_reference(ref)) for ref in everything} and len(set(model.seen)) == 15
    vectors(model, everything, embed_requests)
    assert model.images_encoded == 15  # once in the life of a model
    second = small()
    assert second.missing(everything, []) == ([], [])
    assert np.array_equal(vectors(second, everything[::-1], embed_requests)[::-1], first)
    assert (second.images_encoded, second.images_recalled, second.loaded) == (0, 15, False)
    # Neither a severity nor a corruption that was not asked for is answered by one that was.
    unknown = [*under(clean[:1], "gaussian_noise", 4), *under(clean[1:3], "rotation", 1)]
    assert second.missing([*unknown, *everything], [])[0] == unknown


def test_a_run_that_is_killed_goes_on_where_it_stopped(
    small: Callable[..., Small], images: Images, embed_requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = images(6)
    everything = [*clean, *under(clean, "gaussian_noise", 3), *under(clean, "rotation", 3)]
    expected = vectors(small(batch_size=2, store="off"), everything, embed_requests)
    with monkeypatch.context() as patched:
        patched.setattr(Small, "batches_to_live", 5)  # three of clean images, two of noisy ones
        with pytest.raises(Killed):
            vectors(small(batch_size=2), everything, embed_requests)
    resumed = small(batch_size=2)
    assert np.array_equal(vectors(resumed, everything, embed_requests), expected)
    assert (resumed.images_recalled, resumed.images_encoded) == (10, 8)


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (4, 3)])
def test_batches_threads_and_order_do_not_matter(
    small: Callable[..., Small], images: Images, embed_requests: Requests, batch_size: int, threads: int
) -> None:
    clean = images(7)
    everything = [*under(clean, "impulse_noise", 2), *clean, *under(clean, "burned_in_marker", 5)]
    one = small(store="off")
    first = vectors(one, everything, embed_requests)
    other = small(batch_size=batch_size, decode_threads=threads, store="off")
    assert np.abs(vectors(other, everything[::-1], embed_requests)[::-1] - first).max() < 1e-5
    assert sorted(other.seen) == sorted(one.seen) == sorted(digest(open_reference(ref)) for ref in everything)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_golden_pixels_reach_the_model_in_batches_of_any_size(
    small: Callable[..., Small], images: Images, embed_requests: Requests, tmp_path: Path, batch_size: int
) -> None:
    path = tmp_path / "picture.png"
    picture().save(path)
    golden = ImageRef(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    for case, expected in GOLDEN.items():
        name, severity = case.split("@")
        model = small(batch_size=batch_size, store="off")
        vectors(model, under([*images(2), golden], name, int(severity)), embed_requests)
        assert model.seen[-1] == expected

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from PIL import Image

from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.image_preparation import AS_PUBLISHED, ImagePreparation, find_preparation
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.model_backends.vlm import decoded
from medvlm_harness.requests import ImageRef


def gradient(width: int, height: int, low: int = 40, high: int = 200) -> Image.Image:
    row = np.linspace(low, high, width)
    return Image.fromarray(np.tile(row, (height, 1)).round().astype(np.uint8))


def vector(backend: TinyBackend, ref: ImageRef) -> np.ndarray:
    (answer,) = backend.embed([Instance("embed", {}, (ref,), 0)])
    return answer.vector


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, AS_PUBLISHED),
        ("published", AS_PUBLISHED),
        ("task", ImagePreparation(aspect="pad")),
        ("crop+window0.5-99.5+64px", ImagePreparation((0.5, 99.5), "crop", 64)),
        ("128px", ImagePreparation(pixels=128)),
    ],
)
def test_what_is_asked_for(asked: str | None, expected: ImagePreparation) -> None:
    assert find_preparation(asked) == expected
    assert find_preparation(str(expected)) == expected


@pytest.mark.parametrize("asked", ["pad+crop", "published+pad", "windo1-99", "window1-99+window2-98", "px", "", "a"])
def test_other_words_are_refused(asked: str) -> None:
    with pytest.raises(UserError, match=r"Expected preprocessing to be published, task, or parts joined by \+"):
        find_preparation(asked)


@pytest.mark.parametrize(("asked", "message"), [("window60-40", "percentile"), ("0px", "1 pixel")])
def test_impossible_values_are_refused(asked: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_preparation(asked)


def test_published_changes_nothing() -> None:
    image = gradient(30, 20)
    assert AS_PUBLISHED(image) is image


def test_aspects_by_hand() -> None:
    image = gradient(30, 20)
    padded, cropped, squashed = (np.asarray(ImagePreparation(aspect=one)(image)) for one in ("pad", "crop", "squash"))
    assert padded.shape == squashed.shape == (30, 30)
    assert (padded[5:25] == np.asarray(image)).all()
    assert (padded[:5] == 0).all() and (padded[25:] == 0).all()
    assert (cropped == np.asarray(image)[:, 5:25]).all()
    assert (squashed[0] == np.asarray(image)[0]).all()  # all rows are alike: stretched down, they still are


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
def test_a_square_stays(aspect: str) -> None:
    image = gradient(24, 24)
    assert find_preparation(aspect)(image) is image


def test_a_window_stretches_grey_values_and_cuts_what_is_outside() -> None:
    image = gradient(201, 4, 0, 200)
    found = np.asarray(ImagePreparation(window=(25, 75))(image)).astype(int)
    assert found[0, 50] == 0 and found[0, 150] == 255 and found[0, 0] == 0 and found[0, 200] == 255
    assert found[0, 100] == pytest.approx(127.5, abs=1)
    flat = Image.new("L", (8, 8), 90)
    assert np.asarray(ImagePreparation(window=(1, 99))(flat)).max() == 90


def test_colours_share_one_window() -> None:
    image = Image.merge("RGB", [gradient(201, 2, 0, 100), gradient(201, 2, 0, 200), gradient(201, 2, 0, 100)])
    found = np.asarray(ImagePreparation(window=(0, 100))(image)).astype(int)
    assert found.shape == (2, 201, 3)
    assert found[0, 50, 1] == pytest.approx(2 * found[0, 50, 0], abs=1)


def test_resolution_loses_detail_and_keeps_the_size() -> None:
    stripes = Image.fromarray((np.indices((64, 96))[1] % 2 * 255).astype(np.uint8))
    found = ImagePreparation(pixels=24)(stripes)
    assert found.size == (96, 64)
    assert np.asarray(found).std() < 3 < np.asarray(stripes).std()
    assert ImagePreparation(pixels=96)(stripes) is stripes


def test_a_model_sees_the_prepared_picture_and_stores_it_apart(tmp_path: Path) -> None:
    path = tmp_path / "tall.png"
    gradient(48, 96).save(path)
    ref = ImageRef(file_sha256(path), path)
    published, padded = TinyBackend(), TinyBackend(preprocessing="pad")
    first, second = vector(published, ref), vector(padded, ref)
    assert published.describe()["preprocessing"] == "published" and padded.describe()["preprocessing"] == "pad"
    assert np.abs(first - second).max() > 1e-3
    by_hand = tmp_path / "padded.png"
    find_preparation("pad")(Image.open(path)).save(by_hand)
    assert vector(published, ImageRef(file_sha256(by_hand), by_hand)) == pytest.approx(second, abs=1e-6)
    again = TinyBackend(preprocessing="pad")
    assert (vector(again, ref) == second).all() and again.images_encoded == 0


def test_generative_models_see_it_too(tmp_path: Path) -> None:
    path = tmp_path / "tall.png"
    gradient(48, 96).save(path)
    ref = ImageRef(file_sha256(path), path)
    assert decoded(ref, AS_PUBLISHED).size == (48, 96)
    assert decoded(ref, find_preparation("task")).size == (96, 96)

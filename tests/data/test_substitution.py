from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from medvlm_harness.data.images import inspect_image, open_image
from medvlm_harness.data.records import Dataset, Image, Study, read_dataset
from medvlm_harness.data.substitution import MID_GREY, Substitution
from medvlm_harness.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "medvlm_harness" / "substitutes"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Dataset:
    """Forty patients, some with two studies, with one to three images of two views, in three splits; real files."""
    folder = tmp_path_factory.mktemp("substitution") / "set"
    rng = np.random.default_rng(1)
    studies = []
    for k in range(44):
        images = []
        for view, count in (("frontal", 1 + k % 3), ("lateral", k % 2)):
            for number in range(count):
                name = f"{k}_{view}_{number}.png"
                folder.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (20 + k % 2, 16), dtype=np.uint8)
                Pillow.fromarray(pixels).save(folder / name)
                info = inspect_image(folder / name)
                images.append(Image(name, info.sha256, view, info.width, info.height))
        split = ("test", "train", "validation", "test")[k % 4]
        studies.append(Study(f"s{k:02}", f"p{k if k < 40 else k - 40}", tuple(images), split=split))
    return read_dataset(write_set(folder, studies))


def everything(data: Dataset) -> list[tuple[Study, Image]]:
    return [(study, image) for study in data.studies for image in study.images]


def test_another_patients_image_has_the_same_view_and_split_and_each_is_used_once(data: Dataset) -> None:
    substitution = Substitution(data)
    owner = {image.file: study for study, image in everything(data)}
    used: Counter[str] = Counter()
    for study, image in everything(data):
        other = substitution.other(image)
        assert other.view == image.view
        assert owner[other.file].split == study.split
        assert owner[other.file].patient_id != study.patient_id
        assert substitution("other", image) == (other.sha256, data.path(other))
        used[other.file] += 1
    assert set(used.values()) == {1} and len(used) == len(everything(data))


def test_neither_order_nor_limit_decides_but_the_seed_does(data: Dataset) -> None:
    images = [image for _, image in everything(data)]
    whole = {image.file: Substitution(data, seed=3)("other", image) for image in images}
    backwards = Substitution(data, seed=3)
    assert {image.file: backwards("other", image) for image in images[::-1]} == whole
    assert Substitution(data, seed=3)("other", images[17]) == whole[images[17].file]
    other = Substitution(data, seed=4)
    assert sum(other("other", image) != whole[image.file] for image in images) > len(images) / 2


def test_another_process_chooses_the_same(data: Dataset) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from medvlm_harness.data.records import read_dataset\n"
        "from medvlm_harness.data.substitution import Substitution\n"
        "data = read_dataset(Path(sys.argv[1])); one = Substitution(data, seed=5)\n"
        "print(*(one(kind, i)[0] for s in data.studies[::-3] for i in s.images for kind in ('other', 'blank', 'mean')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(data.folder)], capture_output=True, text=True, check=True
    ).stdout.split()
    here = Substitution(data, seed=5)
    kinds = ("other", "blank", "mean")
    assert done == [here(kind, i)[0] for s in data.studies[::-3] for i in s.images for kind in kinds]  # type: ignore[arg-type]


def test_blank_is_grey_of_the_same_size_under_the_hash_of_its_bytes(data: Dataset, cache: Path) -> None:
    substitution = Substitution(data)
    found = set()
    for _, image in everything(data):
        blank = substitution("blank", image)
        assert hashlib.sha256(blank.path.read_bytes()).hexdigest() == blank.sha256
        opened = open_image(blank.path, expected_sha256=blank.sha256)
        assert opened.size == (image.width, image.height)
        assert set(np.asarray(opened).ravel().tolist()) == {MID_GREY}
        found.add(blank.path)
    assert len(found) == 2 and set(cache.iterdir()) == found  # one file for each size


def test_a_damaged_file_in_the_cache_is_written_anew(data: Dataset) -> None:
    image = data.studies[0].images[0]
    first = Substitution(data)("blank", image)
    first.path.write_bytes(b"half")
    assert Substitution(data)("blank", image) == first
    assert open_image(first.path, expected_sha256=first.sha256).size == (image.width, image.height)


def test_mean_is_that_of_the_train_images_of_the_view(data: Dataset) -> None:
    image = next(image for study, image in everything(data) if study.split == "test" and image.view == "lateral")
    mean = open_image(Substitution(data)("mean", image).path)
    assert mean.size == (image.width, image.height)
    laterals = [one for study, one in everything(data) if study.split == "train" and one.view == "lateral"]
    pixels = [
        np.asarray(open_image(data.path(one)).resize((256, 256), Pillow.Resampling.BILINEAR), dtype=float)
        for one in laterals
    ]
    square = Pillow.fromarray(np.floor(np.mean(pixels, axis=0) + 0.5).astype(np.uint8))
    expected = np.asarray(square.resize(mean.size, Pillow.Resampling.BILINEAR), dtype=int)
    assert len(laterals) > 3
    assert np.abs(np.asarray(mean, dtype=int) - expected).max() <= 1
    frontal = next(image for study, image in everything(data) if study.split == "test" and image.view == "frontal")
    assert Substitution(data)("mean", frontal).sha256 != Substitution(data)("mean", image).sha256


def test_the_size_is_read_where_the_record_does_not_say(data: Dataset) -> None:
    image = data.studies[0].images[0]
    unknown = Image(image.file, image.sha256, image.view)
    assert Substitution(data)("blank", unknown) == Substitution(data)("blank", image)


def test_what_cannot_be_replaced_is_an_error(
    tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> None:
    images = tuple(fake_image(f"{k}.png") for k in range(3))
    studies = [Study("a", "p", images, split="test"), Study("b", "q", (fake_image("b.png"),), split="test")]
    small = read_dataset(write_set(tmp_path / "small", studies))
    with pytest.raises(UserError, match="has 4 frontal images, 3 of them of one patient"):
        Substitution(small)("other", images[0])
    with pytest.raises(UserError, match="no frontal image in split train"):
        Substitution(small)("mean", images[0])

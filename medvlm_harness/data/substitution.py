"""Other images in the place of a study's own, to see what a model takes from the image.

Which image stands for which depends on the prepared set and the seed alone: not on the order of requests, on --limit,
or on the number of processes. What has to be made lies in the user cache as PNG, under the hash of its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from medvlm_harness.cache import cache_folder
from medvlm_harness.data.images import open_image
from medvlm_harness.data.records import Dataset, Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.files import write_whole

__all__ = ["SUBSTITUTES", "ImageFile", "Substitute", "Substitution"]

Substitute = Literal["other", "blank", "mean"]
"""`other`: another patient's image of the same view and split. `blank`: uniform grey of the same size. `mean`: the mean
of the train split's images of the same view, at the same size."""
SUBSTITUTES: tuple[Substitute, ...] = get_args(Substitute)
MID_GREY = 128
SIDE = 256  # of the square that train images are averaged on


class ImageFile(NamedTuple):
    """A file with the hash of its bytes."""

    sha256: str
    path: Path


class _Group(NamedTuple):
    """Images that may stand for each other."""

    split: str
    view: str | None


class Substitution:
    """What stands for the images of a prepared set.

    Args:
        data: the set.
        seed: decides which other patient's image stands for which.
    """

    def __init__(self, data: Dataset, *, seed: int = 0) -> None:
        self.data, self.seed = data, seed
        self._others: dict[_Group, dict[str, Image]] = {}
        self._blank = cache(partial(_written, _uniform))
        self._mean = cache(self._mean_of)

    def __call__(self, kind: Substitute, image: Image) -> ImageFile:
        """The image that stands for `image`, which is one of the set.

        Raises:
            UserError: if the split has too few patients with that view, or the train split no image of it (mean).
        """
        if kind == "other":
            found = self.other(image)
            return ImageFile(found.sha256, self.data.path(found))
        return self._blank(self._size(image)) if kind == "blank" else self._mean(image.view, self._size(image))

    def other(self, image: Image) -> Image:
        """Another patient's image of the same view and split.

        Within a split and view this is a permutation without a patient's image standing for one of his own.
        """
        group = self._group_of[image.file]
        if group not in self._others:
            self._others[group] = _deranged(group, self._members[group], self.seed)
        return self._others[group][image.file]

    @cached_property
    def _members(self) -> dict[_Group, list[tuple[Study, Image]]]:
        members: dict[_Group, list[tuple[Study, Image]]] = {}
        for study in self.data.studies:
            for image in study.images:
                members.setdefault(_Group(study.split, image.view), []).append((study, image))
        return members

    @cached_property
    def _group_of(self) -> dict[str, _Group]:
        return {image.file: group for group, members in self._members.items() for _, image in members}

    def _size(self, image: Image) -> tuple[int, int]:
        """Width and height; read from the file where the record does not say."""
        if image.width is not None and image.height is not None:
            return image.width, image.height
        return open_image(self.data.path(image), expected_sha256=image.sha256).size

    def _mean_of(self, view: str | None, size: tuple[int, int]) -> ImageFile:
        square = self._mean_square(view)
        return _written(lambda wanted: square.resize(wanted, Pillow.Resampling.BILINEAR), size)

    def _mean_square(self, view: str | None) -> Pillow.Image:
        """The mean over the train images of a view; computed once, and kept under the hash of what it is made of."""
        train = sorted((image for _, image in self._members.get(_Group("train", view), ())), key=lambda one: one.sha256)
        if not train:
            raise UserError(
                f"{self.data.manifest.name} has no {view or 'unnamed'} image in split train to make a mean image of."
            )
        recipe = "\n".join([f"mean {SIDE}", *(image.sha256 for image in train)])
        path = _folder() / f"mean_{hashlib.sha256(recipe.encode()).hexdigest()}.png"
        if not path.is_file():
            total = np.zeros((SIDE, SIDE), dtype=np.int64)  # whole numbers: the order of summing decides nothing
            for image in train:
                total += self._square(image)
            mean = (total + len(train) // 2) // len(train)
            write_whole(path, _png(Pillow.fromarray(mean.astype(np.uint8))))
        return open_image(path)

    def _square(self, image: Image) -> NDArray[np.int64]:
        opened = open_image(self.data.path(image), expected_sha256=image.sha256).convert("L")
        return np.asarray(opened.resize((SIDE, SIDE), Pillow.Resampling.BILINEAR), dtype=np.int64)


def _deranged(group: _Group, members: Sequence[tuple[Study, Image]], seed: int) -> dict[str, Image]:
    """File -> the image that stands for it: patients in an order of the seed, turned on by the longest patient.

    A patient's images are neighbours in that order, so that a turn by as many as the patient with the most has leaves
    every patient behind, as long as it does not come round to him again.
    """

    def place(item: tuple[Study, Image]) -> tuple[str, str, str]:
        patient = item[0].patient_id
        return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest(), patient, item[1].file

    ordered = sorted(members, key=place)
    _, counts = np.unique([study.patient_id for study, _ in ordered], return_counts=True)
    turn = int(counts.max())
    if 2 * turn > len(ordered):
        raise UserError(
            f"Split {group.split} has {len(ordered)} {group.view or 'unnamed'} images, {turn} of them of one patient: "
            "too few for each to be replaced by another patient's."
        )
    return {image.file: ordered[(k + turn) % len(ordered)][1] for k, (_, image) in enumerate(ordered)}


# --- files


def _folder() -> Path:
    return cache_folder() / "substitutes"


def _uniform(size: tuple[int, int]) -> Pillow.Image:
    return Pillow.new("L", size, MID_GREY)


def _written(make: Callable[[tuple[int, int]], Pillow.Image], size: tuple[int, int]) -> ImageFile:
    """A picture of a size in the cache, written unless it is there as it should be."""
    payload = _png(make(size))
    digest = hashlib.sha256(payload).hexdigest()
    path = _folder() / f"{digest}.png"
    if not (path.is_file() and path.read_bytes() == payload):
        write_whole(path, payload)
    return ImageFile(digest, path)


def _png(picture: Pillow.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

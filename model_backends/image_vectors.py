"""Vectors of images: what every encoder of images shares, whether it has a text tower beside it or not."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from PIL.Image import Image
from tqdm import tqdm

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import BatchSize, slots
from medvlm_harness.model_backends.decoding import prepared
from medvlm_harness.model_backends.image_preparation import find_preparation
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.requests import Capability, Embedding, ImageRef
from medvlm_harness.store import Space

__all__ = ["ImageVectors", "Vectors", "unit"]

Vectors = NDArray[np.float32]
# A forward pass on a CPU uses its cores already, and one thread decodes some 500 chest X-rays of IU-CXR a second.
CPU_DECODE_THREADS, DECODE_THREADS = 1, 4


class ImageVectors(TorchBackend):
    """`embed` of images: each distinct one is decoded and encoded once, in slots, or comes from the store.

    `preprocessing=`: see `image_preparation.py`.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset({"embed:image", "profile"})

    REMEMBERED: ClassVar[tuple[str, ...]] = ("_image_vectors",)

    def __init__(self, *, decode_threads: int | None = None, preprocessing: str | None = None, **options: Any) -> None:
        self.preparation = find_preparation(preprocessing)
        super().__init__(**options)
        self.image_batching = self.batching
        if self._batches_images_apart:
            self.image_batching = BatchSize(self.batch_size_asked, self.max_batch_size)
        if decode_threads is not None and (not isinstance(decode_threads, int) or decode_threads < 1):
            raise UserError(f"Expected decode_threads to be 1 or more, but got {decode_threads!r}.")
        self.decode_threads = decode_threads or (CPU_DECODE_THREADS if self.device.type == "cpu" else DECODE_THREADS)
        self.images_encoded = self.images_recalled = 0
        self._image_vectors: dict[str, Vectors] = {}

    @property
    def _batches_images_apart(self) -> bool:
        """Whether texts are computed one by one and images, all of one size, are not."""
        way = self.quantization
        return way is not None and way.alone and way.batches_images(self._device)

    def use_batch_size(self, size: int) -> None:
        """Adds that of images."""
        super().use_batch_size(size)
        self.image_batching = BatchSize(size) if self._batches_images_apart else self.batching

    # --- for subclasses, beside `locate` and `load`

    @abstractmethod
    def preprocess(self, image: Image) -> torch.Tensor:
        """Pixels for the image tower, shape (channels, height, width); runs in worker threads."""

    @abstractmethod
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tower: (n, channels, height, width) -> (n, d), of any length."""

    def encode_image_maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the image tower sees place by place, before it pools: (n, channels, height, width) -> (n, c, h, w).

        A tower that does not tell has its vector at the one place that there is.
        """
        return self.encode_images(pixels)[:, :, None, None]

    def prepare(self, image: Image) -> torch.Tensor:
        """Pixels as `preprocess` makes them, of the picture that `preprocessing=` asks for."""
        return self.preprocess(self.preparation(image))

    # --- the tower by itself: for comparisons with other code, and for what is trained on top of it

    @torch.no_grad()
    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The image tower's answer to prepared pixels, not normalised: (n, channels, height, width) -> (n, d)."""
        self.ensure_loaded()
        return self.encode_images(pixels.to(self.device, self.dtype)).float().cpu()

    def image_maps(self, images: Sequence[ImageRef]) -> Iterator[tuple[Sequence[ImageRef], torch.Tensor]]:
        """Slots of images with their maps (see `encode_image_maps`), float32 on the CPU; for what is built on towers.

        Nothing of it is stored.
        """

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return self.encode_image_maps(pixels.to(self.device, self.dtype)).float().cpu()

        for refs, pixels in self._pixels(images):
            with self.meter.stage("encode_images", len(refs)):
                maps = torch.cat(self.image_batching.in_parts(pixels, encode))
            yield refs, maps

    # --- requests

    def embed(self, requests: Sequence[Instance]) -> list[Embedding]:
        """One unit vector per image.

        Raises:
            UserError: if a text is asked about.
        """
        images = [request.arguments[0] for request in requests]
        if not all(isinstance(image, ImageRef) for image in images):
            raise UserError(f"{self.card.name} takes images alone, but was given a text.")
        self._encode_new_images(images)
        return [Embedding(self._image_vectors[image]) for image in images]

    # --- what a run would cost

    def missing(self, images: Iterable[ImageRef], texts: Iterable[str]) -> tuple[list[ImageRef], list[str]]:
        """Of these, what would have to be computed: it is neither stored nor encoded already."""
        new = {str(image): image for image in images if image not in self._image_vectors}
        return [
            ref
            for perturbation, refs in _by_perturbation(new.values()).items()
            for ref in self._not_stored("embed:image", refs, perturbation=perturbation).values()
        ], []

    def _not_stored(self, kind: str, new: Mapping[str, Any], *, perturbation: str = "") -> dict[str, Any]:
        stored = self.recall(self.space(kind, perturbation=perturbation), new, len)
        return {key: one for key, one in new.items() if key not in stored}

    def seconds_per_item(self, images: Sequence[ImageRef], texts: Sequence[str]) -> tuple[float | None, float | None]:
        """Time of one image, decoding included, and of one text: measured on one slot each, and not kept.

        None where there is nothing to measure.
        """
        sample = images[: self.image_batching.of(self.device)]

        def encode() -> None:
            for _, pixels in self._pixels(sample):
                self._encode_pixels(pixels)

        return self._seconds(encode, sample), None

    def _seconds(self, encode: Callable[[], object], items: Sequence[Any]) -> float | None:
        if not items:
            return None
        self.ensure_loaded()
        encode()  # the first pass allocates and compiles
        start = time.perf_counter()
        encode()
        return (time.perf_counter() - start) / len(items)

    # --- encoding

    def _encode_new_images(self, images: Sequence[ImageRef]) -> None:
        new = [image for image in images if image not in self._image_vectors]
        for perturbation, of_file in _by_perturbation(new).items():
            self._encode_alike(of_file, self.space("embed:image", perturbation=perturbation))

    def _encode_alike(self, of_file: Mapping[str, ImageRef], space: Space | None) -> None:
        """The vectors of images under one perturbation, by the hashes of their files."""
        stored = self.recall(space, of_file, Embedding.from_bytes)
        self._image_vectors.update({of_file[key]: embedding.vector for key, embedding in stored.items()})
        self.images_recalled += len(stored)
        missing = [image for key, image in of_file.items() if key not in stored]
        for refs, pixels in self._pixels(missing):
            with self.meter.stage("encode_images", len(refs)):
                parts = self.image_batching.in_parts(pixels, self._encode_pixels)
            vectors = dict(zip(refs, unit(torch.cat(parts).numpy()), strict=True))
            self.keep(space, {ref.file_sha256: Embedding(vector).to_bytes() for ref, vector in vectors.items()})
            self._image_vectors.update(vectors)
            self.images_encoded += len(refs)

    def _pixels(self, refs: Sequence[ImageRef]) -> Iterator[tuple[Sequence[ImageRef], torch.Tensor]]:
        """Slots of images with their pixels; shows how far it is, how fast, and the time left."""
        if not refs:
            return
        self.ensure_loaded()
        size = self._batch_size(refs[0])
        batches = prepared(slots(refs, size), self.prepare, ahead=size, threads=self.decode_threads)
        with self._progress("images", len(refs), size) as progress:
            while True:
                with self.meter.stage("decode") as waiting:
                    slot, pixels = next(batches, ((), None))
                    waiting.items = len(slot)
                if pixels is None:
                    return
                yield slot, pixels
                progress.update(len(slot))

    def _batch_size(self, ref: ImageRef) -> int:
        """As asked, or tried with copies of one image."""

        def attempt(n: int) -> None:
            ((_, pixels),) = prepared(iter([[ref]]), self.prepare, ahead=1, threads=1)
            self._encode_pixels(pixels.expand(n, *pixels.shape[1:]))

        return self.image_batching.of(self.device, attempt)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.encode_images(pixels.to(self.device, self.dtype)).float().cpu()

    def _progress(self, what: str, total: int, size: int) -> tqdm[Any]:
        hidden = total <= size or self.rank > 0
        return tqdm(total=total, desc=f"Encoding {what}", unit=what.removesuffix("s"), disable=hidden, mininterval=1)

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds how many images were computed, and how many came from the store."""
        return {
            **super().describe(),
            "preprocessing": str(self.preparation),
            "image_batch_size": self.image_batching.found,
            "images_encoded": self.images_encoded,
            "images_recalled": self.images_recalled,
        }


def _by_perturbation(images: Iterable[ImageRef]) -> dict[str, dict[str, ImageRef]]:
    """Identity of a perturbation ("" for none) -> hash of a file -> the image: spaces of the store, and their keys."""
    groups: dict[str, dict[str, ImageRef]] = {}
    for image in images:
        identity = "" if image.perturbation is None else image.perturbation.identity
        groups.setdefault(identity, {})[image.file_sha256] = image
    return groups


def unit(vectors: NDArray[Any]) -> Vectors:
    """Rows scaled to length 1.

    Raises:
        UserError: if a row has no direction (all zero) or is not finite.
    """
    array: Vectors = np.asarray(vectors, dtype=np.float32)
    length = np.linalg.norm(array, axis=-1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise UserError("The model returned an embedding that is zero or not finite: is the checkpoint intact?")
    scaled: Vectors = array / length
    return scaled

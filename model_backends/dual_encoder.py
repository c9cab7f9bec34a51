"""Dual encoders: one tower for images, one for texts, compared by cosine.

A subclass loads its weights and says how pixels are prepared and both towers are run; batching, decoding in worker
threads, the store, `embed` and `classify` are here.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from PIL.Image import Image
from scipy.special import expit
from tqdm import tqdm

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.decoding import prepared
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.requests import Capability, Embedding, ImageRef, LabelScores, LabelSet, TextRef

__all__ = ["DualEncoder", "EncodedTexts", "PromptChoice"]

_log = logging.getLogger("lm_eval.medvlm")

Vectors = NDArray[np.float32]
PromptChoice = Literal["task", "published"]
# A forward pass on a CPU uses its cores already, and one thread decodes some 500 chest X-rays of IU-CXR a second.
CPU_DECODE_THREADS, DECODE_THREADS = 1, 4


class EncodedTexts(NamedTuple):
    """What `encode_texts` gives back."""

    vectors: torch.Tensor  # (n, d), of any length
    truncated: list[bool]  # per text: did the tokenizer cut it


class DualEncoder(TorchBackend):
    """An image tower and a text tower in one space.

    `classify` scores a label by cosines with its phrases. The embeddings of a label's positive phrases are averaged and
    renormalised, likewise its negative ones. Multilabel: margin = cos(positive) - cos(negative), probability the
    softmax of that pair on the card's scale. Multiclass: probabilities are the softmax over the options on that scale,
    the margin of an option is its log-odds, divided by the scale. So every margin is in units of a cosine.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset({"classify:image", "embed:image", "embed:text"})
    FACTS: ClassVar[tuple[str, ...]] = (*TorchBackend.FACTS, "logit_scale")
    logit_scale: float = 1.0  # multiplies cosines, where the card's probability_scale says so

    def __init__(self, *, prompts: PromptChoice = "task", decode_threads: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if prompts not in ("task", "published"):
            raise UserError(f"Expected prompts to be task or published, but got {prompts!r}.")
        if prompts == "published" and self.card.prompts is None:
            raise UserError(f"{self.card.name} has no published prompts on its card: use prompts=task.")
        if decode_threads is not None and (not isinstance(decode_threads, int) or decode_threads < 1):
            raise UserError(f"Expected decode_threads to be 1 or more, but got {decode_threads!r}.")
        self.prompts = prompts
        self.decode_threads = decode_threads or (CPU_DECODE_THREADS if self.device.type == "cpu" else DECODE_THREADS)
        self.images_encoded = self.texts_encoded = self.images_recalled = self.texts_recalled = 0
        self._image_vectors: dict[str, Vectors] = {}
        self._text_vectors: dict[str, Embedding] = {}
        self._label_vectors: dict[str, tuple[Vectors, Vectors | None]] = {}

    # --- for subclasses, beside `locate` and `load`

    @abstractmethod
    def preprocess(self, image: Image) -> torch.Tensor:
        """Pixels for the image tower, shape (channels, height, width); runs in worker threads."""

    @abstractmethod
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tower: (n, channels, height, width) -> (n, d), of any length."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """Text tower."""

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """How long the text tower takes each text to be: characters, where a subclass knows no better."""
        return [len(text) for text in texts]

    # --- requests

    def embed(self, requests: Sequence[Instance]) -> list[Embedding]:
        """One unit vector per request; each distinct image and text is encoded once in the life of the model."""
        arguments = [request.arguments[0] for request in requests]
        images = [argument for argument in arguments if isinstance(argument, ImageRef)]
        texts = [_text(argument) for argument in arguments if not isinstance(argument, ImageRef)]
        self._encode_new_images(images)
        self._encode_new_texts(texts)
        return [
            Embedding(self._image_vectors[argument])
            if isinstance(argument, ImageRef)
            else self._text_vectors[_text(argument)]
            for argument in arguments
        ]

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        """Scores of each image for each label of its set."""
        self.learn()
        self._encode_new_images([request.arguments[0] for request in requests])
        responses: list[LabelScores | None] = [None] * len(requests)
        by_set: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            by_set.setdefault(id(request.arguments[1]), []).append(i)  # the requests of a task share their set
        for indices in by_set.values():
            label_set: LabelSet = requests[indices[0]].arguments[1]
            images = np.stack([self._image_vectors[requests[i].arguments[0]] for i in indices])
            margin, probability = self._score(images, label_set)
            for i, m, p in zip(indices, margin.tolist(), probability.tolist(), strict=True):
                responses[i] = LabelScores(tuple(m), tuple(p))
        return [response for response in responses if response is not None]

    def _score(self, images: Vectors, label_set: LabelSet) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Margins and probabilities, both (n, labels)."""
        positive, negative = self._phrases(label_set)
        cosine = (images @ positive.T).astype(np.float64)
        if negative is not None:
            margin = cosine - (images @ negative.T).astype(np.float64)
            return margin, expit(self._scale * margin)
        log_odds, probability = log_odds_and_softmax(self._scale * cosine)
        return log_odds / self._scale, probability

    @property
    def _scale(self) -> float:
        return 1.0 if self.card.probability_scale == "no scale" else self.logit_scale

    def _phrases(self, label_set: LabelSet) -> tuple[Vectors, Vectors | None]:
        """Unit vectors of the labels' positive and negative phrases, (labels, d) each; multiclass has no negatives."""
        key = str(label_set)
        if key not in self._label_vectors:
            multilabel = label_set.kind == "multilabel"
            # An option's name is what the records hold ("0"); only its phrase says what that means.
            named = [(label.name if multilabel else None, label) for label in label_set.labels]
            positive = [self._wording(name, label.positive, "positive") for name, label in named]
            negative = [self._wording(name, label.negative, "negative") for name, label in named]
            self._encode_new_texts([text for texts in (*positive, *negative) for text in texts])
            self._label_vectors[key] = (self._mean(positive), self._mean(negative) if multilabel else None)
        return self._label_vectors[key]

    def _wording(
        self, name: str | None, phrases: tuple[str, ...], side: Literal["positive", "negative"]
    ) -> tuple[str, ...]:
        if self.prompts == "task" or self.card.prompts is None:
            return phrases
        templates = self.card.prompts.positive if side == "positive" else self.card.prompts.negative
        # A publication without negative templates ("this is a photo of ...") still needs the pair: the task's negative
        # phrase then goes into its positive template.
        named = () if name is None else tuple(t.format(name) for t in templates)
        return named or tuple(t.format(phrase) for t in self.card.prompts.positive for phrase in phrases)

    def _mean(self, phrases: Sequence[tuple[str, ...]]) -> Vectors:
        means = [np.mean([self._text_vectors[text].vector for text in texts], axis=0) for texts in phrases if texts]
        return unit(np.stack(means)) if means else np.zeros((0, 0), np.float32)

    # --- what a run would cost

    def missing(self, images: Iterable[ImageRef], texts: Iterable[str]) -> tuple[list[ImageRef], list[str]]:
        """Of these, what would have to be computed: it is neither stored nor encoded already."""
        new_images = {str(image): image for image in images if image not in self._image_vectors}
        new_texts = {str(TextRef(text)): text for text in texts if text not in self._text_vectors}
        for kind, new in (("embed:image", new_images), ("embed:text", new_texts)):
            for key in self.recall(self.space(kind), new, len):
                del new[key]
        return list(new_images.values()), list(new_texts.values())

    def seconds_per_item(self, images: Sequence[ImageRef], texts: Sequence[str]) -> tuple[float | None, float | None]:
        """Time of one image, decoding included, and of one text: measured on one slot each, and not kept.

        Of the texts every n-th by length is taken. None where there is nothing to measure.
        """
        by_length = self._by_length(texts)
        size = self.batching.of(self.device)
        sample = by_length[:: max(1, len(by_length) // size)][:size]

        def encode_images() -> None:
            for _, pixels in self._pixels(images[:size]):
                self._encode_pixels(pixels)

        return (
            self._seconds(encode_images, images[:size]),
            self._seconds(lambda: self._encode_slot(sample), sample),
        )

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
        new = {str(image): image for image in images if image not in self._image_vectors}
        if not new:
            return
        space = self.space("embed:image")
        stored = self.recall(space, new, Embedding.from_bytes)
        self._image_vectors.update({key: embedding.vector for key, embedding in stored.items()})
        self.images_recalled += len(stored)
        missing = [image for key, image in new.items() if key not in stored]
        for refs, pixels in self._pixels(missing):
            parts = self.batching.in_parts(pixels, self._encode_pixels)
            vectors = dict(zip(map(str, refs), unit(torch.cat(parts).numpy()), strict=True))
            self.keep(space, {key: Embedding(vector).to_bytes() for key, vector in vectors.items()})
            self._image_vectors.update(vectors)
            self.images_encoded += len(refs)

    def _pixels(self, refs: Sequence[ImageRef]) -> Iterator[tuple[Sequence[ImageRef], torch.Tensor]]:
        """Slots of images with their pixels; shows how far it is, how fast, and the time left."""
        if not refs:
            return
        self.ensure_loaded()
        size = self._batch_size(refs[0])
        batches = prepared(slots(refs, size), self.preprocess, ahead=size, threads=self.decode_threads)
        with self._progress("images", len(refs), size) as progress:
            for slot, pixels in batches:
                yield slot, pixels
                progress.update(len(slot))

    def _batch_size(self, ref: ImageRef) -> int:
        """As asked, or tried with copies of one image."""

        def attempt(n: int) -> None:
            ((_, pixels),) = prepared(iter([[ref]]), self.preprocess, ahead=1, threads=1)
            self._encode_pixels(pixels.expand(n, *pixels.shape[1:]))

        return self.batching.of(self.device, attempt)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.encode_images(pixels.to(self.device, self.dtype)).float().cpu()

    def _encode_new_texts(self, texts: Sequence[str]) -> None:
        new = {str(TextRef(text)): text for text in texts if text not in self._text_vectors}
        if not new:
            return
        space = self.space("embed:text")
        stored = self.recall(space, new, Embedding.from_bytes)
        self._text_vectors.update({new[key]: embedding for key, embedding in stored.items()})
        self.texts_recalled += len(stored)
        missing = self._by_length([text for key, text in new.items() if key not in stored])
        size = self.batching.of(self.device)
        with self._progress("texts", len(missing), size) as progress:
            for slot in slots(missing, size):
                encoded = self._encode_slot(slot)
                self.keep(space, {str(TextRef(text)): embedding.to_bytes() for text, embedding in encoded.items()})
                self._text_vectors.update(encoded)
                self.texts_encoded += len(slot)
                progress.update(len(slot))

    def _by_length(self, texts: Sequence[str]) -> list[str]:
        """So that a batch pads little; texts of one length in a fixed order, so that slots are fixed."""
        if texts:
            self.ensure_loaded()
        return [text for _, text in sorted(zip(self.text_lengths(texts), texts, strict=True))]

    def _encode_slot(self, texts: Sequence[str]) -> dict[str, Embedding]:
        def encode(part: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
            with torch.inference_mode():
                encoded = self.encode_texts(list(part))
            return encoded.vectors.float().cpu(), encoded.truncated

        parts = self.batching.in_parts(texts, encode)
        vectors = unit(torch.cat([vectors for vectors, _ in parts]).numpy())
        truncated = [cut for _, flags in parts for cut in flags]
        return {text: Embedding(vector, cut) for text, vector, cut in zip(texts, vectors, truncated, strict=True)}

    def _progress(self, what: str, total: int, size: int) -> tqdm[Any]:
        hidden = total <= size or self.rank > 0
        return tqdm(total=total, desc=f"Encoding {what}", unit=what.removesuffix("s"), disable=hidden, mininterval=1)

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds prompts, scale, and how much was computed and how much came from the store."""
        return {
            **super().describe(),
            "prompts": self.prompts,
            "probability_scale": self.card.probability_scale,
            "logit_scale": self.logit_scale,
            "images_encoded": self.images_encoded,
            "images_recalled": self.images_recalled,
            "texts_encoded": self.texts_encoded,
            "texts_recalled": self.texts_recalled,
        }


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


def log_odds_and_softmax(logits: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-odds of each option against the rest, and the softmax; both (n, options) from logits of that shape.

    The log-odds come from the logits, so that they keep ranking where a probability rounds to 0 or 1.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponential = np.exp(shifted)
    probability = exponential / exponential.sum(axis=1, keepdims=True)
    margin = np.empty_like(logits)
    for k in range(logits.shape[1]):
        margin[:, k] = logits[:, k] - np.logaddexp.reduce(np.delete(logits, k, axis=1), axis=1)
    return margin, probability


def _text(argument: str) -> str:
    return str(getattr(argument, "text", argument))

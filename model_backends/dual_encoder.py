"""Dual encoders: one tower for images, one for texts, compared by cosine.

A subclass loads its weights and says how pixels are prepared and both towers are run; batching, decoding in worker
threads, `embed` and `classify` are here.
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from PIL.Image import Image
from scipy.special import expit
from tqdm import tqdm

from medvlm_harness.data.images import open_image
from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.model_backends.cards import card_beside
from medvlm_harness.requests import Capability, Embedding, ImageRef, LabelScores, LabelSet

__all__ = ["DualEncoder", "EncodedTexts", "PromptChoice"]

_log = logging.getLogger("lm_eval.medvlm")

Vectors = NDArray[np.float32]
PromptChoice = Literal["task", "published"]


class EncodedTexts(NamedTuple):
    """What `encode_texts` gives back."""

    vectors: torch.Tensor  # (n, d), of any length
    truncated: list[bool]  # per text: did the tokenizer cut it


class DualEncoder(MedicalLM):
    """An image tower and a text tower in one space.

    `classify` scores a label by cosines with its phrases. The embeddings of a label's positive phrases are averaged and
    renormalised, likewise its negative ones. Multilabel: margin = cos(positive) - cos(negative), probability the
    softmax of that pair on the card's scale. Multiclass: probabilities are the softmax over the options on that scale,
    the margin of an option is its log-odds, divided by the scale. So every margin is in units of a cosine.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset({"classify:image", "embed:image", "embed:text"})
    logit_scale: float = 1.0  # multiplies cosines, where the card's probability_scale says so
    weight_files: tuple[Path, ...] = ()

    def __init__(
        self,
        *,
        pretrained: str,
        device: str | None = None,
        prompts: PromptChoice = "task",
        decode_threads: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._device = pick_device(device)
        if prompts not in ("task", "published"):
            raise UserError(f"Expected prompts to be task or published, but got {prompts!r}.")
        if prompts == "published" and self.card.prompts is None:
            raise UserError(f"{self.card.name} has no published prompts on its card: use prompts=task.")
        if not isinstance(decode_threads, int) or decode_threads < 1:
            raise UserError(f"Expected decode_threads to be 1 or more, but got {decode_threads!r}.")
        self.prompts, self.decode_threads = prompts, decode_threads
        self.pretrained = str(pretrained)
        self.images_encoded = self.texts_encoded = 0
        self._image_vectors: dict[str, Vectors] = {}
        self._text_vectors: dict[str, Embedding] = {}
        self._label_vectors: dict[str, tuple[Vectors, Vectors | None]] = {}
        self.load()

    # --- for subclasses

    @abstractmethod
    def load(self) -> None:
        """Load `self.pretrained`; set `logit_scale` and `weight_files`, and complete the card.

        Raises:
            UserError: if the checkpoint is missing or does not fit; every missing or unexpected key is a failure.
        """

    @abstractmethod
    def preprocess(self, image: Image) -> torch.Tensor:
        """Pixels for the image tower, shape (channels, height, width); runs in worker threads."""

    @abstractmethod
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tower: (n, channels, height, width) -> (n, d), of any length."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """Text tower."""

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
        self._encode_new_images([request.arguments[0] for request in requests])
        responses: list[LabelScores | None] = [None] * len(requests)
        by_set: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_set.setdefault(str(request.arguments[1]), []).append(i)
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

    # --- encoding

    def _encode_new_images(self, images: Sequence[ImageRef]) -> None:
        new = list({str(image): image for image in images if image not in self._image_vectors}.values())
        with tqdm(
            total=len(new), desc="Encoding images", unit="image", disable=not new or self.rank > 0, mininterval=1
        ) as progress:
            for refs, pixels in self._batches(new):
                with torch.inference_mode():
                    encoded = self.encode_images(pixels.to(self.device))
                vectors = unit(encoded.float().cpu().numpy())
                self._image_vectors.update(zip(map(str, refs), vectors, strict=True))
                self.images_encoded += len(refs)
                progress.update(len(refs))

    def _batches(self, refs: Sequence[ImageRef]) -> Iterator[tuple[list[ImageRef], torch.Tensor]]:
        """Batches of prepared pixels; worker threads stay at most two batches ahead, so few images are held at once."""
        with ThreadPoolExecutor(self.decode_threads) as pool:
            waiting: deque[tuple[ImageRef, Future[torch.Tensor]]] = deque()
            batch: list[tuple[ImageRef, torch.Tensor]] = []
            upcoming = iter(refs)
            try:
                while True:
                    while len(waiting) < self.batch_size + 2 * self.decode_threads:
                        if (ref := next(upcoming, None)) is None:
                            break
                        waiting.append((ref, pool.submit(self._pixels, ref)))
                    if waiting:
                        ref, future = waiting.popleft()
                        batch.append((ref, future.result()))
                    if batch and (len(batch) == self.batch_size or not waiting):
                        yield [ref for ref, _ in batch], torch.stack([pixels for _, pixels in batch])
                        batch = []
                    if not waiting and not batch:
                        return
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _pixels(self, ref: ImageRef) -> torch.Tensor:
        return self.preprocess(open_image(ref.path, expected_sha256=str(ref)))

    def _encode_new_texts(self, texts: Sequence[str]) -> None:
        # By length, so that a batch pads little.
        new = sorted({text for text in texts if text not in self._text_vectors}, key=len)
        for start in range(0, len(new), self.batch_size):
            batch = new[start : start + self.batch_size]
            with torch.inference_mode():
                encoded = self.encode_texts(batch)
            vectors = unit(encoded.vectors.float().cpu().numpy())
            for text, vector, truncated in zip(batch, vectors, encoded.truncated, strict=True):
                self._text_vectors[text] = Embedding(vector, truncated)
            self.texts_encoded += len(batch)

    # --- results

    def complete_card(self, weights: Path) -> None:
        """Add what the `medvlm_card.yaml` beside the weights says."""
        self.card = card_beside(weights, self.card)

    def describe(self) -> dict[str, Any]:
        """Card, weights hash, precision, prompts and scale."""
        hashes = {path.name: file_sha256(path) for path in self.weight_files}
        combined = hashlib.sha256("".join(sorted(hashes.values())).encode()).hexdigest() if hashes else None
        return {
            "card": self.card.to_dict(),
            "weights_sha256": combined if len(hashes) > 1 else next(iter(hashes.values()), None),
            "weight_files_sha256": hashes,
            "precision": "float32",
            "prompts": self.prompts,
            "probability_scale": self.card.probability_scale,
            "logit_scale": self.logit_scale,
            "device": str(self.device),
            "images_encoded": self.images_encoded,
            "texts_encoded": self.texts_encoded,
        }


def pick_device(device: str | None) -> torch.device:
    """The device asked for; lm-eval says cuda:0 when nothing was asked, which without CUDA means: choose."""
    if device in (None, "", "auto") or (str(device).startswith("cuda") and not torch.cuda.is_available()):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(str(device))
    except RuntimeError as error:
        raise UserError(f"Expected device to be cpu, cuda, cuda:N or mps, but got {device!r}.") from error


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

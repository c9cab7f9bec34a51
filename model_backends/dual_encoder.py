"""Dual encoders: one tower for images, one for texts, compared by cosine.

A subclass loads its weights and says how pixels are prepared and both towers are run; `embed` and `classify` are here,
and what images need beside (batching, decoding in worker threads, the store) in `image_vectors.py`.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from scipy.special import expit

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.class_prompts import PromptChoice, PromptList, choose_prompts
from medvlm_harness.model_backends.image_vectors import ImageVectors, Vectors, unit
from medvlm_harness.requests import Capability, Embedding, ImageRef, LabelScores, LabelSet, TextRef

__all__ = ["DualEncoder", "EncodedTexts"]

_log = logging.getLogger("lm_eval.medvlm")

Phrases = Sequence[tuple[str, ...]]  # of each label


class EncodedTexts(NamedTuple):
    """What `encode_texts` gives back."""

    vectors: torch.Tensor  # (n, d), of any length
    truncated: list[bool]  # per text: did the tokenizer cut it


class DualEncoder(ImageVectors):
    """An image tower and a text tower in one space.

    `classify` scores a label by cosines with its phrases. The embeddings of a label's positive phrases are averaged and
    renormalised, likewise its negative ones. Multilabel: margin = cos(positive) - cos(negative), probability the
    softmax of that pair on the card's scale. Multiclass: probabilities are the softmax over the options on that scale,
    the margin of an option is its log-odds, divided by the scale. So every margin is in units of a cosine.

    `prompts=task` takes the task's phrases, `prompts=published` the card's short templates. A publication that keeps a
    long list of class prompts scores them alone, with no negative phrase: with `prompts=published,prompts_file=FILE`
    (the user's copy of it) or `prompts=ours` (our wording of its structure) a multilabel margin is the cosine with a
    class's prompts, and its probability the sigmoid of it on the model's scale. A label that the list lacks is asked by
    the task's positive phrases under the same rule, with a warning, and is named in the result.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset(
        {"classify:image", "embed:image", "embed:text", "profile"}
    )
    FACTS: ClassVar[tuple[str, ...]] = (*ImageVectors.FACTS, "logit_scale")
    PROMPT_LIST: ClassVar[PromptList | None] = None  # where the publication keeps a list of class prompts
    logit_scale: float = 1.0  # multiplies cosines, where the card's probability_scale says so

    def __init__(self, *, prompts: PromptChoice = "task", prompts_file: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.class_prompts = choose_prompts(
            prompts, prompts_file, model=self.card.name, templates=self.card.prompts, listed=self.PROMPT_LIST
        )
        if self.class_prompts is not None:
            self.card = replace(self.card, probability_scale="sigmoid")
        self.prompts = prompts
        self.prompts_lacking: dict[str, list[str]] = {}  # label set -> labels that the list of prompts lacks
        self.texts_encoded = self.texts_recalled = 0
        self._text_vectors: dict[str, Embedding] = {}
        self._label_vectors: dict[str, tuple[Vectors, Vectors | None]] = {}

    # --- for subclasses, beside those for images

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """Text tower."""

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """How long the text tower takes each text to be: characters, where a subclass knows no better."""
        return [len(text) for text in texts]

    def encode_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Text tower on token ids, (n, length) -> (n, d), of any length."""
        raise UserError(f"{self.card.name} takes texts, not token ids.")

    @torch.no_grad()
    def text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The text tower's answer to token ids, not normalised: (n, length) -> (n, d).

        Args:
            input_ids: as the model's own tokenizer gives them.
            attention_mask: 1 for a token, 0 for padding; towers that tell padding from the ids do not read it.

        Raises:
            UserError: if the model does not work on token ids.
        """
        self.ensure_loaded()
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return self.encode_ids(input_ids.to(self.device), mask).float().cpu()

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
        if label_set.kind == "multiclass":
            log_odds, probability = log_odds_and_softmax(self._scale * cosine)
            return log_odds / self._scale, probability
        margin = cosine if negative is None else cosine - (images @ negative.T).astype(np.float64)
        return margin, expit(self._scale * margin)

    @property
    def _scale(self) -> float:
        return 1.0 if self.card.probability_scale == "no scale" else self.logit_scale

    def _phrases(self, label_set: LabelSet) -> tuple[Vectors, Vectors | None]:
        """Vectors of the labels' positive and negative phrases, (labels, d) each; None where there are no negatives."""
        key = str(label_set)
        if key not in self._label_vectors:
            positive, negative = self._wording(label_set)
            both = self._means([*positive, *negative])
            self._label_vectors[key] = both[: len(positive)], both[len(positive) :] if negative else None
        return self._label_vectors[key]

    def _wording(self, label_set: LabelSet) -> tuple[Phrases, Phrases]:
        """The positive and the negative phrases of each label; no negatives at all where positives are scored alone."""
        if self.class_prompts is not None:
            return self._listed(label_set), []
        labels, multilabel = label_set.labels, label_set.kind == "multilabel"
        if self.prompts == "task" or self.card.prompts is None:
            return [x.positive for x in labels], [x.negative for x in labels] if multilabel else []
        # A publication without negative templates ("this is a photo of ...") still needs the pair: the task's negative
        # phrase then goes into its positive template. Of an option only the phrase says what it is: its name is what
        # the records hold ("0").
        templates = self.card.prompts

        def filled(pattern: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
            return tuple(template.format(word) for template in pattern for word in words)

        if not multilabel:
            return [filled(templates.positive, x.positive) for x in labels], []
        return [filled(templates.positive, [x.name]) for x in labels], [
            filled(templates.negative, [x.name]) or filled(templates.positive, x.negative) for x in labels
        ]

    def _listed(self, label_set: LabelSet) -> Phrases:
        listed = [() if self.class_prompts is None else self.class_prompts.of(label) for label in label_set.labels]
        lacking = [label.name for label, phrases in zip(label_set.labels, listed, strict=True) if not phrases]
        if lacking:
            self.prompts_lacking[label_set.name] = lacking
            _log.warning(
                "the list of class prompts lacks %s of %s: the task's positive phrases are taken for them",
                ", ".join(lacking),
                label_set.name,
            )
        return [phrases or label.positive for label, phrases in zip(label_set.labels, listed, strict=True)]

    def _means(self, phrases: Phrases) -> Vectors:
        """One vector for the phrases of each label: the mean of their unit vectors, scaled to length 1 again."""
        self._encode_new_texts([text for texts in phrases for text in texts])
        return unit(np.stack([np.mean([self._text_vectors[t].vector for t in texts], axis=0) for texts in phrases]))

    # --- what a run would cost

    def missing(self, images: Iterable[ImageRef], texts: Iterable[str]) -> tuple[list[ImageRef], list[str]]:
        """Of these, what would have to be computed: it is neither stored nor encoded already."""
        new = {str(TextRef(text)): text for text in texts if text not in self._text_vectors}
        return super().missing(images, ())[0], list(self._not_stored("embed:text", new).values())

    def seconds_per_item(self, images: Sequence[ImageRef], texts: Sequence[str]) -> tuple[float | None, float | None]:
        """Time of one image and of one text; of the texts every n-th by length is taken."""
        by_length = self._by_length(texts)
        size = self.batching.of(self.device)
        sample = by_length[:: max(1, len(by_length) // size)][:size]
        of_image, _ = super().seconds_per_item(images, ())
        return of_image, self._seconds(lambda: self._encode_slot(sample, self.encode_texts), sample)

    # --- encoding

    def _encode_new_texts(self, texts: Sequence[str]) -> None:
        new = [text for text in texts if text not in self._text_vectors]
        self._text_vectors.update(self._vectors_of(new, self.encode_texts))

    def _vectors_of(
        self, texts: Sequence[str], encode: Callable[[list[str]], EncodedTexts], *, prompt: str = ""
    ) -> dict[str, Embedding]:
        """Vectors of texts, stored or encoded now.

        Args:
            texts: in any order, also repeated.
            encode: the text tower.
            prompt: what beside a text decides its vector, where something does.
        """
        new = {str(TextRef(text)): text for text in texts}
        if not new:
            return {}
        space = self.space("embed:text", prompt=prompt)
        stored = self.recall(space, new, Embedding.from_bytes)
        vectors = {new[key]: embedding for key, embedding in stored.items()}
        self.texts_recalled += len(stored)
        missing = self._by_length([text for key, text in new.items() if key not in stored])
        size = self.batching.of(self.device)
        with self._progress("texts", len(missing), size) as progress:
            for slot in slots(missing, size):
                with self.meter.stage("encode_texts", len(slot)):
                    encoded = self._encode_slot(slot, encode)
                self.keep(space, {str(TextRef(text)): embedding.to_bytes() for text, embedding in encoded.items()})
                vectors.update(encoded)
                self.texts_encoded += len(slot)
                progress.update(len(slot))
        return vectors

    def _by_length(self, texts: Sequence[str]) -> list[str]:
        """So that a batch pads little; texts of one length in a fixed order, so that slots are fixed."""
        if texts:
            self.ensure_loaded()
        return [text for _, text in sorted(zip(self.text_lengths(texts), texts, strict=True))]

    def _encode_slot(self, texts: Sequence[str], encode: Callable[[list[str]], EncodedTexts]) -> dict[str, Embedding]:
        def forward(part: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
            with torch.inference_mode():
                encoded = encode(list(part))
            return encoded.vectors.float().cpu(), encoded.truncated

        parts = self.batching.in_parts(texts, forward)
        vectors = unit(torch.cat([vectors for vectors, _ in parts]).numpy())
        truncated = [cut for _, flags in parts for cut in flags]
        return {text: Embedding(vector, cut) for text, vector, cut in zip(texts, vectors, truncated, strict=True)}

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds prompts, scale, and how much was computed and how much came from the store."""
        return {
            **super().describe(),
            "prompts": self.prompts,
            "prompts_sha256": None if self.class_prompts is None else self.class_prompts.sha256,
            "prompts_lacking": self.prompts_lacking,
            "probability_scale": self.card.probability_scale,
            "logit_scale": self.logit_scale,
            "texts_encoded": self.texts_encoded,
            "texts_recalled": self.texts_recalled,
        }


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

"""`embed` of texts by any model of transformers: each distinct one is encoded once, in slots, or recalled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from lm_eval.api.instance import Instance
from tqdm import tqdm

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.image_vectors import unit
from medvlm_harness.model_backends.transformers_backend import TransformersBackend
from medvlm_harness.requests import Embedding, ImageRef, TextRef

__all__ = ["EmbeddedTexts", "text_of"]


class EmbeddedTexts(TransformersBackend):
    """Unit vectors of texts; a subclass says what a text's tokens are, and what a batch's vectors."""

    REMEMBERED: ClassVar[tuple[str, ...]] = ("_vectors",)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.texts_encoded = self.texts_recalled = 0
        self._vectors: dict[str, Embedding] = {}

    # --- for subclasses

    @abstractmethod
    def text_ids(self, text: str) -> list[int]:
        """The tokens of a whole text, none cut."""

    @property
    @abstractmethod
    def text_room(self) -> int:
        """How many of them the model takes."""

    @abstractmethod
    def encode_text_ids(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Vectors of texts by their tokens, those that do not fit left out: (n, d) in float32 on the CPU."""

    def tokens_read(self, texts: Iterable[Sequence[int]]) -> int:
        """Tokens of these texts that the model reads, padding left out."""
        return sum(min(len(ids), self.text_room) for ids in texts)

    # --- requests

    def embed(self, requests: Sequence[Instance]) -> list[Embedding]:
        """One unit vector per request; each distinct text is encoded once in the life of the model."""
        texts = [text_of(request.arguments[0], self.card.name) for request in requests]
        self.encode_new(texts)
        return [self._vectors[text] for text in texts]

    def encode_new(self, texts: Sequence[str]) -> None:
        """Have the vectors of these texts, stored or encoded now."""
        new = {str(TextRef(text)): text for text in texts if text not in self._vectors}
        space = self.space("embed:text")
        stored = self.recall(space, new, Embedding.from_bytes)
        self._vectors.update({new[key]: vector for key, vector in stored.items()})
        self.texts_recalled += len(stored)
        missing = [text for key, text in new.items() if key not in stored]
        if not missing:
            return
        self.ensure_loaded()
        ids = {text: self.text_ids(text) for text in missing}
        order = sorted(missing, key=lambda text: (-len(ids[text]), text))
        size = self.batching.of(self._device, lambda n: self.encode_text_ids([ids[order[0]]] * n))
        hidden = len(order) <= size or self.rank > 0
        with tqdm(total=len(order), desc="Encoding texts", disable=hidden, mininterval=1) as progress:
            for slot in slots(order, size):
                with self.meter.stage("encode_texts", len(slot), self.tokens_read(ids[text] for text in slot)):
                    parts = self.batching.in_parts(
                        slot, lambda part: self.encode_text_ids([ids[text] for text in part])
                    )
                vectors = unit(torch.cat(parts).numpy())
                found = {t: Embedding(v, len(ids[t]) > self.text_room) for t, v in zip(slot, vectors, strict=True)}
                self.keep(space, {str(TextRef(text)): vector.to_bytes() for text, vector in found.items()})
                self._vectors.update(found)
                self.texts_encoded += len(slot)
                progress.update(len(slot))

    @property
    def network(self) -> Any:
        """The loaded model without PEFT's wrapper, whose layers an adapter has replaced."""
        model: Any = self.model
        return model if self.adapter is None else model.get_base_model()

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds how many texts were computed, and how many came from the store."""
        return {**super().describe(), "texts_encoded": self.texts_encoded, "texts_recalled": self.texts_recalled}


def text_of(argument: Any, name: str) -> str:
    """The text of a request's argument.

    Raises:
        UserError: if it is an image.
    """
    if isinstance(argument, ImageRef):
        raise UserError(f"{name} takes text alone, but was given an image.")
    return str(getattr(argument, "text", argument))

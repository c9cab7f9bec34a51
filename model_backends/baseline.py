"""`medvlm-baseline`: floors and ceilings as ordinary models, so that every number has them beside it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from lm_eval.api.instance import Instance

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.nearest_image import image_encoder, nearest_texts
from medvlm_harness.requests import Capability, Embedding, Generation, ImageRef, LabelScores, LabelSet, floors_of

__all__ = ["BaselineBackend"]

SCORING = ("prior", "random", "oracle")
WRITING = ("constant", "template", "lead", "copy", "tfidf", "neighbour")
KINDS = (*SCORING, *WRITING)
DIMENSION = 256


class BaselineBackend(MedicalLM):
    """A model without weights.

    `kind=prior` answers the train split's prevalence and one vector for everything; `random` answers noise that depends
    on nothing but the input and the seed; `oracle` reads the truth from the document, if it is asked about its image.

    `constant` writes one text for everything (`text=`, else the task's most frequent one), `template` a fixed normal
    report, `lead` the beginning of what is to be summarised, `copy` all of it, `tfidf` what belongs to the nearest text
    of the train split. The task hands these texts over: beside its prompt (`PromptWithFloors`), or in its documents
    under `floors`; stop strings and lengths do not apply to them.

    `neighbour` writes what belongs to the nearest image of the train split, by the image vectors of the model that
    `encoder=` names; `encoder_args=` has its options, as a mapping or as `key=value` with ; between them. Of several
    images of a study the nearest pair decides. What the encoder was trained on counts as the floor's own.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset(
        {"classify:image", "classify:text", "embed:image", "embed:text", "generate_until"}
    )
    card: ModelCard = backend_card("medvlm-baseline")

    def __init__(
        self,
        *,
        kind: Literal[
            "prior", "random", "oracle", "constant", "template", "lead", "copy", "tfidf", "neighbour"
        ] = "prior",
        seed: int = 0,
        text: str | None = None,
        encoder: str | None = None,
        encoder_args: str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if kind not in KINDS:
            raise UserError(f"Unknown kind {kind!r} of medvlm-baseline.{near_matches(str(kind), KINDS)}")
        if text is not None and kind != "constant":
            raise UserError(f"Expected text= with kind=constant alone, but got it with kind={kind}.")
        self.kind, self.seed, self.text = kind, seed, None if text is None else str(text)
        if (kind == "neighbour") != (encoder is not None) or (encoder is None and encoder_args is not None):
            raise UserError(
                "Expected encoder=NAME (and encoder_args=...) with kind=neighbour and with no other kind, "
                f"but got kind={kind}, encoder={encoder}, encoder_args={encoder_args}."
            )
        self.encoder = None if encoder is None else image_encoder(encoder, encoder_args or {})
        if self.encoder is not None:
            # Whatever the encoder was trained on decides which report is found.
            self.card = replace(self.card, trained_on=self.encoder.card.trained_on)
        self.floor = kind if kind in WRITING and text is None else None
        if kind in WRITING:
            others = sorted(self.CAPABILITIES - {"generate_until"})
            self.lacks = dict.fromkeys(others, f"kind={kind} writes texts; use kind={', '.join(SCORING)}")
        else:
            self.lacks = {"generate_until": f"kind={kind} writes nothing; use kind={', '.join(WRITING)}"}

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        """Prevalence, noise, or the document's own answer."""
        return [self._scores(request) for request in requests]

    def embed(self, requests: Sequence[Instance]) -> list[Embedding]:
        """One vector for all, a vector per input, or that of the texts that the input belongs to."""
        return [self._embedding(request) for request in requests]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What the task hands over for this kind, or the constant text.

        Raises:
            UserError: if a task hands over no such text.
        """
        if self.kind not in WRITING:
            raise UserError(f"medvlm-baseline cannot answer `generate_until` requests: {self.lacks['generate_until']}.")
        if self.encoder is not None:
            return [Generation(text, finished=True) for text in nearest_texts(self.encoder, requests)]
        return [Generation(self._written(request), finished=True) for request in requests]

    def _written(self, request: Instance) -> str:
        if self.text is not None:
            return self.text
        floors = floors_of(request.arguments[0], request.doc)
        if self.kind not in floors:
            way = "add text=..., or use" if self.kind == "constant" else "use"
            raise UserError(
                f"Task {request.task_name} hands over no text for kind={self.kind} (it has "
                f"{', '.join(floors) or 'none'}): {way} another task."
            )
        return floors[self.kind]

    def _scores(self, request: Instance) -> LabelScores:
        argument, label_set = request.arguments[:2]
        if self.kind == "random":
            probability = self._noise(f"{argument}{label_set}").random(len(label_set.labels))
        elif self.kind == "oracle":
            # Of an image that is not the document's own, such as another patient's, it knows nothing.
            own = request.doc.get("image")
            seen = not isinstance(argument, ImageRef) or own in (None, argument.file_sha256)
            target = [float(value) if seen and value is not None else 0.5 for value in request.doc["target"]]
            probability = np.clip(target, 1e-6, 1 - 1e-6)
        else:
            known = [0.5 if value is None else value for value in _prior(label_set)]
            probability = np.clip(known, 1e-6, 1 - 1e-6)
        if label_set.kind == "multiclass":
            probability = probability / probability.sum()
        margin = np.log(probability) - np.log1p(-probability)
        return LabelScores(tuple(margin.tolist()), tuple(probability.tolist()))

    def _embedding(self, request: Instance) -> Embedding:
        argument = request.arguments[0]
        is_image = isinstance(argument, ImageRef)
        parts = {str(argument): 1.0}
        if self.kind == "prior":
            parts = {"": 1.0}
        elif self.kind == "oracle":
            parts = _belongs_to(argument, request.doc) or parts
        vectors = [weight * self._noise(key).standard_normal(DIMENSION) for key, weight in parts.items()]
        vector = np.sum(vectors, axis=0).astype(np.float32)
        return Embedding(vector / np.linalg.norm(vector), None if is_image else False)

    def _noise(self, key: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))

    def describe(self) -> dict[str, Any]:
        """Card, kind and seed; there are no weights to hash."""
        return {
            "card": self.card.to_dict(),
            "weights_sha256": None if self.encoder is None else self.encoder.weights_sha256,
            "encoder": None if self.encoder is None else self.encoder.describe(),
            "kind": self.kind,
            "seed": self.seed,
            "text": self.text,
            "probability_scale": self.card.probability_scale,
        }


def _belongs_to(argument: str, doc: Mapping[str, Any]) -> dict[str, float]:
    """What a document says that an input belongs to: texts by their hashes, each with a weight; empty where nothing.

    Of an image that is searched with these are its study's texts; the report twice, since another study's may be one of
    the parts.
    """
    if "counterparts" in doc:
        own = doc["image"] if isinstance(argument, ImageRef) else doc["texts"]["findings"]
        return dict(doc["counterparts"]) if getattr(argument, "file_sha256", str(argument)) == own else {}
    if isinstance(argument, ImageRef):
        weights = Counter([doc["texts"]["report"], *doc["texts"].values()])
        return {key: float(weight) for key, weight in weights.items()}
    return {}


def _prior(label_set: LabelSet) -> Sequence[float | None]:
    return label_set.prior or (None,) * len(label_set.labels)

"""Heads trained for named labels: what a label set may ask of them, and how logits become scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from scipy.special import expit

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.requests import Capability, ImageRef, Label, LabelScores, LabelSet

__all__ = ["LabelHeadBackend", "Logits"]

Logits = NDArray[np.float32]


class LabelHeadBackend(TorchBackend):
    """Scores the labels that it was trained for: margin = logit, probability = its sigmoid.

    It was trained over what other models' layers give as they are, so that it takes no quantization= and no peft= of
    its own.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset({"classify:image", "profile"})
    REMEMBERED: ClassVar[tuple[str, ...]] = ("_logits",)

    def __init__(self, *, quantization: str | None = None, peft: str | None = None, **options: Any) -> None:
        if quantization not in (None, "", "none") or peft:
            raise UserError(
                f"{type(self).card.name} takes no quantization= and no peft=: it was trained over what its experts' "
                "layers give as they are."
            )
        super().__init__(**options)
        self.images_encoded = self.images_recalled = 0
        self._logits: dict[str, Logits] = {}

    # --- for subclasses

    @property
    @abstractmethod
    def labels(self) -> Sequence[str]:
        """Those that it was trained for, in the order of its logits."""

    @abstractmethod
    def compute(self, images: Sequence[ImageRef]) -> None:
        """Put the logits of images that are neither known nor stored into `keep_logits`."""

    # --- requests

    def refuses(self, label_set: LabelSet) -> str | None:
        """Exclusive options, and labels that it was not trained for."""
        if label_set.kind == "multiclass":
            return "it was trained for independent labels, not for options that exclude each other"
        untrained = [label.name for label in label_set.labels if label.key not in self._columns]
        if untrained:
            return f"it was not trained for {', '.join(untrained)} (but for {', '.join(self.labels)})"
        return None

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        """Logit and probability of each image for the labels of its set.

        Raises:
            UserError: for a set with labels that it was not trained for.
        """
        columns: dict[str, list[int]] = {}
        for request in requests:
            label_set: LabelSet = request.arguments[1]
            if str(label_set) in columns:
                continue
            if reason := self.refuses(label_set):
                raise UserError(f"{self.card.name} cannot score {label_set.name}: {reason}.")
            columns[str(label_set)] = [self._columns[label.key] for label in label_set.labels]
        self._score([request.arguments[0] for request in requests])
        responses = []
        for request in requests:
            margin = self._logits[request.arguments[0]][columns[str(request.arguments[1])]].astype(np.float64)
            responses.append(LabelScores(tuple(margin.tolist()), tuple(expit(margin).tolist())))
        return responses

    @cached_property
    def _columns(self) -> dict[str, int]:
        """Label key -> its place in the head."""
        return {Label(name, ()).key: place for place, name in enumerate(self.labels)}

    def _score(self, images: Sequence[ImageRef]) -> None:
        new = {str(image): image for image in images if image not in self._logits}
        if not new:
            return
        stored = self.recall(
            self.space("classify"), new, lambda value: np.frombuffer(value, dtype="<f4").astype(np.float32)
        )
        self._logits.update(stored)
        self.images_recalled += len(stored)
        missing = [image for key, image in new.items() if key not in stored]
        if missing:
            self.ensure_loaded()
            self.compute(missing)

    def keep_logits(self, refs: Sequence[ImageRef], logits: Logits) -> None:
        """Of these images, (n, labels)."""
        found = dict(zip(map(str, refs), logits, strict=True))
        self.keep(self.space("classify"), {key: value.astype("<f4").tobytes() for key, value in found.items()})
        self._logits.update(found)
        self.images_encoded += len(refs)

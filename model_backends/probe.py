"""`medvlm-probe`: a linear layer on vectors of a frozen image encoder, by `medvlm finetune --method linear-probe`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import LOAD_ERRORS, Checkpoint
from medvlm_harness.model_backends.frozen_encoder import recorded_base
from medvlm_harness.model_backends.identity import check_weights
from medvlm_harness.model_backends.image_vectors import ImageVectors
from medvlm_harness.model_backends.label_head import LabelHeadBackend
from medvlm_harness.model_backends.open_clip_towers import load_exactly
from medvlm_harness.requests import ImageRef

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "Probe", "ProbeBackend", "vectors_of"]

CONFIG_FILE, WEIGHTS_FILE = "probe.json", "probe.safetensors"
HOW_TO_TRAIN = "train one: medvlm finetune --method linear-probe (docs/finetune.md)"


class Probe(torch.nn.Module):
    """Logits of labels from vectors that are first brought to zero mean and unit spread.

    Args:
        width: of the vectors.
        labels: how many.
    """

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.linear = torch.nn.Linear(width, labels)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n, labels)."""
        logits: torch.Tensor = self.linear((vectors - self.mean) / self.spread)
        return logits


def vectors_of(encoder: ImageVectors, images: Sequence[ImageRef]) -> torch.Tensor:
    """Unit vectors, (n, width)."""
    found = encoder.embed([Instance("embed", {}, (image,), k) for k, image in enumerate(images)])
    return torch.stack([torch.from_numpy(one.vector) for one in found])


class ProbeBackend(LabelHeadBackend):
    """The linear layer over its encoder; see `LabelHeadBackend`.

    The encoder is looked for where it lay in training; `encoder_pretrained=PATH` says where it lies now.
    """

    card: ModelCard = backend_card("medvlm-probe")

    def __init__(self, *, encoder_pretrained: str | None = None, **options: Any) -> None:
        self._moved = encoder_pretrained
        super().__init__(**options)

    def locate(self) -> Checkpoint:
        """The trained weights, and what `probe.json` says of them."""
        folder = Path(self.pretrained).expanduser()
        if not all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
            raise UserError(f"Expected {folder} to hold {CONFIG_FILE} and {WEIGHTS_FILE}: {HOW_TO_TRAIN}.")
        try:
            recipe = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            self._record, self._labels = recipe["encoder"], tuple(map(str, recipe["labels"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / CONFIG_FILE} is damaged: {error!r}.") from error
        return Checkpoint((folder / WEIGHTS_FILE,))

    @property
    def labels(self) -> Sequence[str]:
        """Those that it was trained for."""
        return self._labels

    @cached_property
    def encoder(self) -> ImageVectors:
        """The encoder that it was trained over, and no other.

        Raises:
            UserError: if it is not there, or has other weights.
        """
        found = recorded_base(
            self._record,
            pretrained=self._moved,
            device=str(self.device),
            kind=ImageVectors,
            what="the encoder to be one of images",
        )
        check_weights("The encoder", self._record["weights"], found.weights, option="encoder_pretrained")
        return found

    def preprocessing(self) -> Mapping[str, Any]:
        """The encoder, whole: it decides every answer."""
        return {"labels": list(self.labels), "encoder": self.encoder.identity}

    def load(self) -> None:
        """The encoder, and the layer over it."""
        (path,) = self.checkpoint.weights
        try:
            state = load_file(path)
            labels, width = state["linear.weight"].shape
        except (*LOAD_ERRORS, KeyError) as error:
            raise UserError(f"{path} cannot be read as weights: {error}") from error
        self.model = self.probe = Probe(width, labels)
        load_exactly(self.probe, state, str(path), CONFIG_FILE)
        self.encoder.learn()
        self.parameters = sum(one.numel() for one in self.probe.parameters()) + (self.encoder.parameters or 0)
        self.transform = self.encoder.transform or self.encoder.card.preprocessing

    def compute(self, images: Sequence[ImageRef]) -> None:
        """All at once: the encoder has its own batches."""
        with torch.inference_mode():
            vectors = vectors_of(self.encoder, images).to(self.device, self.dtype)
            self.keep_logits(images, self.probe(vectors).float().cpu().numpy())

    def describe(self) -> dict[str, Any]:
        """Adds the encoder and the labels."""
        encoder = {"name": self.encoder.card.name, "weights_sha256": self.encoder.weights_sha256}
        return {
            **super().describe(),
            "probability_scale": self.card.probability_scale,
            "encoder": {**encoder, "trained_on": self.encoder.card.trained_on},
            "labels": list(self.labels),
            "images_encoded": self.images_encoded,
            "images_recalled": self.images_recalled,
        }

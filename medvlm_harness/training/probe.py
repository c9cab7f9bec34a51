"""Method `linear-probe`: a linear layer on the vectors of a frozen image encoder, learnt from images with labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch.nn import functional

from medvlm_harness.data.records import Views
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.frozen_encoder import base_backend, encoder_record
from medvlm_harness.model_backends.image_vectors import ImageVectors
from medvlm_harness.model_backends.probe import CONFIG_FILE, WEIGHTS_FILE, Probe, vectors_of
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.labelled_images import LabelledImages, label_source_of, labelled_images, learnable
from medvlm_harness.training.loop import Trainable, fit
from medvlm_harness.training.methods import BaseModel, Method, Trained

__all__ = ["LinearProbeMethod"]


@dataclass(frozen=True, kw_only=True)
class LinearProbeMethod(Method):
    """Binary cross-entropy of each label that is known; vectors are computed once.

    Labels mean what they mean in an evaluation: uncertain and unknown ones are left out of the loss.
    """

    NAME: ClassVar[str] = "linear-probe"
    EVALUATED_BY: ClassVar[str] = "medvlm-probe"

    label_source: str | None = None  # of the prepared ones; by default the first in the order that tasks take them in
    views: Views = "frontal"
    learning_rate: float = 0.01
    weight_decay: float = 0.1

    def train(self, data: TrainingData, output: Path) -> Trained:
        """See `Method.train`."""
        source = label_source_of(data, self.label_source)
        labels = learnable(data, source)
        train, validation = (
            labelled_images(data, studies, source, labels, self.views) for studies in (data.train, data.validation)
        )
        if not (train.images and validation.images):
            raise UserError(f"{data.name} has no {self.views} image with {source} labels in train or in validation.")
        encoder: ImageVectors = base_backend(
            self.model, self.model_args, kind=ImageVectors, what="an encoder of images", device=self.device
        )
        training = _ProbeTraining(encoder, train, validation)
        fitted = fit(training, self.schedule, output, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        state = training.module.state_dict()
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, output / WEIGHTS_FILE)
        recipe = {
            "encoder": encoder_record(encoder, self.model, self.model_args),
            "labels": list(labels),
            "label_source": source,
            "views": self.views,
        }
        (output / CONFIG_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        return Trained(
            **asdict(fitted),
            parameters=sum(one.numel() for one in training.module.parameters()),
            base_models={"encoder": BaseModel.of(encoder)},
        )


class _ProbeTraining(Trainable):
    """The layer on vectors that are known."""

    def __init__(self, encoder: ImageVectors, train: LabelledImages, validation: LabelledImages) -> None:
        sides = [(vectors_of(encoder, one.images), torch.from_numpy(one.targets)) for one in (train, validation)]
        (vectors, targets), _ = sides
        probe = Probe(vectors.shape[1], targets.shape[1])
        probe.mean.copy_(vectors.mean(dim=0))
        probe.spread.copy_(vectors.std(dim=0).clamp(min=1e-6))
        self.module = probe.to(encoder.device)
        self.sides = [tuple(part.to(encoder.device) for part in side) for side in sides]
        self.lengths = [1] * len(vectors)

    def loss(self, items: Sequence[int]) -> torch.Tensor:
        """Mean over the known labels of these images."""
        vectors, targets = self.sides[0]
        return self._loss(vectors[list(items)], targets[list(items)])

    def validation_loss(self) -> float:
        """Mean over the known labels of all validation images."""
        vectors, targets = self.sides[1]
        return float(self._loss(vectors, targets))

    def _loss(self, vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        known = ~targets.isnan()
        return functional.binary_cross_entropy_with_logits(self.module(vectors)[known], targets[known])

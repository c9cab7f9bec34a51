"""Method `medbridge`: train MedBridge's adapter over frozen dual encoders, on images with labels.

What is learnt are queries, attention across views, routing and head (model_backends/medbridge_adapter.py); loss,
optimiser and every number here are our choices. Labels mean what they mean in an evaluation (data/labels.py): uncertain
and unknown ones are left out of the loss by a mask, unmentioned ones of a source that covers them are negative. The
positives of a label weigh as much as its negatives together, each up to `MAX_WEIGHT` times as much; the head's bias is
corrected for it afterwards, so that probabilities stay those of the train split.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from medvlm_harness.data.images import open_reference
from medvlm_harness.data.records import Views
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.dual_encoder import DualEncoder
from medvlm_harness.model_backends.frozen_encoder import encoder_record, frozen_encoder
from medvlm_harness.model_backends.medbridge import WEIGHTS_FILE, Expert, MedBridgeSettings, view_pixels
from medvlm_harness.model_backends.medbridge_adapter import (
    AdapterConfig,
    MedBridge,
    Window,
    injection_of,
    sliding_windows,
)
from medvlm_harness.model_backends.tower_tokens import token_tower
from medvlm_harness.requests import ImageRef
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.labelled_images import LabelledImages, Targets, label_source_of, labelled_images, learnable
from medvlm_harness.training.loop import Trainable, fit
from medvlm_harness.training.methods import BaseModel, Method, Trained

__all__ = [
    "MAX_WEIGHT",
    "MedBridgeMethod",
    "loss_of",
    "positive_weights",
    "shift_bias",
]

_log = logging.getLogger("lm_eval.medvlm")

MAX_WEIGHT = 20.0
AT_ONCE = 16  # images whose views go through the towers together, where no gradient is needed


def positive_weights(targets: Targets) -> Targets:
    """How much a positive of each label weighs, (labels,): its negatives per positive, in [1, MAX_WEIGHT]."""
    positives = np.nansum(targets, axis=0)
    negatives = (~np.isnan(targets)).sum(axis=0) - positives
    weights: Targets = np.clip(negatives / np.maximum(positives, 1), 1, MAX_WEIGHT).astype(np.float32)
    return weights


@torch.no_grad()
def shift_bias(module: MedBridge, weights: Targets) -> None:
    """Take out what weighing positives w-fold put in: a weighted loss is least at log-odds that are log w too high."""
    module.head.bias.sub_(torch.from_numpy(weights).log().to(module.head.bias))


def loss_of(module: MedBridge, stems: Sequence[Tensor], targets: Targets, weights: Tensor) -> Tensor:
    """Binary cross-entropy with weighed positives, the mean over the labels that are known.

    Args:
        module: asked for logits (n, labels).
        stems: what it takes.
        targets: 1, 0 or NaN, (n, labels).
        weights: of positives, (labels,).
    """
    y = torch.from_numpy(targets).to(weights.device)
    known = ~y.isnan()
    loss = functional.binary_cross_entropy_with_logits(
        module(stems), y.nan_to_num(), known.float(), pos_weight=weights, reduction="sum"
    )
    return loss / known.sum()


@dataclass(frozen=True, kw_only=True)
class MedBridgeMethod(Method):
    """MedBridge over one or more dual encoders; see `AdapterConfig` for the sizes."""

    NAME: ClassVar[str] = "medbridge"
    EVALUATED_BY: ClassVar[str] = "medbridge"
    PATHS: ClassVar[frozenset[str]] = frozenset({"more_experts"})

    more_experts: str = ""  # beside the encoder: NAME:key=value,key=value|NAME:...
    label_source: str | None = None  # of the prepared ones; by default the first in the order that tasks take them in
    views: Views = "frontal"
    crops: Literal["sliding", "random"] = "sliding"  # random: drawn anew for each step, at that step's cost
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    memory: float = 2.0  # GiB for what the frozen towers give, which is computed once where it fits
    grid: int = AdapterConfig.grid
    crop: float = AdapterConfig.crop
    queries: int = AdapterConfig.queries
    split: float = AdapterConfig.split
    width: int = AdapterConfig.width
    heads: int = AdapterConfig.heads
    dropout: float = AdapterConfig.dropout

    def train(self, data: TrainingData, output: Path) -> Trained:
        """Train on the train split, keep the weights with the least validation loss, and write them."""
        config = AdapterConfig(**{one.name: getattr(self, one.name) for one in fields(AdapterConfig)})
        source = label_source_of(data, self.label_source)
        labels = learnable(data, source)
        train = labelled_images(data, data.train, source, labels, self.views)
        validation = labelled_images(data, data.validation, source, labels, self.views)
        if not (train.images and validation.images):
            raise UserError(f"{data.name} has no {self.views} image with {source} labels in train or in validation.")
        asked = [(self.model, self.model_args), *_named(self.more_experts)]
        encoders = [frozen_encoder(name, args, device=self.device) for name, args in asked]
        for encoder in encoders:
            if encoder.precision != "fp32":
                raise UserError(
                    f"Expected experts in fp32 for training, but {encoder.card.name} is {encoder.precision}."
                )
            encoder.ensure_loaded()
            if encoder.model is not None:
                encoder.model.requires_grad_(False)
        weights = positive_weights(train.targets)
        with torch.random.fork_rng():
            torch.manual_seed(self.schedule.seed)
            module = _build(encoders, len(labels), config, train.images[0])
        learning = _Learning(module, encoders, train, validation, weights, self.crops, self.memory)
        fitted = fit(learning, self.schedule, output, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        shift_bias(module, weights)
        experts = tuple(
            Expert(encoder_record(encoder, name, args), injection_of(expert.tower), expert.d)
            for encoder, (name, args), expert in zip(encoders, asked, module.adapters, strict=True)
        )
        MedBridgeSettings(experts, config, labels, source, self.views).save(output)
        state = module.state_dict()
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, output / WEIGHTS_FILE)
        return Trained(
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            base_models={f"expert {k}": BaseModel.of(encoder) for k, encoder in enumerate(encoders)},
            **asdict(fitted),
        )


class _Learning(Trainable):
    """The loss of an adapter on images, with what the frozen towers give kept where it fits."""

    def __init__(
        self,
        module: MedBridge,
        encoders: Sequence[DualEncoder],
        train: LabelledImages,
        validation: LabelledImages,
        weights: Targets,
        crops: Literal["sliding", "random"],
        memory: float,
    ) -> None:
        self.module = self.adapter = module
        self.encoders, self.train, self.validation = encoders, train, validation
        self.device, self.random = encoders[0].device, crops == "random"
        module.to(self.device)
        self.weights = torch.from_numpy(weights).to(self.device)
        self.lengths = [1] * len(train.images)
        self.sliding = sliding_windows(module.config.grid)
        self.kept: dict[ImageRef, list[Tensor]] = {}
        images = [*validation.images, *(() if self.random else train.images)]
        each = sum(one.nbytes for one in self.stems(images[:1]))
        if each * len(images) <= memory * 2**30:
            self.keep(images)
        else:
            _log.info("what the towers give is %.1f GiB: computed in each step", each * len(images) / 2**30)

    def keep(self, images: Sequence[ImageRef]) -> None:
        """Run the towers over all images once."""
        new = list(dict.fromkeys(images))
        with tqdm(total=len(new), desc="Frozen towers", unit="image", mininterval=1) as progress:
            for start in range(0, len(new), AT_ONCE):
                part = new[start : start + AT_ONCE]
                stems = self.stems(part)
                self.kept |= {image: [one[k] for one in stems] for k, image in enumerate(part)}
                progress.update(len(part))

    def stems(self, images: Sequence[ImageRef], *, random: bool = False) -> list[Tensor]:
        """What comes before the queries, per expert (n, views, tokens, d)."""
        if not random and images[0] in self.kept:
            return [torch.stack(rows) for rows in zip(*(self.kept[image] for image in images), strict=True)]
        pixels: list[list[Tensor]] = [[] for _ in self.encoders]
        for ref in images:
            image = open_reference(ref)
            windows = self.drawn() if random else self.sliding
            for encoder, rows in zip(self.encoders, pixels, strict=True):
                rows.append(view_pixels(encoder, image, windows, self.adapter.config.crop))
        return self.adapter.stems(
            [
                torch.stack(rows).to(self.device, encoder.dtype)
                for encoder, rows in zip(self.encoders, pixels, strict=True)
            ]
        )

    def drawn(self) -> list[Window]:
        """Windows anywhere in an image, as many as on the grid; from torch's numbers, which the loop seeds."""
        return [(x, y) for x, y in torch.rand(len(self.sliding), 2).tolist()]

    def loss(self, items: Sequence[int]) -> Tensor:
        """Mean over the known labels of these training images."""
        images = [self.train.images[k] for k in items]
        stems = self.stems(images, random=self.random)
        return loss_of(self.adapter, stems, self.train.targets[list(items)], self.weights)

    def validation_loss(self) -> float:
        """Mean over the known labels of all validation images."""
        total, known = 0.0, 0
        for start in range(0, len(self.validation.images), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            targets = self.validation.targets[part]
            count = int((~np.isnan(targets)).sum())
            stems = self.stems(self.validation.images[part])
            total += count * float(loss_of(self.adapter, stems, targets, self.weights))
            known += count
        return total / known


def _named(more_experts: str) -> list[tuple[str, str]]:
    """`NAME:args|NAME:args` as pairs."""
    pairs = [part.partition(":") for part in more_experts.split("|") if part.strip()]
    return [(name.strip(), args) for name, _, args in pairs]


def _build(encoders: Sequence[DualEncoder], labels: int, config: AdapterConfig, image: ImageRef) -> MedBridge:
    """An adapter with fresh weights; the width of each tower's tokens is what it gives for one image."""
    towers = [token_tower(encoder) for encoder in encoders]
    picture = open_reference(image)
    widths = []
    for encoder, tower in zip(encoders, towers, strict=True):
        with torch.no_grad():
            pixels = encoder.preprocess(picture)[None].to(encoder.device)
            widths.append(tower.embed(pixels).shape[-1])
    return MedBridge(towers, widths, labels, config)

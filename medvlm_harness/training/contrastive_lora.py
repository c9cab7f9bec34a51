"""Method `contrastive-lora`: LoRA in both towers of a dual encoder, learnt from images and their reports."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medvlm_harness.data.images import open_reference
from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.retrieval import rank_queries, recall_at, reciprocal_rank
from medvlm_harness.model_backends.dual_encoder import DualEncoder
from medvlm_harness.requests import ImageRef
from medvlm_harness.tracks.retrieval import study_texts
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.loop import fit
from medvlm_harness.training.lora import (
    LoraMethod,
    LoraTrainable,
    after_and_before,
    chosen,
    put_lora,
    reached,
    write_adapter,
)
from medvlm_harness.training.methods import BaseModel, Trained

__all__ = ["ContrastiveLoraMethod", "contrastive_loss"]

_log = logging.getLogger("lm_eval.medvlm")

METRICS = ("i2t_recall@10", "t2i_recall@10", "i2t_mrr", "t2i_mrr")
Values = NDArray[np.float64]


def contrastive_loss(images: Tensor, texts: Tensor, same: Tensor, scale: float) -> Tensor:
    """Cross-entropy of each image's report among the batch's, and of each report's image, averaged.

    Studies whose reports are word for word the same, as those of normal images often are, share their positives
    equally: none of these reports is wrong for the image of another.

    Args:
        images: of unit length, (n, d).
        texts: likewise, row by row of the same studies.
        same: whether two studies have the same report, (n, n).
        scale: what cosines are multiplied by.

    Source: Radford et al. 2021, arXiv 2103.00020, figure 3; several positives: Yang et al. 2022, arXiv 2204.03610.
    """
    logits = scale * images @ texts.T
    target = same / same.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


class _Pair(NamedTuple):
    study_id: str
    image: ImageRef
    report: str


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoraMethod(LoraMethod):
    """The symmetric contrastive loss between a study's first frontal image and its report, as retrieval is asked.

    Images are prepared as they are for an evaluation, without augmentation. Temperature is the base model's and stays.
    """

    NAME: ClassVar[str] = "contrastive-lora"

    towers: Literal["both", "image", "text"] = "both"
    logit_scale: float | None = None  # what cosines are multiplied by; the base model's own by default
    memory: float = 1.0  # GiB of prepared images that are kept; others are prepared in each step

    def train(self, data: TrainingData, output: Path) -> Trained:
        """See `Method.train`."""
        if self.schedule.batch_size < 2:
            raise UserError("Expected a batch of 2 studies or more: a report is told from those of the others.")
        encoder = self.base(DualEncoder, "a dual encoder")
        if encoder.precision != "fp32":
            raise UserError(f"Expected precision=fp32 for training, but got {encoder.precision}.")
        train, validation = _pairs(data, data.train), _pairs(data, data.validation)[: self.validation_studies]
        for split, pairs in (("train", train), ("validation", validation)):
            if not pairs:
                raise UserError(f"{data.name}: no study of the {split} split has a frontal image and a report.")
        _log.info("%d of %d train studies have a frontal image and a report", len(train), len(data.train))
        encoder.ensure_loaded()
        if encoder.model is None:
            raise UserError(f"{self.model} has no model of torch to train.")
        names = chosen(_layers(encoder, encoder.model, train[0], self.towers), self.targets)
        model = put_lora(encoder.model, names, self)
        training = _ContrastiveTraining(self, encoder, model, train, validation)
        before = training.ranks()
        fitted = fit(training, self.schedule, output, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        return Trained(
            **asdict(fitted),
            parameters=write_adapter(model, output),
            base_models={"model": BaseModel.of(encoder)},
            studies={"train": len(train), "validation": len(validation)},
            validation=after_and_before(METRICS, training.ranks(), before, [pair.study_id for pair in validation]),
        )


def _pairs(data: TrainingData, studies: Sequence[Study]) -> list[_Pair]:
    """The studies with a frontal image and a report."""
    found = ((study, data.images(study), study_texts(study)) for study in studies)
    return [_Pair(study.study_id, images[0], texts["report"]) for study, images, texts in found if images and texts]


def _layers(encoder: DualEncoder, model: torch.nn.Module, pair: _Pair, towers: str) -> list[str]:
    """What the vectors of the chosen towers depend on."""
    names: list[str] = []
    if towers != "text":
        pixels = encoder.prepare(open_reference(pair.image))[None].to(encoder.device, encoder.dtype)
        names += reached(model, lambda: encoder.encode_images(pixels.requires_grad_(True)))
    if towers != "image":
        names += reached(model, lambda: encoder.encode_texts([pair.report]).vectors)
    return list(dict.fromkeys(names))


class _ContrastiveTraining(LoraTrainable):
    """The towers of a dual encoder over pairs."""

    full_batches = True  # with few other reports a loss is small by itself

    def __init__(
        self,
        method: ContrastiveLoraMethod,
        encoder: DualEncoder,
        model: torch.nn.Module,
        train: Sequence[_Pair],
        validation: Sequence[_Pair],
    ) -> None:
        super().__init__(model)
        self.encoder, self.train, self.validation = encoder, train, validation
        self.size = method.schedule.batch_size
        self.scale = method.logit_scale or encoder.logit_scale
        self.lengths = [1] * len(train)
        self.room = int(method.memory * 2**30)
        self.kept: dict[ImageRef, Tensor] = {}

    def pixels(self, ref: ImageRef) -> Tensor:
        """Of one image, on the CPU."""
        if ref in self.kept:
            return self.kept[ref]
        prepared = self.encoder.prepare(open_reference(ref))
        if prepared.nbytes <= self.room:
            self.room -= prepared.nbytes
            self.kept[ref] = prepared
        return prepared

    def vectors(self, pairs: Sequence[_Pair]) -> tuple[Tensor, Tensor]:
        """Of images and reports, of unit length, (n, d) each."""
        pixels = torch.stack([self.pixels(pair.image) for pair in pairs])
        images = self.encoder.encode_images(pixels.to(self.encoder.device, self.encoder.dtype))
        texts = self.encoder.encode_texts([pair.report for pair in pairs]).vectors
        return functional.normalize(images.float(), dim=1), functional.normalize(texts.float(), dim=1)

    def loss(self, items: Sequence[int]) -> Tensor:
        """Of one batch."""
        pairs = [self.train[item] for item in items]
        images, texts = self.vectors(pairs)
        return contrastive_loss(images, texts, _same(pairs, images.device), self.scale)

    def validation_loss(self) -> float:
        """All validation studies as one batch."""
        images, texts = self.validation_vectors()
        return float(contrastive_loss(images, texts, _same(self.validation, images.device), self.scale))

    @torch.inference_mode()
    def validation_vectors(self) -> tuple[Tensor, Tensor]:
        """Of all validation studies, in evaluation mode."""
        self.module.eval()
        starts = range(0, len(self.validation), self.size)
        parts = [self.vectors(self.validation[start : start + self.size]) for start in starts]
        images, texts = (torch.cat(side) for side in zip(*parts, strict=True))
        return images, texts

    def ranks(self) -> Values:
        """`METRICS` of each validation study, searched for in all of them; (n, metrics)."""
        images, texts = (side.cpu().numpy() for side in self.validation_vectors())
        own = np.arange(len(images))
        ways = [rank_queries(images, texts, own, own), rank_queries(texts, images, own, own)]
        return np.stack([*(recall_at(way, 10) for way in ways), *map(reciprocal_rank, ways)], axis=1)


def _same(pairs: Sequence[_Pair], device: torch.device) -> Tensor:
    """Which have the same report, (n, n)."""
    numbers = {report: k for k, report in enumerate(dict.fromkeys(pair.report for pair in pairs))}
    known = torch.tensor([numbers[pair.report] for pair in pairs], device=device)
    return known[:, None] == known

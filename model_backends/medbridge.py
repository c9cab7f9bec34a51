"""`medbridge`: MedBridge's adapter over frozen dual encoders, trained here by `medvlm finetune --method medbridge`.

A re-implementation from the paper, arXiv 2505.21698 (`medbridge_adapter.py` says what of it is ours): no code and no
weights of the authors are public, so a number of this model is never one of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.decoding import prepared
from medvlm_harness.model_backends.dual_encoder import DualEncoder
from medvlm_harness.model_backends.frozen_encoder import recorded_encoder
from medvlm_harness.model_backends.identity import check_weights
from medvlm_harness.model_backends.label_head import LabelHeadBackend
from medvlm_harness.model_backends.medbridge_adapter import (
    AdapterConfig,
    Injection,
    MedBridge,
    Window,
    injection_of,
    sliding_windows,
    view_images,
)
from medvlm_harness.model_backends.open_clip_towers import load_exactly
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.model_backends.tower_tokens import token_tower
from medvlm_harness.requests import ImageRef

__all__ = [
    "SETTINGS_FILE",
    "WEIGHTS_FILE",
    "Expert",
    "MedBridgeBackend",
    "MedBridgeSettings",
    "view_pixels",
]

SETTINGS_FILE, WEIGHTS_FILE = "medbridge.json", "medbridge.safetensors"
FORMAT = 1
HOW_TO_TRAIN = "train one: medvlm finetune --method medbridge (docs/medbridge.md)"


@dataclass(frozen=True, slots=True)
class Expert:
    """A frozen dual encoder as an adapter was trained over it."""

    encoder: Mapping[str, Any]  # see `encoder_record`
    injection: Injection
    width: int  # d of its tower's tokens


@dataclass(frozen=True, slots=True)
class MedBridgeSettings:
    """What `medbridge.json` says of the weights beside it."""

    experts: tuple[Expert, ...]
    adapter: AdapterConfig
    labels: tuple[str, ...]
    label_source: str
    views: str  # of the training images

    def save(self, folder: Path) -> None:
        """Write `medbridge.json`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> MedBridgeSettings:
        """What `save` wrote.

        Raises:
            UserError: if it is of another format, or damaged.
        """
        path = folder / SETTINGS_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("format") != FORMAT or raw.keys() != {field.name for field in fields(cls)}:
                raise UserError(f"{path} is of another format than this version reads ({FORMAT}): {HOW_TO_TRAIN}.")
            return cls(
                tuple(Expert(**expert) for expert in raw["experts"]),
                AdapterConfig(**raw["adapter"]),
                tuple(map(str, raw["labels"])),
                str(raw["label_source"]),
                str(raw["views"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error!r}.") from error


def view_pixels(expert: DualEncoder, image: Image, windows: Sequence[Window], crop: float) -> torch.Tensor:
    """An image's views as an expert prepares pictures, (views, channels, height, width)."""
    return torch.stack([expert.preprocess(view) for view in view_images(expert.preparation(image), windows, crop)])


class MedBridgeBackend(LabelHeadBackend):
    """The adapter over its experts; see `LabelHeadBackend`.

    `pretrained=` is a folder that `medvlm finetune --method medbridge` wrote. The experts are looked for where they lay
    in training; `experts=PATH+PATH` says where they lie now, in their order. `batch_size` counts views.
    """

    FACTS: ClassVar[tuple[str, ...]] = (*LabelHeadBackend.FACTS, "trained_parameters")
    trained_parameters: int | None = None
    card: ModelCard = backend_card("medbridge")

    def __init__(self, *, experts: str | None = None, **options: Any) -> None:
        self._moved = [] if experts is None else str(experts).split("+")
        super().__init__(**options)

    def locate(self) -> Checkpoint:
        """The trained weights and their settings."""
        folder = Path(self.pretrained).expanduser()
        missing = [name for name in (SETTINGS_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"Expected {folder} to hold a trained MedBridge ({SETTINGS_FILE}, {WEIGHTS_FILE}), but it has no "
                f"{' and no '.join(missing)}: no weights are published; {HOW_TO_TRAIN}."
            )
        self.settings = MedBridgeSettings.read(folder)
        if self._moved and len(self._moved) != len(self.settings.experts):
            raise UserError(
                f"Expected experts= to name {len(self.settings.experts)} paths, joined by +, but got {self._moved}."
            )
        # The settings' paths decide nothing; what they lead to is in `preprocessing`.
        return Checkpoint((folder / WEIGHTS_FILE,))

    @cached_property
    def experts(self) -> list[DualEncoder]:
        """The frozen encoders that it was trained over, and no others.

        Raises:
            UserError: if one is not there, or has other weights.
        """
        opened = []
        for place, expert in enumerate(self.settings.experts):
            args = {**expert.encoder["args"], "precision": self.precision}
            moved = self._moved[place] if self._moved else None
            record = {**expert.encoder, "args": args}
            encoder = recorded_encoder(record, pretrained=moved, device=str(self.device))
            encoder.meter = self.meter
            check_weights(f"Expert {encoder.card.name}", record["weights"], encoder.weights, option="experts")
            opened.append(encoder)
        return opened

    def parts(self) -> list[TorchBackend]:
        """Adds the experts."""
        return [self, *self.experts]

    def use_batch_size(self, size: int) -> None:
        """Of views: as many as so many images have."""
        super().use_batch_size(size * self.settings.adapter.views)

    def _complete_card(self) -> None:
        """The card beside the weights says what it was trained on; whose it is not stays said."""
        super()._complete_card()
        whose = type(self).card.summary
        if whose not in self.card.summary:
            self.card = replace(self.card, summary=f"{whose}: {self.card.summary}")

    def load(self) -> None:
        """The experts, and the adapter over them."""
        settings = self.settings
        for expert in self.experts:
            expert.ensure_loaded()
        towers = [token_tower(expert) for expert in self.experts]
        found = [injection_of(tower) for tower in towers]
        if found != [expert.injection for expert in settings.experts]:
            raise UserError(f"{self.pretrained} was trained with other towers: their injection is {found} here.")
        model = MedBridge(towers, [expert.width for expert in settings.experts], len(settings.labels), settings.adapter)
        (path,) = self.checkpoint.weights
        try:
            state = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as weights: {error}") from error
        load_exactly(model, state, str(path), SETTINGS_FILE)
        self.model = self.network = model
        self.trained_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.parameters = self.trained_parameters + sum(expert.parameters or 0 for expert in self.experts)
        self.transform = f"{settings.adapter.views} views, each: " + "; ".join(
            str(expert.transform or expert.card.preprocessing) for expert in self.experts
        )

    def preprocessing(self) -> Mapping[str, Any]:
        """The experts, whole: their weights and transforms decide every answer."""
        settings = asdict(self.settings)
        del settings["experts"]
        return {**settings, "experts": [expert.identity for expert in self.experts]}

    # --- answers

    @property
    def labels(self) -> Sequence[str]:
        """Those of the settings."""
        return self.settings.labels

    def compute(self, images: Sequence[ImageRef]) -> None:
        """In slots of views."""
        size = max(1, self.batching.of(self.device) // self.settings.adapter.views)
        with tqdm(total=len(images), desc="Scoring images", unit="image", disable=len(images) <= size) as progress:
            for refs, pixels in self._pixels(images, size):
                with self.meter.stage("encode_images", len(refs)):
                    parts = self.batching.in_parts(range(len(refs)), partial(self._forward, pixels))
                self.keep_logits(refs, torch.cat(parts).numpy())
                progress.update(len(refs))

    def _pixels(self, refs: Sequence[ImageRef], size: int) -> Iterator[tuple[Sequence[ImageRef], list[torch.Tensor]]]:
        """Slots of images with each expert's pixels of their views, (n, views, channels, height, width)."""
        adapter = self.settings.adapter
        windows = sliding_windows(adapter.grid)

        def of(expert: DualEncoder) -> Iterator[tuple[Sequence[ImageRef], torch.Tensor]]:
            def prepare(image: Image) -> torch.Tensor:
                return view_pixels(expert, image, windows, adapter.crop)

            return prepared(slots(refs, size), prepare, ahead=size, threads=expert.decode_threads)

        batches = zip(*map(of, self.experts), strict=True)
        while True:
            with self.meter.stage("decode") as waiting:
                parts = next(batches, ())
                waiting.items = len(parts[0][0]) if parts else 0
            if not parts:
                return
            yield parts[0][0], [pixels for _, pixels in parts]

    def _forward(self, pixels: Sequence[torch.Tensor], part: range) -> torch.Tensor:
        with torch.inference_mode():
            stems = self.network.stems([one[part.start : part.stop].to(self.device, self.dtype) for one in pixels])
            logits: torch.Tensor = self.network(stems).float().cpu()
        return logits

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds the experts, where queries go into them, the adapter's sizes, and what it was trained for."""
        described = super().describe()
        experts = [
            {
                "backend": expert.encoder["backend"],
                "name": encoder.card.name,
                "weights_sha256": encoder.weights_sha256,
                "trained_on": encoder.card.trained_on,
                "injection": expert.injection,
            }
            for expert, encoder in zip(self.settings.experts, self.experts, strict=True)
        ]
        return {
            **described,
            "probability_scale": self.card.probability_scale,
            "experts": experts,
            "adapter": asdict(self.settings.adapter),
            "trained_parameters": self.trained_parameters,
            "labels": list(self.settings.labels),
            "label_source": self.settings.label_source,
            "images_encoded": self.images_encoded,
            "images_recalled": self.images_recalled,
        }

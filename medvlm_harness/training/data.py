"""The studies that a method may learn from: train and validation of a prepared set, and no way to its test patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm_harness.data.records import Dataset, Study, Views
from medvlm_harness.errors import UserError
from medvlm_harness.requests import ImageRef

__all__ = ["TrainingData"]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Train and validation studies with their images, reports and labels; test studies are left behind."""

    name: str
    sha256: str  # of the prepared set's records
    split_scheme: str | None
    licence: str
    train: tuple[Study, ...]
    validation: tuple[Study, ...]
    image_root: Path
    label_sources: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> TrainingData:
        """The studies of a prepared set that may be learnt from, in the order of their ids.

        Raises:
            UserError: if a split has no studies, or a patient or an image of one is in another too.
        """
        parts = {
            split: sorted((s for s in dataset.studies if s.split == split), key=lambda study: study.study_id)
            for split in ("train", "validation", "test")
        }
        for split in ("train", "validation"):
            if not parts[split]:
                raise UserError(f"{dataset.manifest.name} has no study in its {split} split: nothing to learn from.")
        for first, second in (("train", "test"), ("validation", "test"), ("train", "validation")):
            _refuse_shared(dataset.manifest.name, parts, first, second)
        manifest = dataset.manifest
        scheme = manifest.policies.get("split_scheme")
        return cls(
            name=manifest.name,
            sha256=dataset.sha256,
            split_scheme=None if scheme is None else str(scheme),
            licence=manifest.licence,
            train=tuple(parts["train"]),
            validation=tuple(parts["validation"]),
            image_root=Path(manifest.image_root),
            label_sources=manifest.label_sources,
        )

    def images(self, study: Study, views: Views = "frontal") -> tuple[ImageRef, ...]:
        """The first frontal image of a study by file name, or all, frontal ones first; may be empty."""
        return tuple(ImageRef(image.sha256, self.image_root / image.file) for image in study.shown(views))

    def trained_on(self) -> dict[str, Any]:
        """The entry of a model card's `trained_on` for what was learnt here."""
        scheme = {} if self.split_scheme is None else {"scheme": self.split_scheme}
        return {"dataset": self.name, **scheme, "splits": ["train"]}


def _refuse_shared(name: str, parts: Mapping[str, Sequence[Study]], first: str, second: str) -> None:
    found = {
        "patient": [{study.patient_id for study in parts[split]} for split in (first, second)],
        "image": [{image.sha256 for study in parts[split] for image in study.images} for split in (first, second)],
    }
    for what, (one, other) in found.items():
        if both := sorted(one & other):
            raise UserError(
                f"{name}: {len(both)} {what}s are in the {first} split and in the {second} split (such as {both[0]}): "
                "what would be learnt could not be tested. Prepare the set with a split by patient."
            )

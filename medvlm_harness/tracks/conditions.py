"""The same questions under several conditions: what tracks share that ask them, and other images in a study's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from medvlm_harness.data.records import Image
from medvlm_harness.data.substitution import SUBSTITUTES, Substitution
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.requests import ImageRef
from medvlm_harness.tracks.base import MedicalTask
from medvlm_harness.tracks.rows import Row

__all__ = ["ConditionsRow", "ConditionsTask"]


@dataclass(frozen=True, slots=True)
class ConditionsRow(Row):
    """The rows of one document, one per condition."""

    conditions: tuple[Any, ...]

    __str__ = Row.__str__

    @property
    def filter(self) -> str:
        """That of the answers."""
        return str(self.conditions[0].filter)


class ConditionsTask(MedicalTask):
    """A task that asks each question once per condition; the first is the study's own image and text as they are.

    A subclass has a track beside this one, whose rows and score records these are, once per condition.

    YAML: `substitutes`, a list of other (another patient's image of the same view and split), blank (uniform grey) and
    mean (the train split's mean image), each a condition. --metadata substitution_seed=N draws other patients.
    """

    KEYS: ClassVar[frozenset[str]] = frozenset({"substitutes"})
    RUNTIME_KEYS: ClassVar[frozenset[str]] = frozenset({"substitution_seed"})
    conditions: tuple[str, ...]

    def read_substitutes(self) -> None:
        """Check the substitutes and the seed."""
        named = self.declared.get("substitutes")
        if not isinstance(named, list) or not named or len(set(map(str, named))) < len(named):
            raise UserError(
                f"{self.task_name}: expected substitutes to be a list of {', '.join(SUBSTITUTES)}, but got {named!r}."
            )
        for one in named:
            if one not in SUBSTITUTES:
                raise UserError(f"{self.task_name}: unknown substitute {one!r}.{near_matches(str(one), SUBSTITUTES)}")
        self.substitutes = tuple(named)
        self.substitution_seed = self.seed("substitution_seed")

    def seed_keys(self) -> frozenset[str]:
        """Adds that of other patients."""
        drawn = {"substitution_seed"} if "other" in self.substitutes else set()
        return super().seed_keys() | drawn

    def refuses(self, lm: Any) -> str | None:
        """Adds what the set lacks to put something in the place of an image that is asked about."""
        asked = {sha256 for doc in self.documents for sha256 in doc.get("images", [doc.get("image")])}
        one_of_each = {
            (study.split, image.view): image
            for study in self.studies
            for image in study.images
            if image.sha256 in asked
        }
        try:
            for image in one_of_each.values():
                self.stand_ins(image)
        except UserError as error:
            return str(error)
        return super().refuses(lm)

    def seed(self, key: str) -> int:
        """A seed of --metadata; 0 where it says none."""
        seed = self.runtime.get(key, 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UserError(f"{self.task_name}: expected {key}=N, a whole number from 0 on, but got {seed!r}.")
        return seed

    @cached_property
    def substitution(self) -> Substitution:
        """What stands for the images of the set."""
        return Substitution(self.data, seed=self.substitution_seed)

    def stand_ins(self, image: Image) -> list[ImageRef]:
        """What stands for an image, one per substitute.

        A perturbation is done to another patient's image as to the own one, or the two could be told apart by it. Grey
        and mean are nobody's image: they stay what they are without it.
        """
        change = self.perturbation.image
        return [
            ImageRef(*self.substitution(kind, image), change if kind == "other" else None) for kind in self.substitutes
        ]

    @cached_property
    def images_by_file(self) -> dict[str, Image]:
        """The images of the chosen splits, by the names of their files."""
        return {image.file: image for study in self.studies for image in study.images}

    def make_row(self, doc: Mapping[str, Any], results: Sequence[Any]) -> Any:
        """The rows of one document, one per condition, as one."""
        make_row = super().make_row  # type: ignore[safe-super]  # that of the track beside
        ids = doc["study_id"], doc["patient_id"], doc["split"], doc.get("file", "")
        return ConditionsRow(*ids, tuple(make_row(doc, [one]) for one in results))

    def by_condition(self, rows: Sequence[ConditionsRow]) -> dict[str, list[Any]]:
        """Condition -> the rows of all documents."""
        return {name: [row.conditions[k] for row in rows] for k, name in enumerate(self.conditions)}

    def score_records(self, rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Records under each condition; those of other conditions than the first are called `label@condition`."""
        for condition, its in self.by_condition(rows).items():
            for record in super().score_records(its):  # type: ignore[safe-super]  # that of the track beside
                yield {**record, "label": self.label_under(record["label"], condition)}

    def label_under(self, label: str, condition: str) -> str:
        """What a score is called in scores.parquet."""
        return label if condition == self.conditions[0] else f"{label}@{condition}"

    def details(self) -> dict[str, Any]:
        """Adds the conditions and the seed."""
        return {
            **super().details(),
            "conditions": list(self.conditions),
            "substitution_seed": self.substitution_seed,
        }

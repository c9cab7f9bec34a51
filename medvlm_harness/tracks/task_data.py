"""Where a task's data comes from: the prepared set, the chosen splits, and whose labels are the truth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from medvlm_harness.data.locate import find_dataset
from medvlm_harness.data.records import Dataset, Study
from medvlm_harness.data.splits import parse_splits
from medvlm_harness.errors import UserError

__all__ = ["LABEL_SOURCE_ORDER", "SHARING", "TaskData"]

LABEL_SOURCE_ORDER = ("chexpert_labeler", "chexbert", "rules", "template", "mesh")
# What may leave the user's machine: nothing but aggregates; also scores of documents under hashes; all of it.
SHARING = ("aggregate", "hashed", "full")


class TaskData:
    """The data of a task, found at first use."""

    task_name: str
    declared: dict[str, Any]  # the YAML
    runtime: dict[str, Any]  # what --metadata says

    @property
    def sharing(self) -> str:
        """What of the data set may leave this machine; a set that does not say shares the least."""
        return str(self.declared.get("sharing", SHARING[0]))

    @cached_property
    def data(self) -> Dataset:
        """The prepared set: from --metadata data_dir, MEDVLM_DATA, the user cache, or the Hub."""
        hub = dict(self.declared.get("hub") or {})
        hub |= {"id": self.runtime["hub_id"]} if "hub_id" in self.runtime else {}
        hub |= {"revision": self.runtime["revision"]} if "revision" in self.runtime else {}
        return find_dataset(self.declared["dataset"], data_dir=self.runtime.get("data_dir"), hub=hub or None)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits asked for: by --metadata, else by the YAML, else test."""
        return parse_splits(str(self.runtime.get("split", self.declared.get("split", "test"))))

    @cached_property
    def studies(self) -> tuple[Study, ...]:
        """The studies of the chosen splits, sorted by id; of a track that takes some alone, those.

        Raises:
            UserError: if there are none.
        """
        chosen = tuple(study for study in self.data.studies if study.split in self.splits)
        if not chosen:
            have = sorted({study.split for study in self.data.studies})
            raise UserError(
                f"{self.task_name}: no study of {self.data.manifest.name} is in split {'+'.join(self.splits)} "
                f"(it has {', '.join(have)})."
            )
        return tuple(self.choose(chosen))

    def choose(self, studies: Sequence[Study]) -> Sequence[Study]:
        """Of the studies of the chosen splits those that the track takes: all, unless it says otherwise."""
        return studies

    @cached_property
    def by_id(self) -> dict[str, Study]:
        """The studies of the chosen splits by their ids."""
        return {study.study_id: study for study in self.studies}

    @cached_property
    def label_source(self) -> str:
        """The source whose labels are the truth: asked for, else the first prepared one of a fixed order."""
        prepared = self.data.manifest.label_sources
        asked = self.runtime.get("label_source", self.declared.get("label_source"))
        if asked is not None:
            if asked not in prepared:
                raise UserError(
                    f"{self.task_name}: expected label_source to be one of {', '.join(prepared)}, but got {asked!r}."
                )
            return str(asked)
        ordered = [source for source in LABEL_SOURCE_ORDER if source in prepared] or list(prepared)
        if not ordered:
            raise UserError(f"{self.task_name}: {self.data.manifest.name} was prepared without labels: use --labels.")
        return ordered[0]

    @cached_property
    def other_sources(self) -> tuple[str, ...]:
        """The prepared label sources that the same scores are also evaluated against."""
        return tuple(source for source in self.data.manifest.label_sources if source != self.label_source)

"""Labels and entities of the texts that a run scores, each distinct text read once; and which studies are abnormal."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from medvlm_harness.data.records import Study
from medvlm_harness.labelers.base import Labeler, compose_report, labeler_from_text
from medvlm_harness.tracks.base import MedicalTask

if TYPE_CHECKING:
    from medvlm_harness.labelers.entities import EntityExtractor

__all__ = ["ReadReports", "ReportReader"]

Labels = Mapping[str, int | None]


class ReportReader:
    """Reads texts by a labeler and by the entity extractor, which are made at first use.

    Args:
        labeler: as for `medvlm label`: "rules", or "chexbert,weights=FILE".
    """

    def __init__(self, labeler: str = "rules") -> None:
        self.labeler_asked = labeler
        self._labels: dict[str, Labels] = {}
        self._entities: dict[str, Mapping[str, Any]] = {}

    @cached_property
    def labeler(self) -> Labeler:
        """The labeler."""
        return labeler_from_text(self.labeler_asked)

    @cached_property
    def extractor(self) -> EntityExtractor:
        """The entity extractor."""
        from medvlm_harness.labelers.entities import EntityExtractor

        return EntityExtractor()

    def labels(self, text: str) -> Labels:
        """CheXpert's observations in a text; None throughout where there is nothing to read."""
        if text not in self._labels:
            self._labels[text] = self.labeler.label(text)
        return self._labels[text]

    def entities(self, text: str) -> Mapping[str, Any]:
        """The entities of a text as in RadGraph's JSON."""
        if text not in self._entities:
            self._entities[text] = self.extractor.extract(text)["entities"]
        return self._entities[text]

    def versions(self) -> dict[str, str]:
        """What read the texts, to stand in every result."""
        return {
            "labeler": f"{self.labeler.name} {self.labeler.version}",
            "entities": self.entities_version,
        }

    @property
    def entities_version(self) -> str:
        """What read entities."""
        return f"{self.extractor.name} {self.extractor.version}"


class ReadReports(MedicalTask):
    """A task in which a labeler reads texts, and that knows which studies are abnormal.

    Abnormal studies are those of which the label source does not say `No Finding`; where a set was prepared without
    labels, the task's labeler reads the whole report: `rules`, or --metadata labeler=... of a task that has that key.
    """

    @cached_property
    def reader(self) -> ReportReader:
        """What reads texts."""
        return ReportReader(str(self.runtime.get("labeler", "rules")))

    @cached_property
    def abnormal_by(self) -> str:
        """What says which studies are abnormal: the label source, or the labeler of the run where there is none."""
        if self.data.manifest.label_sources:
            return self.label_source
        return self.reader.labeler.name

    def is_abnormal(self, study: Study) -> bool:
        """True unless `No Finding` is said of the study."""
        if self.data.manifest.label_sources:
            labels = study.labels.get(self.label_source)
        else:
            labels = self.reader.labels(compose_report(study.findings, study.impression))
        return labels is None or labels.get("No Finding") != 1

"""What tracks share that hold findings and impression of a study against each other."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.tracks.report_reading import ReadReports

__all__ = ["ReportPair", "ReportPairs"]


class ReportPair(NamedTuple):
    """A study that has both sections, without the white space around them."""

    study: Study
    findings: str
    impression: str


class ReportPairs(ReadReports):
    """The studies with findings and impression, with an image or not, and which of them are abnormal."""

    @cached_property
    def pairs(self) -> tuple[ReportPair, ...]:
        """Those of the chosen splits, sorted by study."""
        return tuple(_pairs(self.studies))

    @cached_property
    def train_pairs(self) -> tuple[ReportPair, ...]:
        """Those of the train split, which floors learn from."""
        return tuple(_pairs(study for study in self.data.studies if study.split == "train"))

    def require_train_pairs(self) -> None:
        """Refuse a set whose train split floors cannot learn from, before a model is asked anything.

        Raises:
            UserError: if no study of it has both sections.
        """
        if not self.train_pairs:
            raise UserError(
                f"{self.task_name}: no study of {self.data.manifest.name} in split train has findings and impression, "
                "which the floors are made from."
            )

    def what_studies_have(self) -> str:
        """Counts of sections."""
        findings = sum(bool(study.findings.strip()) for study in self.studies)
        impression = sum(bool(study.impression.strip()) for study in self.studies)
        return f"findings in {findings} and an impression in {impression}, {len(self.pairs)} times both"

    def left_out(self) -> dict[str, int]:
        """Counts of the studies that lack a section."""
        return {
            "studies_without_findings": sum(not study.findings.strip() for study in self.studies),
            "studies_without_impression": sum(not study.impression.strip() for study in self.studies),
        }


def _pairs(studies: Iterator[Study] | tuple[Study, ...]) -> Iterator[ReportPair]:
    for study in studies:
        findings, impression = study.findings.strip(), study.impression.strip()
        if findings and impression:
            yield ReportPair(study, findings, impression)

"""Tracks that fit scalings and thresholds on the validation split, and evaluate them on other studies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.data.records import Study
from medvlm_harness.tracks.base import MedicalTask
from medvlm_harness.tracks.rows import Row

__all__ = ["FitsOnValidation", "Parts"]

VALIDATION = "validation"


class Parts(NamedTuple):
    """Which rows are for what; each (n,)."""

    scored: NDArray[np.bool_]
    judged: NDArray[np.bool_]  # scored, and outside of validation: what was fitted is evaluated on these
    fitting: NDArray[np.bool_]  # of validation, and of no patient among those


class FitsOnValidation(MedicalTask):
    """Validation's studies are asked about beside those of the chosen splits, unless validation is itself chosen."""

    @property
    def fits_on(self) -> str | None:
        """The split that is fitted on; None where a track fits nothing."""
        return VALIDATION

    def fitting_studies(self) -> Iterator[Study]:
        """Studies to fit on outside of the chosen splits, of patients who are in none of these."""
        if self.fits_on is None or self.fits_on in self.splits:
            return
        scored = {study.patient_id for study in self.studies}
        for study in self.data.studies:
            if study.split == self.fits_on and study.patient_id not in scored:
                yield study

    def parts(self, rows: Sequence[Row]) -> Parts:
        """The parts of all rows of a task."""
        scored = np.array([row.split in self.splits for row in rows], dtype=np.bool_)
        fitting = np.array([row.split == self.fits_on for row in rows], dtype=np.bool_)
        judged = scored & ~fitting
        patients = {row.patient_id for row, one in zip(rows, judged, strict=True) if one}
        return Parts(scored, judged, fitting & [row.patient_id not in patients for row in rows])

    def without_validation(self) -> str:
        """Why there is nothing to fit on, where that is so."""
        if self._asked:
            return "--samples leaves out validation, which is fitted on"
        return f"{self.data.manifest.name} has nothing in split {self.fits_on} to fit on"

    def fitting_counts(self) -> dict[str, int]:
        """How many studies there are to fit on, for `counts` in the results."""
        if self.fits_on is None:
            return {}
        documents = self.documents if self.fits_on in self.splits else self.fitting_documents
        studies = {doc["study_id"] for doc in documents if doc["split"] == self.fits_on}
        return {f"{self.fits_on}_studies_to_fit_on": len(studies)}

"""The fourteen CheXpert observations, in CheXpert's column order (Irvin et al. 2019, arXiv 1901.07031)."""

from __future__ import annotations

__all__ = ["CHEXPERT_5", "CHEXPERT_13", "CHEXPERT_14", "canonical_name"]

CHEXPERT_14 = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
CHEXPERT_13 = CHEXPERT_14[1:]  # without No Finding
CHEXPERT_5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # the paper's five

_BY_KEY = {name.lower().replace(" ", "_"): name for name in CHEXPERT_14}


def canonical_name(column: str) -> str | None:
    """CheXpert's spelling of a column name in any case, with spaces or underscores, with or without `chexpert_`.

    >>> canonical_name("chexpert_pleural_effusion")
    'Pleural Effusion'
    >>> canonical_name("filename") is None
    True
    """
    return _BY_KEY.get(column.strip().lower().replace(" ", "_").removeprefix("chexpert_"))

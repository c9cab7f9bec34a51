"""The fourteen CheXpert observations, in CheXpert's column order (Irvin et al. 2019, arXiv 1901.07031)."""

from __future__ import annotations

__all__ = ["CHEXPERT_5", "CHEXPERT_13", "CHEXPERT_14", "NO_FINDING", "canonical_name", "label_key"]

NO_FINDING = "No Finding"
CHEXPERT_14 = (
    NO_FINDING,
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


def label_key(name: str) -> str:
    """A label's name in metric names: lower case, underscores for spaces.

    >>> label_key("Pleural Effusion")
    'pleural_effusion'
    """
    return name.lower().replace(" ", "_")


_BY_KEY = {label_key(name): name for name in CHEXPERT_14}


def canonical_name(column: str) -> str | None:
    """CheXpert's spelling of a column name in any case, with spaces or underscores, with or without `chexpert_`.

    >>> canonical_name("chexpert_pleural_effusion")
    'Pleural Effusion'
    >>> canonical_name("filename") is None
    True
    """
    return _BY_KEY.get(label_key(column.strip()).removeprefix("chexpert_"))

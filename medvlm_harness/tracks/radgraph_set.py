"""A user's RadGraph annotations as a data set in memory: their own texts as reports, their files as splits.

RadGraph is distributed by PhysioNet under credentialed access; nothing of it comes with this package, and nothing of it
is written anywhere but where lm-eval logs what it asked.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from medvlm_harness.data.records import Dataset, Manifest, Study
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.radgraph_json import AnnotatedReport, read_radgraph

__all__ = ["VARIABLE", "RadGraphSet", "find_radgraph"]

VARIABLE = "MEDVLM_RADGRAPH"
_SPLITS = {
    "train": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_SUFFIXES = (".json", ".jsonl")
# Of a key: MIMIC-CXR's "p15/p15004812/s53118462.txt", CheXpert's "patient05075/study1"; a patient's reports belong
# together.
_PATIENT = re.compile(r"(?:^|/)(p\d{8}|patient\d+)(?=/|$)")
_LICENCE = "as the user's copy; RadGraph: PhysioNet Credentialed Health Data License 1.5.0"


class RadGraphSet(NamedTuple):
    """The annotations as a data set, and by study."""

    dataset: Dataset
    reports: Mapping[str, AnnotatedReport]


def find_radgraph(named: str | Path | None) -> RadGraphSet:
    """Read the user's annotations.

    A folder holds train, dev and test (as .json or .jsonl; any of them, and dev may be called val, valid or
    validation), or one file of any name. One file is the split that its name says, else test.

    Args:
        named: what --metadata radgraph=... says; None for the environment variable MEDVLM_RADGRAPH.

    Raises:
        UserError: if neither names files in RadGraph's form, or a report is in two of them.
    """
    where = named or os.environ.get(VARIABLE)
    if not where:
        raise UserError(
            "no RadGraph annotations are named.\n"
            "       They are on PhysioNet, for credentialed users (physionet.org/content/radgraph, and RadGraph-XL);\n"
            f"       name the folder or file:  --metadata radgraph=PATH  or  {VARIABLE}=PATH"
        )
    path = Path(where).expanduser()
    files = _files(path)
    return _read_once(tuple((split, file.resolve(), file.stat().st_mtime_ns) for split, file in files.items()))


def _files(path: Path) -> dict[str, Path]:
    """Split -> file."""
    if path.is_file():
        return {_SPLITS.get(path.stem.lower(), "test"): path}
    if not path.is_dir():
        raise UserError(f"Expected radgraph to be a folder or file with RadGraph annotations, but {path} is not there.")
    candidates = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
    found: dict[str, Path] = {}
    for file in candidates:
        split = _SPLITS.get(file.stem.lower())
        if split in found:
            raise UserError(
                f"Expected one file of split {split} in {path}, but {found[split].name} and {file.name} are."
            )
        if split is not None:
            found[split] = file
    if not found and len(candidates) == 1:
        found = {"test": candidates[0]}
    if not found:
        have = ", ".join(file.name for file in candidates) or "no .json or .jsonl file"
        raise UserError(f"Expected train, dev or test (.json or .jsonl) in radgraph folder {path}, but it has {have}.")
    return found


@lru_cache(maxsize=2)  # of the tasks of one run; the times are there so that a file that was changed is read again
def _read_once(files: tuple[tuple[str, Path, int], ...]) -> RadGraphSet:
    studies: list[Study] = []
    reports: dict[str, AnnotatedReport] = {}
    hashes: dict[str, str] = {}
    for split, file, _ in files:
        hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        for key, report in read_radgraph(file).items():
            if key in reports:
                raise UserError(f"Expected each report once, but {key!r} is in two files of {file.parent}.")
            reports[key] = report
            patient = _PATIENT.search(key)
            studies.append(Study(key, patient[1] if patient else key, findings=report.text, split=split))
    ordered = tuple(sorted(studies, key=lambda study: study.study_id))
    manifest = Manifest(
        name="radgraph",
        source="RadGraph's JSON",
        image_root="",
        licence=_LICENCE,
        counts=dict(Counter(study.split for study in ordered)),
        dropped={},
        label_sources=(),
        label_names=(),
        policies={"split_scheme": "radgraph"},
        source_hashes=hashes,
    )
    identity = hashlib.sha256("".join(f"{split}{hashes[file.name]}" for split, file, _ in sorted(files)).encode())
    return RadGraphSet(Dataset(files[0][1].parent, manifest, ordered, identity.hexdigest()), reports)

"""The synthetic chest set "demo_cxr": phantom pictures with reports and labels, written as a prepared data set."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.records import Image, Manifest, Study, read_dataset, write_dataset
from medvlm_harness.demo.anatomy import Finding, View, sample_anatomy
from medvlm_harness.demo.phantom import render
from medvlm_harness.demo.reports import Indexing, Report, index_study, write_report
from medvlm_harness.errors import UserError

__all__ = ["DEMO_NAME", "DEMO_SEED", "GENERATOR_VERSION", "Case", "generate_cases", "prepare_demo"]

DEMO_NAME = "demo_cxr"
DEMO_SEED = 7
GENERATOR_VERSION = 1  # raised whenever the same seed would give another picture, text or label

SPLIT_STREAM = 2**32 - 1  # number of a random stream that no patient has
LABEL_SOURCES = ("template", "mesh")
# How often a finding is drawn in a study that is not normal; the two rare ones show the rule on few positives.
PREVALENCE = {
    "Enlarged Cardiomediastinum": 0.12,
    "Cardiomegaly": 0.20,
    "Lung Lesion": 0.12,
    "Lung Opacity": 0.15,
    "Edema": 0.13,
    "Consolidation": 0.12,
    "Pneumonia": 0.13,
    "Atelectasis": 0.16,
    "Pneumothorax": 0.03,
    "Pleural Effusion": 0.20,
    "Pleural Other": 0.03,
    "Fracture": 0.12,
    "Support Devices": 0.16,
}
NORMAL_SHARE = 0.34
CAN_BE_HEDGED = {"Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema", "Consolidation", "Pneumonia", "Atelectasis"}
CAN_BE_HEDGED |= {"Pleural Effusion", "Fracture"}


@dataclass(frozen=True, slots=True)
class Case:
    """One study in memory."""

    patient: int
    number: int  # of the patient's studies, from 0
    sex: str
    age: int
    findings: tuple[Finding, ...]  # what was drawn
    hedged: frozenset[str]  # labels of these that the report only calls possible
    report: Report
    index: Indexing
    pictures: tuple[tuple[View, NDArray[np.uint8]], ...]


def generate_cases(seed: int, studies: int) -> Iterator[Case]:
    """Draw and write up studies, patient by patient; one patient in seven has two."""
    made = patient = 0
    while made < studies:
        # A stream per patient: what one patient gets never depends on how many came before.
        rng = np.random.default_rng((GENERATOR_VERSION, seed, patient))
        sex = "F" if rng.random() < 0.5 else "M"
        age = int(np.clip(rng.normal(57, 18), 18, 95))
        anatomy = sample_anatomy(rng, sex)
        for number in range(min(1 + int(rng.random() < 1 / 7), studies - made)):
            findings, hedged = _sample_findings(rng, age)
            views: list[View] = ["frontal"]
            layout = rng.random()
            views += ["frontal"] if layout < 0.08 else []
            views += ["lateral"] if layout < 0.80 else []
            yield Case(
                patient=patient,
                number=number,
                sex=sex,
                age=age,
                findings=findings,
                hedged=hedged,
                pictures=tuple((view, render(findings, view, rng, anatomy)) for view in views),
                report=write_report(findings, hedged, rng, sex=sex, age=age),
                index=index_study(findings, rng),
            )
            made += 1
        patient += 1


def _sample_findings(rng: np.random.Generator, age: int) -> tuple[tuple[Finding, ...], frozenset[str]]:
    findings: list[Finding] = []
    hedged: set[str] = set()
    if rng.random() < NORMAL_SHARE:
        return (), frozenset()
    older = 0.8 + 0.4 * (age > 57)
    while not findings:
        for label, share in PREVALENCE.items():
            drawn = {finding.label for finding in findings}
            factor = older * (2.0 if label == "Pleural Effusion" and drawn & {"Edema", "Cardiomegaly"} else 1.0)
            if rng.random() < share * factor:
                findings.append(_sample_finding(label, rng))
    for k, finding in enumerate(findings):
        if finding.label in CAN_BE_HEDGED and rng.random() < 0.10:
            hedged.add(finding.label)
            findings[k] = replace(finding, size=0.2 * finding.size)  # what is only possible is faint
    return tuple(findings), frozenset(hedged)


def _sample_finding(label: str, rng: np.random.Generator) -> Finding:
    size = float(rng.uniform(0.1, 1.0) ** 1.6)
    side = ("left", "right", "both")[int(rng.choice(3, p=(0.42, 0.42, 0.16)))]
    one_side = "left" if rng.random() < 0.5 else "right"
    zone = ("upper", "middle", "lower")[int(rng.choice(3, p=(0.25, 0.3, 0.45)))]
    device = ("pacemaker", "line", "tube")[int(rng.integers(3))]
    match label:
        case "Cardiomegaly" | "Enlarged Cardiomediastinum":
            return Finding(label, "", size)
        case "Edema":
            return Finding(label, "both", size)
        case "Support Devices":
            return Finding(label, "" if device == "tube" else one_side, size, device)
        case "Pleural Effusion" | "Atelectasis":
            return Finding(label, side, size)
        case "Pneumothorax":
            return Finding(label, one_side, size)
        case _:
            return Finding(label, one_side, size, zone)


def prepare_demo(folder: Path, *, seed: int = DEMO_SEED, studies: int = 480) -> Path:
    """Make the synthetic set, or keep the one that stands there if it is the same.

    It is built in a sibling folder and moved into place whole, so it may be interrupted or run twice at once. The same
    seed gives the same bytes.

    Args:
        folder: where the set shall lie.
        seed: of every random choice.
        studies: how many; half of them, at least, are in the test split.

    Raises:
        UserError: if something else lies in the folder, the studies are too few to split, or the seed is below 0.
    """
    if studies < 12:
        raise UserError(f"Expected at least 12 studies, so that each split has some, but got {studies}.")
    if seed < 0:
        raise UserError(f"Expected a seed of at least 0, but got {seed}.")
    folder = folder.expanduser().absolute()
    if _is_current(folder, seed, studies):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        _build(fresh, folder / "images", seed, studies)
        for attempt in range(10):
            try:
                fresh.rename(folder)
                return folder
            except OSError:
                if not folder.exists():
                    raise
            if _is_current(folder, seed, studies):  # another process was quicker
                return folder
            # Moved aside, not deleted in place: a reader never sees half a set.
            with contextlib.suppress(FileNotFoundError):
                folder.rename(Path(scratch) / f"old{attempt}")
    raise UserError(f"{folder} kept changing while the demo set was being put there: is another process writing it?")


def _is_current(folder: Path, seed: int, studies: int) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        manifest = read_dataset(folder).manifest
    except UserError:
        if (folder / "manifest.json").is_file():
            return False  # ours, of an older record schema
        raise UserError(f"Expected {folder} to be empty or to hold {DEMO_NAME}, but other files are there.") from None
    if manifest.name != DEMO_NAME:
        raise UserError(f"Expected {folder} to be empty or to hold {DEMO_NAME}, but it holds {manifest.name}.")
    images = folder / "images"
    return (
        manifest.policies.get("generator_version") == GENERATOR_VERSION
        and manifest.policies.get("seed") == seed
        and manifest.counts.get("studies") == studies
        and manifest.image_root == str(images)
        and images.is_dir()
        and sum(1 for _ in images.glob("*.png")) == manifest.counts.get("images")
    )


def _build(folder: Path, image_root: Path, seed: int, studies: int) -> None:
    images = folder / "images"
    images.mkdir(parents=True)
    records = [_store(case, images) for case in generate_cases(seed, studies)]
    records = _with_splits(records, seed)
    files = [image for record in records for image in record.images]
    counts = {"studies": len(records), "images": len(files)}
    for split in ("train", "validation", "test"):
        chosen = [record for record in records if record.split == split]
        counts |= {f"{split}_studies": len(chosen), f"{split}_images": sum(len(record.images) for record in chosen)}
    manifest = Manifest(
        name=DEMO_NAME,
        source="demo",
        image_root=str(image_root),
        licence="Apache-2.0 (synthetic)",
        counts=counts,
        dropped={},
        label_sources=LABEL_SOURCES,
        label_names=CHEXPERT_14,
        policies={
            "synthetic": "Drawn and written by a program; no patient, no clinical meaning.",
            "generator_version": GENERATOR_VERSION,
            "seed": seed,
            "split": "by patient: half of the studies test, a sixth validation, the rest train",
            "template": "labels by construction of the findings section; none where a study has no such section",
            "mesh": "indexed from what was drawn, with a few disagreements; 'No Indexing' is unlabelled",
        },
        resolutions=dict(Counter(f"{image.width}x{image.height}" for image in files)),
    )
    write_dataset(folder, records, manifest)


def _store(case: Case, images: Path) -> Study:
    """Write a case's pictures and make its record, yet without a split."""
    name = f"demo{case.patient:04d}_{case.number}"
    stored = []
    for k, (view, pixels) in enumerate(case.pictures):
        buffer = io.BytesIO()
        Picture.fromarray(pixels).save(buffer, format="PNG", compress_level=3)
        payload = buffer.getvalue()
        (images / f"{name}_{k}.png").write_bytes(payload)
        digest = hashlib.sha256(payload).hexdigest()
        stored.append(Image(f"{name}_{k}.png", digest, view, width=pixels.shape[1], height=pixels.shape[0]))
    labels = {"template": case.report.labels, "mesh": case.index.labels}
    return Study(
        study_id=name,
        patient_id=f"demo{case.patient:04d}",
        images=tuple(stored),
        indication=case.report.indication,
        comparison=case.report.comparison,
        findings=case.report.findings,
        impression=case.report.impression,
        mesh=case.index.terms,
        labels={source: values for source, values in labels.items() if values is not None},
        subgroups={"sex": case.sex, "age_band": _age_band(case.age)},
    )


def _age_band(age: int) -> str:
    return "18-39" if age < 40 else "40-59" if age < 60 else "60-79" if age < 80 else "80+"


def _with_splits(records: list[Study], seed: int) -> list[Study]:
    """Deal whole patients out in random order: test first, then validation, the rest train."""
    per_patient = Counter(record.patient_id for record in records)
    order = np.random.default_rng((GENERATOR_VERSION, seed, SPLIT_STREAM)).permutation(sorted(per_patient))
    quota = {"test": math.ceil(len(records) / 2), "validation": len(records) // 6}
    split_of, dealt = {}, Counter[str]()
    for patient in order.tolist():
        split = next((name for name, wanted in quota.items() if dealt[name] < wanted), "train")
        split_of[patient] = split
        dealt[split] += per_patient[patient]
    return [replace(record, split=split_of[record.patient_id]) for record in records]

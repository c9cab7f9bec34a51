"""From a folder as it was downloaded to a prepared set: images checked, labels joined, splits assigned, all counted."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.images import MAX_PIXELS, ImageInfo, UnreadableImage, inspect_image
from medvlm_harness.data.labels import (
    LABELER_SOURCE,
    MESH_SOURCE,
    LabelTable,
    mesh_labels,
    mesh_rule_version,
    read_label_table,
)
from medvlm_harness.data.records import Image, Labels, Manifest, Study, file_sha256, write_dataset
from medvlm_harness.data.sources.base import RawImage, RawStudy, Reading, ReadLog
from medvlm_harness.data.sources.detect import detect
from medvlm_harness.data.splits import SPLIT_SCHEMES, SPLITS, SplitScheme, assign_split
from medvlm_harness.data.subgroups import subgroup_rule_version, subgroups_of
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.labelers.base import Labeler, compose_report

__all__ = ["IU_CXR_LICENCE", "LOG_FILE", "PrepareReport", "Progress", "prepare_iu_cxr", "prepare_reading"]

IU_CXR_LICENCE = "CC BY-NC-ND 4.0"
DECODE_THREADS = 2
LOG_FILE = "read_log.csv"
VIEW_UNKNOWN = "view_unknown"
_READ = {"both": "findings and impression", "findings": "the findings alone", "impression": "the impression alone"}
Progress = Callable[[int, int], None]
"""Called with the number of images checked so far and their total."""


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What came of preparing a set; every name behind a count is kept."""

    folder: Path
    layout: str
    studies_read: int
    images_read: int
    counts: Mapping[str, int]  # as in the manifest
    splits: Mapping[str, Mapping[str, int]]  # split -> studies, images, frontal, lateral, view_unknown
    dropped: Mapping[str, tuple[str, ...]]  # rule -> names of what it removed
    noted: Mapping[str, tuple[str, ...]]  # rule -> names of what was kept but should be known
    warnings: tuple[str, ...]


def prepare_iu_cxr(
    source: Path,
    *,
    labels: Path | None,
    out: Path,
    labelers: Sequence[Labeler] = (),
    split_scheme: SplitScheme = "r2gen",
    layout: str | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Prepare IU-CXR from a local copy in Kaggle's, Open-i's or R2Gen's layout.

    Args:
        source: the folder as downloaded; images stay there.
        labels: table of a labeler's output on the findings (see `read_label_table`); None for MeSH labels alone.
        out: folder of the prepared set; one that is there is replaced.
        labelers: read each report; their labels become sources under their names.
        split_scheme: "r2gen" or "hash" (see `assign_split`).
        layout: read the folder as this layout; None to detect it.
        progress: called after each checked image.

    Raises:
        UserError: if the folder holds no known layout, or a table cannot be read.
    """
    log = ReadLog()
    source = source.expanduser().resolve()
    reading = detect(source, layout=layout, log=log).read(source, log)
    return prepare_reading(reading, log, name="iu_cxr", labels=labels, out=out, labelers=labelers,
                           split_scheme=split_scheme, progress=progress)  # fmt: skip


def prepare_reading(
    reading: Reading,
    log: ReadLog,
    *,
    name: str,
    labels: Path | None,
    out: Path,
    labelers: Sequence[Labeler] = (),
    split_scheme: SplitScheme = "r2gen",
    licence: str = IU_CXR_LICENCE,
    progress: Progress | None = None,
) -> PrepareReport:
    """Check, join, split and write what a layout read; see `prepare_iu_cxr`.

    Studies without a readable image are kept for text tracks, studies without a report for image tracks; only a study
    with neither is dropped. The uid is both the study's and the patient's id.
    """
    if split_scheme not in SPLIT_SCHEMES:
        raise UserError(
            f"Expected a split scheme, but got {split_scheme!r}.{near_matches(split_scheme, SPLIT_SCHEMES)}"
        )
    _refuse_name_clashes(labelers)
    table = read_label_table(labels, log) if labels is not None else None
    inspected = _inspect_all(reading, log, progress)
    studies = [
        study
        for raw in reading.studies
        if (study := _study(raw, inspected, table, labelers, split_scheme, log)) is not None
    ]
    if not studies:
        raise UserError(f"Expected studies in {reading.image_root}, but none is left: {_summary(log.dropped)}.")
    _note_labels_without_study(table, studies, log)
    _note_duplicates(studies, log)
    sizes = Counter(f"{image.width}x{image.height}" for study in studies for image in study.images)
    sources = tuple(sorted({source for study in studies for source in study.labels}))
    splits = _splits(studies)
    manifest = Manifest(
        name=name,
        source=reading.layout,
        image_root=str(reading.image_root),
        licence=licence,
        counts=_counts(studies, splits, log),
        dropped={rule: len(names) for rule, names in sorted(log.dropped.items())},
        label_sources=sources,
        label_names=CHEXPERT_14 if sources else (),
        label_coverage={LABELER_SOURCE: table.names} if table and LABELER_SOURCE in sources else {},
        policies={
            "split_scheme": split_scheme,
            "aspect": _aspect(sizes),
            "images": f"PNG or JPEG, at most {MAX_PIXELS} pixels, decoded once when prepared",
            **{f"labels_{source}": policy for source, policy in _label_policies(labelers).items() if source in sources},
            **({"subgroups": _subgroup_policy()} if any(study.subgroups for study in studies) else {}),
            **reading.policies,
        },
        resolutions=dict(sizes.most_common()),
        source_hashes={path.name: file_sha256(path) for path in (*reading.files, *([labels] if labels else []))},
        revision=reading.revision,
    )
    write_dataset(out, studies, manifest)
    _write_log(out / LOG_FILE, log)
    return PrepareReport(
        folder=out,
        layout=reading.layout,
        studies_read=len(reading.studies),
        images_read=len(inspected),
        counts=manifest.counts,
        splits=splits,
        dropped={rule: tuple(names) for rule, names in sorted(log.dropped.items())},
        noted={rule: tuple(names) for rule, names in sorted(log.noted.items())},
        warnings=_warnings(manifest, log),
    )


def _inspect_all(reading: Reading, log: ReadLog, progress: Progress | None) -> dict[str, ImageInfo]:
    """Decode each distinct image once; the unreadable are logged by name and left out."""
    names = sorted({image.file for study in reading.studies for image in study.images})

    def inspect(name: str) -> ImageInfo | UnreadableImage:
        try:
            return inspect_image(reading.image_root / name)
        except UnreadableImage as error:
            return error

    inspected: dict[str, ImageInfo] = {}
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for done, (name, result) in enumerate(zip(names, pool.map(inspect, names), strict=True), start=1):
            if isinstance(result, ImageInfo):
                inspected[name] = result
            else:
                log.drop("unreadable_image", name, str(result).removeprefix(f"{reading.image_root / name} "))
            if progress is not None:
                progress(done, len(names))
    return inspected


def _study(
    raw: RawStudy,
    inspected: Mapping[str, ImageInfo],
    table: LabelTable | None,
    labelers: Sequence[Labeler],
    split_scheme: SplitScheme,
    log: ReadLog,
) -> Study | None:
    images = tuple(sorted((_image(image, inspected[image.file]) for image in raw.images if image.file in inspected),
                          key=lambda image: image.file))  # fmt: skip
    report = raw.findings or raw.impression
    if not images and not report:
        log.drop("no report and no image", raw.uid)
        return None
    if not images:
        log.note("no_image", raw.uid)
    if not report:
        log.note("no_report", raw.uid)
    labels: dict[str, Labels] = {}
    # The labeler read the findings alone: without any, its blanks mean "nothing to read", not "not mentioned".
    if table is not None and raw.findings and raw.uid in table.labels:
        labels[LABELER_SOURCE] = table.labels[raw.uid]
    for labeler in labelers:
        if text := compose_report(raw.findings, raw.impression, labeler.sections):
            labels[labeler.name] = labeler.label(text)
    coded = mesh_labels(raw.mesh)
    if coded is not None:
        labels[MESH_SOURCE] = coded
    elif raw.mesh:
        log.note("mesh_not_indexed", raw.uid)
    assigned = assign_split(raw.uid, split_scheme)
    if split_scheme == "r2gen" and raw.split is not None and raw.split != assigned:
        log.note("split_of_the_source_kept", raw.uid, f"{raw.split} there, {assigned} in the published split")
        assigned = raw.split
    return Study(
        study_id=raw.uid,
        patient_id=raw.uid,
        images=images,
        indication=raw.indication,
        comparison=raw.comparison,
        findings=raw.findings,
        impression=raw.impression,
        mesh=raw.mesh,
        labels=labels,
        subgroups=subgroups_of({"indication": raw.indication, "comparison": raw.comparison}, raw.mesh),
        split=assigned,
    )


def _image(raw: RawImage, info: ImageInfo) -> Image:
    return Image(raw.file, info.sha256, raw.view, info.width, info.height)


def _note_labels_without_study(table: LabelTable | None, studies: Iterable[Study], log: ReadLog) -> None:
    if table is not None:
        for uid in sorted(table.labels.keys() - {study.study_id for study in studies}):
            log.note("labels_without_study", uid)


def _note_duplicates(studies: Iterable[Study], log: ReadLog) -> None:
    files: dict[str, list[str]] = defaultdict(list)
    for study in studies:
        for image in study.images:
            files[image.sha256].append(image.file)
    for first, *others in files.values():
        for other in others:
            log.note("duplicate_image", other, f"byte for byte {first}")


def _write_log(path: Path, log: ReadLog) -> None:
    """Every name behind a count: what was dropped, and what was kept but should be known."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("what", "rule", "name"))
        for what, rules in (("dropped", log.dropped), ("noted", log.noted)):
            table.writerows((what, rule, name) for rule, names in sorted(rules.items()) for name in names)


def _splits(studies: Iterable[Study]) -> dict[str, dict[str, int]]:
    table = {split: dict.fromkeys(("studies", "images", "frontal", "lateral", VIEW_UNKNOWN), 0) for split in SPLITS}
    for study in studies:
        row = table[study.split]
        row["studies"] += 1
        row["images"] += len(study.images)
        for image in study.images:
            row[image.view or VIEW_UNKNOWN] += 1
    return {split: row for split, row in table.items() if row["studies"]}


def _counts(studies: list[Study], splits: Mapping[str, Mapping[str, int]], log: ReadLog) -> dict[str, int]:
    counts = {"studies": len(studies), "images": sum(len(study.images) for study in studies)}
    for split, row in splits.items():
        counts |= {f"{split}_{what}": row[what] for what in ("studies", "images")}
    for view in ("frontal", "lateral", VIEW_UNKNOWN):
        counts[f"{view}_images"] = sum(row[view] for row in splits.values())
    return counts | {rule: len(names) for rule, names in sorted(log.noted.items())}


def _aspect(sizes: Mapping[str, int]) -> str:
    if len(sizes) == 1:
        size = next(iter(sizes))
        width, _, height = size.partition("x")
        if width == height:
            return f"as found; all images are {size} squares: squashed or padded upstream"
    return "as found"


def _refuse_name_clashes(labelers: Sequence[Labeler]) -> None:
    names = [LABELER_SOURCE, MESH_SOURCE, *(labeler.name for labeler in labelers)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Expected each source of labels once, but got {', '.join(twice)} twice.")


def _label_policies(labelers: Sequence[Labeler]) -> dict[str, str]:
    """Source of labels -> what it read, and by which rules."""
    return {
        LABELER_SOURCE: "a labeler's output on the findings alone; studies without findings are unlabelled",
        **{labeler.name: f"version {labeler.version} on {_READ[labeler.sections]}" for labeler in labelers},
        MESH_SOURCE: f"mesh_chexpert.yaml version {mesh_rule_version()}; studies nobody coded are unlabelled",
    }


def _subgroup_policy() -> str:
    return f"subgroups.yaml version {subgroup_rule_version()}; what a record does not say is left out"


def _warnings(manifest: Manifest, log: ReadLog) -> tuple[str, ...]:
    warnings = []
    if "upstream" in manifest.policies["aspect"]:
        warnings.append(f"Aspect ratio: {manifest.policies['aspect']}.")
    if not manifest.counts["images"]:
        warnings.append("No image could be read: only text tasks can use this set.")
    if manifest.counts["view_unknown_images"]:
        warnings.append(
            f"{manifest.counts['view_unknown_images']} images have no view; tasks on frontal views skip them."
        )
    for name in log.noted.get("other_layout_not_read", []):
        warnings.append(f"Two layouts lie in the folder; not read: {name}.")
    if not manifest.label_sources:
        warnings.append("No labels: give --labels a table, or rules to have the reports read.")
    return tuple(warnings)


def _summary(dropped: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{len(names)} {rule}" for rule, names in sorted(dropped.items())) or "the source is empty"

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medvlm_harness.data.prepare import PrepareReport, prepare_iu_cxr
from medvlm_harness.data.records import Dataset, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.labelers import make_labeler


def test_a_faultless_copy_is_kept_whole(kaggle_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = prepare_iu_cxr(
        kaggle_folder, labels=None, out=tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    dataset = read_dataset(report.folder)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not report.dropped
    assert (report.layout, report.studies_read, report.images_read) == ("kaggle", 3, 3)
    first = next(study for study in dataset.studies if study.study_id == "1")
    assert first.patient_id == "1"
    assert [image.file for image in first.images] == [
        "images/deep/1_IM-0001-3001.dcm.png",
        "images/deep/1_IM-0001-4001.dcm.jpg",
    ]
    assert first.images[0].sha256 == hashlib.sha256(dataset.path(first.images[0]).read_bytes()).hexdigest()
    assert (first.images[0].width, first.images[0].height) == (12, 10)
    assert first.labels["mesh"]["No Finding"] == 1


def test_the_manifest_says_what_was_read_and_how(kaggle_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("uid,edema\n1,0\n2,1\n99,1\n")
    report = prepare_iu_cxr(kaggle_folder, labels=labels, out=tmp_path / "out")
    manifest = read_dataset(report.folder).manifest
    assert manifest.counts == report.counts
    assert manifest.counts["studies"] == 3
    assert manifest.counts["images"] == manifest.counts["frontal_images"] + manifest.counts["lateral_images"] == 3
    assert manifest.counts["no_image"] == 1
    assert manifest.resolutions == {"12x10": 3}
    assert manifest.policies["aspect"] == "as found"
    assert manifest.policies["split_scheme"] == "r2gen"
    assert manifest.source_hashes.keys() == {"indiana_reports.csv", "indiana_projections.csv", "labels.csv"}
    assert manifest.source_hashes["labels.csv"] == hashlib.sha256(labels.read_bytes()).hexdigest()
    assert manifest.image_root == str(kaggle_folder.resolve())
    assert report.noted["labels_without_study"] == ("99",)
    assert sum(row["studies"] for row in report.splits.values()) == 3


def test_the_labeler_is_silent_where_it_had_nothing_to_read(kaggle_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("uid,edema\n1,\n2,\n")
    report = prepare_iu_cxr(kaggle_folder, labels=labels, out=tmp_path / "out")
    studies = {study.study_id: study for study in read_dataset(report.folder).studies}
    # 1 has findings that do not mention it; 2 has no findings; a label the table has no column for stays unknown.
    assert studies["1"].labels["chexpert_labeler"] == {"Edema": None}
    assert "chexpert_labeler" not in studies["2"].labels
    assert studies["2"].labels == {}
    assert report.noted["mesh_not_indexed"] == ("2",)


def test_a_labelers_reading_is_a_source_with_its_version(kaggle_folder: Path, tmp_path: Path) -> None:
    labeler = make_labeler("rules")
    report = prepare_iu_cxr(kaggle_folder, labels=None, labelers=[labeler], out=tmp_path / "out")
    dataset = read_dataset(report.folder)
    studies = {study.study_id: study for study in dataset.studies}
    assert dataset.manifest.label_sources == ("mesh", "rules")
    assert dataset.manifest.policies["labels_rules"] == f"version {labeler.version} on findings and impression"
    assert studies["1"].labels["rules"] == labeler.label(
        "FINDINGS: the lungs are clear\n\nIMPRESSION: no acute disease"
    )
    assert studies["1"].labels["rules"]["No Finding"] == 1
    assert studies["2"].labels.keys() == {"rules"}  # an impression alone is read too


def test_a_labeler_of_one_section_is_silent_where_that_section_is_missing(kaggle_folder: Path, tmp_path: Path) -> None:
    labeler = make_labeler("rules", sections="findings")
    report = prepare_iu_cxr(kaggle_folder, labels=None, labelers=[labeler], out=tmp_path / "out")
    dataset = read_dataset(report.folder)
    read = {study.study_id for study in dataset.studies if "rules" in study.labels}
    assert read == {study.study_id for study in dataset.studies if study.findings} == {"1", "4"}
    assert dataset.manifest.policies["labels_rules"].endswith("on the findings alone")


def test_one_source_of_labels_twice_is_refused(kaggle_folder: Path, tmp_path: Path) -> None:
    labelers = [make_labeler("rules"), make_labeler("rules", sections="findings")]
    with pytest.raises(UserError, match="each source of labels once, but got rules twice"):
        prepare_iu_cxr(kaggle_folder, labels=None, labelers=labelers, out=tmp_path / "out")


def test_unreadable_images_are_named_and_their_study_kept(kaggle_folder: Path, tmp_path: Path) -> None:
    image = kaggle_folder / "images" / "deep" / "4_IM-2050-1001.png"
    image.write_bytes(image.read_bytes()[:60])
    frontal = kaggle_folder / "images" / "deep" / "1_IM-0001-4001.dcm.jpg"
    frontal.write_text("not an image")
    report = prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / "out")
    names = [entry.partition(":")[0] for entry in report.dropped["unreadable_image"]]
    assert names == ["images/deep/1_IM-0001-4001.dcm.jpg", "images/deep/4_IM-2050-1001.png"]
    assert str(tmp_path) not in "".join(report.dropped["unreadable_image"])
    assert report.noted["no_image"] == ("2", "4")
    assert report.counts["images"] == 1
    assert [study.study_id for study in read_dataset(report.folder).studies] == ["1", "2", "4"]


def test_only_studies_with_neither_report_nor_image_are_dropped(kaggle_folder: Path, tmp_path: Path) -> None:
    with (kaggle_folder / "indiana_reports.csv").open("a") as file:
        file.write("8,normal,normal,,indication alone,,,\n9,normal,normal,,,,,\n")
    with (kaggle_folder / "indiana_projections.csv").open("a") as file:
        file.write("9,9_IM-1-1.dcm.png,Frontal\n")
    images = kaggle_folder / "images"
    shutil.copy(images / "deep" / "4_IM-2050-1001.png", images / "9_IM-1-1.png")
    report = prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / "out")
    assert report.dropped["no report and no image"] == ("8",)
    assert report.noted["no_report"] == ("9",)
    assert report.noted["duplicate_image"] == (
        "images/deep/4_IM-2050-1001.png: byte for byte images/9_IM-1-1.png",
    ) or (report.noted["duplicate_image"] == ("images/9_IM-1-1.png: byte for byte images/deep/4_IM-2050-1001.png",))
    assert report.counts["images"] == 4


def test_squares_of_one_size_are_called_squashed_or_padded(
    kaggle_folder: Path, tmp_path: Path, write_image: Callable[..., Path]
) -> None:
    for seed, path in enumerate(sorted((kaggle_folder / "images" / "deep").iterdir())):
        write_image(path, size=(16, 16), seed=seed)
    report = prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / "out")
    aspect = read_dataset(report.folder).manifest.policies["aspect"]
    assert aspect == "as found; all images are 16x16 squares: squashed or padded upstream"
    assert any("16x16" in warning for warning in report.warnings)


def test_the_splits_follow_the_scheme(kaggle_folder: Path, tmp_path: Path) -> None:
    published = prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / "a")
    hashed = prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / "b", split_scheme="hash")
    assert "unassigned" not in hashed.splits
    assert read_dataset(hashed.folder).manifest.policies["split_scheme"] == "hash"
    assert read_dataset(published.folder).manifest.policies["split_scheme"] == "r2gen"
    with pytest.raises(UserError, match="split scheme"):
        prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / "c", split_scheme="random")  # type: ignore[arg-type]


def test_preparing_twice_gives_the_same_bytes(kaggle_folder: Path, tmp_path: Path) -> None:
    first, second = (
        read_dataset(prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / name).folder) for name in ("a", "b")
    )
    assert first.sha256 == second.sha256


def test_r2gens_own_split_is_kept_and_missing_views_are_said(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    folder = tmp_path / "r2gen"
    write_image(folder / "images" / "CXR1_1_IM-0001" / "0.png")
    row = {"id": "CXR1_1_IM-0001", "report": "clear", "image_path": ["CXR1_1_IM-0001/0.png"]}
    (folder / "annotation.json").write_text(json.dumps({"test": [row]}))
    report = prepare_iu_cxr(folder, labels=None, out=tmp_path / "out")
    (study,) = read_dataset(report.folder).studies
    assert study.split == "test"
    assert len(report.noted["split_of_the_source_kept"]) == 1
    assert report.counts["view_unknown_images"] == 1
    assert any("no view" in warning for warning in report.warnings)


def test_an_empty_source_is_refused(kaggle_folder: Path, tmp_path: Path) -> None:
    (kaggle_folder / "indiana_reports.csv").write_text("uid,MeSH,indication,comparison,findings,impression\n")
    with pytest.raises(UserError, match="image_without_report"):
        prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_real_set_is_counted_to_the_last_image(iu_cxr_report: PrepareReport, iu_cxr: Dataset, shared: Path) -> None:
    listed = sum(1 for _ in (shared / "data" / "iu_cxr" / "indiana_projections.csv").open()) - 1
    assert (iu_cxr_report.layout, iu_cxr_report.studies_read, iu_cxr_report.images_read) == ("kaggle", 3851, 7426)
    assert len(iu_cxr_report.dropped["missing_image"]) == listed - 7426 == 40
    assert "unreadable_image" not in iu_cxr_report.dropped
    assert sum(len(study.images) for study in iu_cxr.studies) == 7426
    assert len(iu_cxr.studies) == 3851 - len(iu_cxr_report.dropped["no report and no image"])
    assert len(iu_cxr_report.noted["duplicate_image"]) == 3
    assert iu_cxr.manifest.resolutions == {"256x256": 7426}
    assert "squashed or padded" in iu_cxr.manifest.policies["aspect"]

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medvlm_harness.data.sources import kaggle
from medvlm_harness.data.sources.base import ReadLog, canonical_stem, file_stem, uid_of
from medvlm_harness.data.sources.detect import detect
from medvlm_harness.errors import UserError

PROJECTION_HEADER = "uid,filename,projection\n"


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_reads_reports_views_and_images_whatever_their_extension(kaggle_folder: Path) -> None:
    log = ReadLog()
    reading = kaggle.read(kaggle_folder, log)
    studies = {study.uid: study for study in reading.studies}
    assert list(studies) == ["1", "2", "4"]
    assert {(image.file, image.view) for image in studies["1"].images} == {
        ("images/deep/1_IM-0001-4001.dcm.jpg", "frontal"),
        ("images/deep/1_IM-0001-3001.dcm.png", "lateral"),
    }
    assert [image.file for image in studies["4"].images] == ["images/deep/4_IM-2050-1001.png"]
    assert studies["4"].mesh == ("Cardiomegaly/borderline", "Opacity/lung")
    assert studies["1"].findings == "the lungs are clear"
    assert studies["1"].split is None
    assert not log.dropped and not log.noted


def test_bad_report_rows_are_named_and_survived(kaggle_folder: Path) -> None:
    append(
        kaggle_folder / "indiana_reports.csv",
        "7,too,short\n,normal,normal,,,,no uid,\n1,normal,normal,,,,again,\n8,,,,#NAME?,,kept,\n\n",
    )
    log = ReadLog()
    studies = {study.uid: study for study in kaggle.read(kaggle_folder, log).studies}
    assert studies.keys() == {"1", "2", "4", "8"}
    assert studies["1"].findings == "the lungs are clear"
    assert studies["8"].indication == ""
    assert log.dropped["bad_row"] == ["indiana_reports.csv line 5: 3 cells, not 8"]
    assert len(log.dropped["missing_uid"]) == 1
    assert log.dropped["duplicate_uid"] == ["1: report 5 of indiana_reports.csv"]
    assert log.noted["text_lost_in_spreadsheet"] == ["8 indication: #NAME?"]


def test_bad_projection_rows_are_named_and_survived(kaggle_folder: Path) -> None:
    append(
        kaggle_folder / "indiana_projections.csv",
        "2,../x.png,Frontal\n2,/etc/x.png,Frontal\n2,2_IM-0-0.dcm.png,Frontal\n99,1_IM-0001-4001.png,Frontal\n"
        "1,1_IM-0001-4001.dcm.png,Frontal\n2\n",
    )
    log = ReadLog()
    kaggle.read(kaggle_folder, log)
    assert log.dropped["escaping_path"] == ["../x.png", "/etc/x.png"]
    assert log.dropped["missing_image"] == ["2_IM-0-0.dcm.png"]
    assert log.dropped["image_without_report"] == ["1_IM-0001-4001.png: uid 99"]
    assert log.dropped["duplicate_projection"] == ["1_IM-0001-4001.dcm.png"]
    assert log.dropped["bad_row"] == ["indiana_projections.csv line 10: 1 cells, not 3"]


def test_an_unknown_view_is_none_and_noted(kaggle_folder: Path) -> None:
    (kaggle_folder / "indiana_projections.csv").write_text(PROJECTION_HEADER + "4,4_IM-2050-1001.dcm.png,Oblique\n")
    log = ReadLog()
    study = next(study for study in kaggle.read(kaggle_folder, log).studies if study.uid == "4")
    assert study.images[0].view is None
    assert log.noted["unknown_view"] == ["4_IM-2050-1001.dcm.png: Oblique"]


def test_of_two_files_of_one_image_the_lossless_one_is_taken_and_said(
    kaggle_folder: Path, write_image: Callable[..., Path]
) -> None:
    write_image(kaggle_folder / "zz" / "1_IM-0001-4001.png")
    log = ReadLog()
    images = kaggle.read(kaggle_folder, log).studies[0].images
    assert images[0].file == "zz/1_IM-0001-4001.png"
    assert log.noted["several_files_of_one_image"] == [
        "zz/1_IM-0001-4001.png: taken instead of images/deep/1_IM-0001-4001.dcm.jpg"
    ]


def test_links_out_of_the_folder_are_not_followed(kaggle_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "2_IM-1-1.png").touch()
    (kaggle_folder / "2_IM-1-1.png").symlink_to(tmp_path / "secret" / "2_IM-1-1.png")
    (kaggle_folder / "linked").symlink_to(tmp_path / "secret")
    append(kaggle_folder / "indiana_projections.csv", "2,2_IM-1-1.dcm.png,Frontal\n")
    log = ReadLog()
    kaggle.read(kaggle_folder, log)
    assert log.dropped["escaping_path"] == ["2_IM-1-1.png: a link that leaves the folder"]
    assert log.dropped["missing_image"] == ["2_IM-1-1.dcm.png"]
    assert log.noted["linked_folder_not_read"] == ["linked"]


def test_images_in_no_table_are_noted(kaggle_folder: Path, write_image: Callable[..., Path]) -> None:
    write_image(kaggle_folder / "extra.png")
    log = ReadLog()
    kaggle.read(kaggle_folder, log)
    assert log.noted["image_in_no_table"] == ["extra.png"]


def test_a_missing_column_is_named(kaggle_folder: Path) -> None:
    (kaggle_folder / "indiana_reports.csv").write_text("uid,findings\n1,x\n")
    with pytest.raises(UserError, match="MeSH, indication"):
        kaggle.read(kaggle_folder, ReadLog())


def test_a_byte_order_mark_and_foreign_bytes_are_survived(kaggle_folder: Path) -> None:
    path = kaggle_folder / "indiana_reports.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"9,,,,,,caf\xe9,\n")
    log = ReadLog()
    assert len(kaggle.read(kaggle_folder, log).studies) == 4
    assert log.noted["undecodable_text"]


@pytest.mark.parametrize(
    ("name", "stem", "canonical", "uid"),
    [
        ("1000_IM-0003-1001.dcm.png", "1000_IM-0003-1001", "1000_IM-0003-1001", "1000"),
        ("a/1000_IM-0003-1001.dcm.JPG", "1000_IM-0003-1001", "1000_IM-0003-1001", "1000"),
        ("CXR54_IM-2145-1001.png", "CXR54_IM-2145-1001", "54_IM-2145-1001", "54"),
        ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-3001", "1_IM-0001-3001", "1"),
        ("CXR2084_IM-0715-1001-0002", "CXR2084_IM-0715-1001-0002", "2084_IM-0715-1001-0002", "2084"),
        ("photo.jpeg", "photo", "photo", None),
    ],
)
def test_names_of_kaggle_and_openi_map_to_each_other(name: str, stem: str, canonical: str, uid: str | None) -> None:
    assert (file_stem(name), canonical_stem(name), uid_of(name)) == (stem, canonical, uid)


def test_detection_says_what_it_looked_for_or_found(kaggle_folder: Path, tmp_path: Path) -> None:
    assert detect(kaggle_folder).NAME == "kaggle"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"indiana_reports\.csv.*ecgen-radiology.*annotation\.json"):
        detect(tmp_path / "empty")
    with pytest.raises(UserError, match="is none"):
        detect(tmp_path / "absent")
    with pytest.raises(UserError, match="Did you mean kaggle"):
        detect(kaggle_folder, layout="kagle")
    (kaggle_folder / "annotation.json").write_text("{}")
    with pytest.raises(UserError, match="found kaggle and r2gen"):
        detect(kaggle_folder)
    assert detect(kaggle_folder, layout="r2gen").NAME == "r2gen"


def test_kaggles_tables_win_over_openis_reports_and_the_log_says_so(kaggle_folder: Path) -> None:
    (kaggle_folder / "ecgen-radiology").mkdir()
    (kaggle_folder / "ecgen-radiology" / "1.xml").write_text("<eCitation/>")
    log = ReadLog()
    assert detect(kaggle_folder, log=log).NAME == "kaggle"
    assert log.noted["other_layout_not_read"]
    assert detect(kaggle_folder, layout="openi").NAME == "openi"

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from medvlm_harness.data.sources import kaggle, openi
from medvlm_harness.data.sources.base import RawStudy, ReadLog
from medvlm_harness.errors import UserError

BOMB = """<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>
<eCitation><uId id="CXR9"/><AbstractText Label="FINDINGS">&b;</AbstractText></eCitation>"""
OUTSIDE = """<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><eCitation><uId id="CXR8"/>
<AbstractText Label="FINDINGS">&a;</AbstractText></eCitation>"""


def report(uid: str, images: tuple[str, ...] = (), findings: str = "clear") -> str:
    parents = "".join(f'<parentImage id="{image}"><figureId>F1</figureId></parentImage>' for image in images)
    return f"""<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{uid}"/>
    <MedlineCitation><Article><Abstract>
    <AbstractText Label="COMPARISON">None.</AbstractText>
    <AbstractText Label="INDICATION">cough &amp; pain</AbstractText>
    <AbstractText Label="FINDINGS"> {findings}</AbstractText><AbstractText Label="IMPRESSION"/>
    </Abstract></Article></MedlineCitation>
    <MeSH><major>Opacity/lung/base</major><major> Cardiomegaly </major><automatic>opacity</automatic></MeSH>
    {parents}</eCitation>"""


REPORTS = {
    "1.xml": report("1", ("CXR1_1_IM-0001-3001",)),
    "54.xml": report("54", ("CXR54_IM-2145-1001", "CXR54_IM-2145-1002", "../../CXR54_IM-1")),
    "55.xml": report("54"),
    "7.xml": "<eCitation><uId id='CXR7'/>",
    "8.xml": OUTSIDE,
    "9.xml": BOMB,
    "10.xml": "<eCitation/>",
}


@pytest.fixture(params=["loose", "archive"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    if request.param == "loose":
        (tmp_path / "ecgen-radiology").mkdir()
        for name, text in REPORTS.items():
            (tmp_path / "ecgen-radiology" / name).write_text(text)
    else:
        write_archive(tmp_path / "NLMCXR_reports.tgz", REPORTS)
    write_image(tmp_path / "NLMCXR_png" / "CXR1_1_IM-0001-3001.png")
    write_image(tmp_path / "NLMCXR_png" / "CXR54_IM-2145-1001.png", seed=1)
    return tmp_path


def write_archive(path: Path, reports: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in reports.items():
            member = tarfile.TarInfo(f"ecgen-radiology/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def test_reads_sections_major_mesh_and_images(folder: Path) -> None:
    assert openi.matches(folder)
    reading = openi.read(folder, ReadLog())
    studies = {study.uid: study for study in reading.studies}
    assert studies.keys() == {"1", "54"}
    study = studies["54"]
    assert (study.findings, study.indication, study.comparison, study.impression) == (
        "clear",
        "cough & pain",
        "None.",
        "",
    )
    assert study.mesh == ("Opacity/lung/base", "Cardiomegaly")
    assert [(image.file, image.view) for image in study.images] == [("NLMCXR_png/CXR54_IM-2145-1001.png", None)]


def test_every_fault_is_named_and_survived(folder: Path) -> None:
    log = ReadLog()
    openi.read(folder, log)
    assert [entry.partition(":")[0] for entry in sorted(log.dropped["broken_xml"])] == ["7.xml", "8.xml", "9.xml"]
    assert log.dropped["missing_uid"] == ["10.xml"]
    assert log.dropped["duplicate_uid"] == ["54: 55.xml"]
    assert log.dropped["missing_image"] == ["CXR54_IM-2145-1002"]
    assert log.dropped["escaping_path"] == ["../../CXR54_IM-1"]


def test_views_come_from_kaggles_table_if_it_is_there(folder: Path) -> None:
    (folder / "indiana_projections.csv").write_text("uid,filename,projection\n1,1_IM-0001-3001.dcm.png,Lateral\n")
    studies = {study.uid: study for study in openi.read(folder, ReadLog()).studies}
    assert studies["1"].images[0].view == "lateral"
    assert studies["54"].images[0].view is None


def test_images_under_kaggles_names_are_found_too(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_archive(tmp_path / "reports.tar.gz", {"1.xml": report("1", ("CXR1_1_IM-0001-3001",))})
    write_image(tmp_path / "anywhere" / "1_IM-0001-3001.dcm.jpg")
    study = openi.read(tmp_path, ReadLog()).studies[0]
    assert study.images[0].file == "anywhere/1_IM-0001-3001.dcm.jpg"


def test_an_archive_is_never_unpacked_and_links_in_it_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        link = tarfile.TarInfo("ecgen-radiology/1.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        text = report("5").encode()
        climbing = tarfile.TarInfo("../../5.xml")
        climbing.size = len(text)
        archive.addfile(climbing, io.BytesIO(text))
    log = ReadLog()
    assert [study.uid for study in openi.read(tmp_path, log).studies] == ["5"]
    assert list(log.dropped) == ["not_a_file"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_oversized_reports_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openi, "MAX_XML_BYTES", 10)
    log = ReadLog()
    assert not openi.read(folder, log).studies
    assert len(log.dropped["oversized_report"]) == len(REPORTS)


def test_a_bomb_or_damaged_archive_ends_with_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reports.tgz"
    # Long enough that the first members still unpack when the end is cut off.
    write_archive(path, {f"{n}.xml": report(str(n), findings=" ".join(map(str, range(n, n + 500)))) for n in range(99)})
    with monkeypatch.context() as patch:
        patch.setattr(openi, "MAX_ARCHIVE_BYTES", 5000)
        with pytest.raises(UserError, match="unpacks to more than"):
            openi.read(tmp_path, ReadLog())
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"reports\.tgz is damaged"):
        openi.read(tmp_path, ReadLog())


def test_an_archive_of_images_is_not_this_layout(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "NLMCXR_png.tgz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("CXR1.png"))
    (tmp_path / "broken.tgz").write_bytes(b"not an archive")
    assert not openi.matches(tmp_path)


def test_openis_reports_and_kaggles_tables_are_the_same_texts(shared: Path) -> None:
    folder = shared / "data" / "iu_cxr"
    lost, log = ReadLog(), ReadLog()
    tables = {study.uid: study for study in kaggle.read(folder, lost).studies}
    reports = {study.uid: study for study in openi.read(folder, log).studies}
    assert len(tables) == 3851
    assert len(reports) == 3955
    assert tables.keys() <= reports.keys()
    assert not log.dropped["broken_xml"]

    def texts(study: RawStudy) -> tuple[object, ...]:
        return (study.indication, study.comparison, study.findings, study.impression, study.mesh)

    differing = {uid for uid, study in tables.items() if texts(study) != texts(reports[uid])}
    # Kaggle's table went through a spreadsheet: a text that began with "+" is lost there, and nothing else differs.
    assert differing == {entry.partition(" ")[0] for entry in lost.noted["text_lost_in_spreadsheet"]}

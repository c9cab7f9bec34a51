from __future__ import annotations

from pathlib import Path

import pytest

from medvlm_harness.data.chexpert import CHEXPERT_13, CHEXPERT_14
from medvlm_harness.data.labels import Uncertain, mesh_labels, read_label_table, resolve
from medvlm_harness.data.records import Dataset
from medvlm_harness.data.sources.base import ReadLog
from medvlm_harness.errors import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("header", ["uid,Edema,Pleural Effusion", "uid,chexpert_edema,CHEXPERT_PLEURAL_EFFUSION"])
def test_columns_in_any_spelling_and_cells_with_or_without_a_fraction(tmp_path: Path, header: str) -> None:
    table = read_label_table(write(tmp_path / "t.csv", f"{header}\n1,1.0,\n2,-1,0\n3,0.0,-1.0\n"))
    assert table.names == ("Edema", "Pleural Effusion")
    assert table.labels == {
        "1": {"Edema": 1, "Pleural Effusion": None},
        "2": {"Edema": -1, "Pleural Effusion": 0},
        "3": {"Edema": 0, "Pleural Effusion": -1},
    }


def test_rows_per_image_are_joined_by_the_name_of_kaggle_or_openi(tmp_path: Path) -> None:
    text = "filename,edema\n7_IM-1-1.dcm.jpg,1\nCXR7_IM-1-2.png,1.0\nCXR1_1_IM-0001-3001.png,0\nphoto.png,1\n"
    log = ReadLog()
    table = read_label_table(write(tmp_path / "t.csv", text), log)
    assert table.labels == {"7": {"Edema": 1}, "1": {"Edema": 0}}
    assert log.dropped["label_without_uid"] == ["t.csv photo.png"]


def test_wrong_cells_and_rows_that_disagree_leave_the_study_unlabelled_and_named(tmp_path: Path) -> None:
    text = "filename,uid,edema\na.png,1,yes\nb.png,1,1\nc.png,2,1\nd.png,2,0\ne.png,2,1\nf.png,3,1\n"
    log = ReadLog()
    table = read_label_table(write(tmp_path / "t.csv", text), log)
    assert table.labels == {"3": {"Edema": 1}}
    assert log.dropped["bad_label"] == ["t.csv a.png: Edema 'yes'"]
    assert log.dropped["labels_disagree"] == ["t.csv d.png: another row of this study says otherwise"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,edema\nx,1\n", "uid or filename"),
        ("uid,oedema\n1,1\n", "named as CheXpert"),
        ("uid,edema,chexpert_edema\n1,1,1\n", "one column of Edema"),
        ("uid,edema\n", "there are none"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_label_table(write(tmp_path / "t.csv", text))


def positives(*terms: str) -> set[str]:
    labels = mesh_labels(terms)
    assert labels is not None
    return {name for name, value in labels.items() if value == 1}


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("Cardiomegaly/mild", {"Cardiomegaly"}),
        ("Cardiac Shadow/enlarged", {"Cardiomegaly"}),
        ("Pulmonary Atelectasis/base/left", {"Atelectasis"}),
        ("pulmonary  atelectasis", {"Atelectasis"}),
        ("Hydropneumothorax/right", {"Pneumothorax", "Pleural Effusion"}),
        ("Thickening/pleura/apex", {"Pleural Other"}),
        ("Thickening/bronchi", set()),
        ("Nodule/lung/left", {"Lung Lesion"}),
        ("Nodule/pleura/left", {"Pleural Other"}),
        ("Calcified Granuloma/lung", set()),
        ("Granuloma/lung", set()),
        ("Opacity/lung/base", {"Lung Opacity"}),
        ("Opacity/ribs/anterior", set()),
        ("Fractures, Bone/ribs/healed", {"Fracture"}),
        ("Catheters, Indwelling/right", {"Support Devices"}),
        ("Spine/degenerative", set()),
        ("normal", {"No Finding"}),
    ],
)
def test_terms_become_observations(term: str, expected: set[str]) -> None:
    assert positives(term) == expected


def test_hedged_terms_are_uncertain_and_a_certain_one_wins() -> None:
    hedged = {
        "Cardiomegaly/borderline": "Cardiomegaly",
        "Pulmonary Congestion": "Edema",
        "Costophrenic Angle/blunted": "Pleural Effusion",
        "Surgical Instruments": "Support Devices",
        "Mediastinum/prominent": "Enlarged Cardiomediastinum",
    }
    for term, name in hedged.items():
        labels = mesh_labels([term])
        assert labels is not None and labels[name] == -1, term
    for terms in (["Pulmonary Congestion", "Pulmonary Edema"], ["Pulmonary Edema", "Pulmonary Congestion"]):
        assert positives(*terms) == {"Edema"}


def test_what_is_not_coded_is_negative_and_what_nobody_coded_is_unlabelled() -> None:
    normal = mesh_labels(["normal"])
    assert normal == {"No Finding": 1} | dict.fromkeys(CHEXPERT_13, 0)
    other = mesh_labels(["Scoliosis"])
    assert other == dict.fromkeys(CHEXPERT_14, 0)
    assert mesh_labels(["No Indexing"]) is None
    assert mesh_labels([]) is None
    assert mesh_labels([" "]) is None


def test_a_remark_on_the_image_alone_leaves_no_finding_open() -> None:
    remark = "Technical Quality of Image Unsatisfactory "
    alone, normal = mesh_labels([remark]), mesh_labels([remark, "normal"])
    assert alone is not None and alone["No Finding"] == -1
    assert normal is not None and normal["No Finding"] == 1


@pytest.mark.parametrize(
    ("uncertain", "expected"),
    [("exclude", [1, 0, None, 0, None]), ("positive", [1, 0, 1, 0, None]), ("negative", [1, 0, 0, 0, None])],
)
def test_resolving_a_label(uncertain: Uncertain, expected: list[int | None]) -> None:
    labels = {"a": 1, "b": 0, "c": -1, "d": None}
    assert [resolve(labels, name, uncertain=uncertain) for name in "abcde"] == expected
    assert resolve(None, "a", uncertain=uncertain) is None


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UserError, match="exclude, positive, negative"):
        resolve({}, "a", uncertain="maybe")  # type: ignore[arg-type]


def test_the_labelers_table_reads_without_loss(shared: Path) -> None:
    log = ReadLog()
    table = read_label_table(shared / "data" / "iu_cxr" / "labels_and_splits.csv", log)
    assert table.names == CHEXPERT_14
    assert not log.dropped


def test_the_real_set_is_labelled_only_where_a_source_had_something_to_read(iu_cxr: Dataset) -> None:
    for study in iu_cxr.studies:
        assert ("chexpert_labeler" in study.labels) == bool(study.findings)
        assert ("mesh" in study.labels) == (study.mesh != ("No Indexing",))

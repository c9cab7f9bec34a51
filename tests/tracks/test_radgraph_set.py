from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.tracks.radgraph_set import VARIABLE, find_radgraph

ENTITY = {"tokens": "effusion", "label": "OBS-DP", "start_ix": 0, "end_ix": 0, "relations": []}


def report(text: str = "effusion .") -> dict[str, Any]:
    return {"text": text, "entities": {"1": ENTITY}}


def write(path: Path, *keys: str) -> Path:
    path.write_text(json.dumps({key: report() for key in keys}))
    return path


def test_the_published_files_are_its_splits(radgraph_files: Any) -> None:
    dataset, reports = find_radgraph(radgraph_files.folder)
    by_split = {
        split: {study.study_id for study in dataset.studies if study.split == split}
        for split in ("train", "validation", "test")
    }
    assert by_split == {
        "train": set(radgraph_files.train), "validation": set(radgraph_files.dev), "test": set(radgraph_files.test)
    }  # fmt: skip
    assert dict(dataset.manifest.counts) == {split: len(ids) for split, ids in by_split.items()}
    assert [study.study_id for study in dataset.studies] == sorted(reports)
    assert all(study.findings == reports[study.study_id].text for study in dataset.studies)
    assert {len(reports[key].annotations) for key in radgraph_files.test} == {2}
    assert set(dataset.manifest.source_hashes) == {"train.json", "dev.json", "test.json"}


def test_the_environment_names_it_where_the_run_does_not(radgraph_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(radgraph_files.folder))
    assert find_radgraph(None).dataset.sha256 == find_radgraph(radgraph_files.folder).dataset.sha256


@pytest.mark.parametrize(
    ("name", "split"),
    [("MIMIC-CXR_graphs.json", "test"), ("train.json", "train"), ("dev.jsonl", "validation"), ("Test.json", "test")],
)
def test_one_file_is_the_split_of_its_name_or_test(tmp_path: Path, name: str, split: str) -> None:
    path = tmp_path / name
    if path.suffix == ".jsonl":
        path.write_text(json.dumps({"id": "a", **report()}) + "\n")
    else:
        write(path, "a")
    assert {study.split for study in find_radgraph(path).dataset.studies} == {split}
    assert {study.split for study in find_radgraph(tmp_path).dataset.studies} == {split}  # alone in a folder


@pytest.mark.parametrize(
    ("key", "patient"),
    [
        ("p15/p15004812/s53118462.txt", "p15004812"),
        ("patient05075/study1", "patient05075"),
        ("p15/s5", "p15/s5"),
        ("7", "7"),
    ],
)
def test_a_key_says_whose_report_it_is(tmp_path: Path, key: str, patient: str) -> None:
    (study,) = find_radgraph(write(tmp_path / "x.json", key)).dataset.studies
    assert (study.study_id, study.patient_id) == (key, patient)


def test_a_changed_file_is_another_data_set(tmp_path: Path, radgraph_files: Any) -> None:
    folder = shutil.copytree(radgraph_files.folder, tmp_path / "copy")
    before = find_radgraph(folder).dataset
    assert before.sha256 == find_radgraph(radgraph_files.folder).dataset.sha256  # wherever it lies
    write(folder / "dev.json", "a")
    after = find_radgraph(folder).dataset
    assert after.sha256 != before.sha256
    assert after.manifest.counts["validation"] == 1


def test_without_any_the_way_to_get_and_give_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"(?s)PhysioNet.*--metadata radgraph=PATH.*MEDVLM_RADGRAPH"):
        find_radgraph(None)


def test_what_is_wrong_with_a_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        find_radgraph(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"it has no \.json or \.jsonl file"):
        find_radgraph(tmp_path)
    write(tmp_path / "a.json", "a")
    write(tmp_path / "b.json", "b")
    with pytest.raises(UserError, match=r"it has a\.json, b\.json"):
        find_radgraph(tmp_path)
    write(tmp_path / "dev.json", "a")
    write(tmp_path / "val.json", "b")
    with pytest.raises(UserError, match=r"dev\.json and val\.json are"):
        find_radgraph(tmp_path)
    (tmp_path / "val.json").unlink()
    write(tmp_path / "test.json", "a")
    with pytest.raises(UserError, match="'a' is in two files"):
        find_radgraph(tmp_path)
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(UserError, match=r"test\.json is no RadGraph file"):
        find_radgraph(tmp_path)

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from medvlm_harness.data.records import (
    Image,
    Manifest,
    Study,
    file_sha256,
    read_dataset,
    write_dataset,
)
from medvlm_harness.errors import UserError

IMAGE = Image("a/1.png", "0" * 64, "frontal", 4, 3)
STUDIES = (
    Study("2", "p", (IMAGE,), findings="Clear.", labels={"mesh": {"Edema": 0}}, split="test"),
    Study("1", "p", labels={"mesh": {"Edema": -1}, "rules": {"Edema": None}}, subgroups={"sex": "F"}, mesh=("normal",)),
)


def manifest(folder: Path) -> Manifest:
    return Manifest("set", "demo", str(folder), "none", {}, {}, ("mesh", "rules"), ("Edema",))


def test_what_is_written_is_read_back_sorted_by_study(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", STUDIES, manifest(tmp_path))
    dataset = read_dataset(tmp_path / "set")
    assert dataset.studies == STUDIES[::-1]
    assert dataset.manifest == manifest(tmp_path)
    assert dataset.path(IMAGE) == tmp_path / "a" / "1.png"


def test_unmentioned_and_unlabelled_stay_apart(tmp_path: Path) -> None:
    write_dataset(tmp_path, STUDIES, manifest(tmp_path))
    first, second = read_dataset(tmp_path).studies
    assert first.labels["rules"] == {"Edema": None}  # read, and not mentioned
    assert "rules" not in second.labels  # had nothing to read


def test_the_same_records_are_the_same_data(tmp_path: Path) -> None:
    for name, studies in (("one", STUDIES), ("two", STUDIES[::-1]), ("other", STUDIES[:1])):
        write_dataset(tmp_path / name, studies, manifest(tmp_path))
    one, two, other = (read_dataset(tmp_path / name).sha256 for name in ("one", "two", "other"))
    assert one == two != other


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_dataset(tmp_path, STUDIES, manifest(tmp_path))
    broken = Study("3", "p", labels={"mesh": {"Edema": 300}})  # does not fit a label's eight bits
    with pytest.raises((OverflowError, ValueError)):
        write_dataset(tmp_path, [broken], manifest(tmp_path))
    assert len(read_dataset(tmp_path).studies) == 2


def test_another_schema_version_says_what_to_do(tmp_path: Path) -> None:
    write_dataset(tmp_path, STUDIES, manifest(tmp_path))
    raw = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"schema_version": 99}))
    with pytest.raises(UserError, match=r"record schema 99.*prepare"):
        read_dataset(tmp_path)


def test_a_folder_without_a_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected a prepared data set in"):
        read_dataset(tmp_path)


def test_a_file_is_hashed_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc" * 1000)
    assert file_sha256(path) == hashlib.sha256(b"abc" * 1000).hexdigest()

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvlm_harness.data.images import open_image
from medvlm_harness.data.sources.base import ReadLog
from medvlm_harness.data.sources.hub import HubError, read_hub
from medvlm_harness.errors import UserError

COLUMNS = {
    "uid": "uid",
    "findings": "findings",
    "impression": "impression",
    "mesh": "Problems",
    "image_frontal": "img_frontal",
    "image_lateral": "img_lateral",
}


@pytest.fixture
def payload(tmp_path: Path, write_image: Callable[..., Path]) -> bytes:
    return write_image(tmp_path / "made" / "a.png").read_bytes()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def row(uid: Any, frontal: Any, lateral: Any = None) -> dict[str, Any]:
    return {"uid": uid, "findings": "clear", "impression": None, "Problems": "Opacity/lung; Nodule", "other": 1,
            "img_frontal": frontal, "img_lateral": lateral}  # fmt: skip


def test_bytes_image_features_and_base64_become_the_same_files(tmp_path: Path, payload: bytes) -> None:
    text = base64.b64encode(payload).decode()
    cells = {
        "bytes": payload,
        "feature": {"bytes": payload, "path": "x.png"},
        "base64": text,
        "data_uri": f"data:image/png;base64,{text}",
    }
    for kind, cell in cells.items():
        path = write(tmp_path / kind / "train.parquet", [row(7, cell)])
        reading = read_hub(str(path), None, COLUMNS, tmp_path / "cache" / kind, ReadLog())
        (study,) = reading.studies
        assert (study.uid, study.findings, study.impression) == ("7", "clear", "")
        assert study.mesh == ("Opacity/lung", "Nodule")
        assert [(image.file, image.view) for image in study.images] == [("images/7_frontal.png", "frontal")]
        assert (reading.image_root / study.images[0].file).read_bytes() == payload
        open_image(reading.image_root / study.images[0].file)
        assert reading.revision is None


def test_a_folder_of_parquet_files_and_a_number_read_as_a_fraction(tmp_path: Path, payload: bytes) -> None:
    write(tmp_path / "hub" / "data" / "a.parquet", [row(1.0, payload), row(2.0, payload)])
    write(tmp_path / "hub" / "data" / "b.parquet", [row(3.0, None, payload)])
    log = ReadLog()
    reading = read_hub(str(tmp_path / "hub"), "abc", COLUMNS, tmp_path / "cache", log)
    assert [study.uid for study in reading.studies] == ["1", "2", "3"]
    assert reading.studies[2].images[0].view == "lateral"
    assert reading.revision == "abc"
    assert len(reading.files) == 2
    assert log.noted["no_image_in_column"] == ["1 img_lateral", "2 img_lateral", "3 img_frontal"]


def test_faults_are_named_and_survived(tmp_path: Path, payload: bytes) -> None:
    rows = [row("../evil", payload), row("", payload), row("1", b"GIF89a"), row("1", payload), row("2", payload)]
    log = ReadLog()
    path = write(tmp_path / "a.parquet", rows)
    reading = read_hub(str(path), None, COLUMNS, tmp_path / "cache", log)
    assert [study.uid for study in reading.studies] == ["1", "2"]
    assert log.dropped["escaping_path"] == ["../evil: no safe file name"]
    assert log.dropped["missing_uid"] == ["row 1"]
    assert log.dropped["unreadable_image"] == ["1 img_frontal: neither PNG nor JPEG, or above 100 MB"]
    assert log.dropped["duplicate_uid"] == ["1: row 3"]
    assert [path.name for path in (tmp_path / "cache" / "images").iterdir()] == ["2_frontal.png"]


def test_text_that_is_no_base64_is_no_image(tmp_path: Path) -> None:
    log = ReadLog()
    read_hub(str(write(tmp_path / "a.parquet", [row("1", "not base64!")])), None, COLUMNS, tmp_path / "cache", log)
    assert len(log.dropped["unreadable_image"]) == 1


def test_a_wrong_map_is_refused_by_name(tmp_path: Path, payload: bytes) -> None:
    path = str(write(tmp_path / "a.parquet", [row("1", payload)]))
    cases = [
        ({"uid": "uid", "finding": "findings"}, "Did you mean findings"),
        ({"findings": "findings"}, "column of the uid"),
        ({"uid": "uid", "mesh": "Problem"}, "Did you mean Problems"),
    ]
    for columns, message in cases:
        with pytest.raises(UserError, match=message):
            read_hub(path, None, columns, tmp_path / "cache", ReadLog())


def test_a_broken_copy_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for name, message in (("a.parquet", "no readable parquet"), ("empty", "found none")):
        with pytest.raises(UserError, match=message):
            read_hub(str(tmp_path / name), None, COLUMNS, tmp_path / "cache", ReadLog())


def test_an_unreachable_hub_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(HubError, match=r"^The Hub is not reachable for a/b: Couldn't reach it$"):
        read_hub("a/b", None, COLUMNS, tmp_path, ReadLog())


def test_a_hub_copy_keeps_the_bytes_of_its_image_features(
    tmp_path: Path, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"uid": "uid", "image": "image"}
    features = datasets.Features({"uid": datasets.Value("string"), "image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"uid": ["5"], "image": [{"bytes": payload, "path": None}]}, features=features)
    asked: list[Any] = []

    def load(*arguments: object, **options: object) -> Any:
        asked.append((arguments, options))
        return datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    reading = read_hub("a/b", "0" * 40, columns, tmp_path / "cache", ReadLog())
    assert asked == [(("a/b",), {"revision": "0" * 40})]
    assert (tmp_path / "cache" / "images" / "5_image.png").read_bytes() == payload
    assert reading.studies[0].images[0].view is None


def test_importing_the_reader_imports_no_datasets() -> None:
    code = "import sys, medvlm_harness.data.locate; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

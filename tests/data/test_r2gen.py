from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.data.sources import r2gen
from medvlm_harness.data.sources.base import ReadLog
from medvlm_harness.errors import UserError


def row(study: str, *images: str) -> dict[str, Any]:
    return {"id": study, "report": " the lungs are clear . ", "image_path": list(images), "split": "ignored"}


def write(folder: Path, annotation: object) -> Path:
    (folder / "annotation.json").write_text(json.dumps(annotation))
    return folder


def test_reads_report_split_and_numbered_images_without_views(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "images" / "CXR2384_IM-0942" / "0.png")
    annotation = {"train": [], "val": [row("CXR2384_IM-0942", "CXR2384_IM-0942/0.png", "CXR2384_IM-0942/1.png")]}
    log = ReadLog()
    assert r2gen.matches(write(tmp_path, annotation))
    (study,) = r2gen.read(tmp_path, log).studies
    assert (study.uid, study.split, study.findings) == ("2384", "validation", "the lungs are clear .")
    assert [(image.file, image.view) for image in study.images] == [("images/CXR2384_IM-0942/0.png", None)]
    assert log.dropped["missing_image"] == ["CXR2384_IM-0942/1.png"]


def test_faults_are_named_and_survived(tmp_path: Path) -> None:
    good = row("CXR1_1_IM-0001", "../../x.png", "/etc/x.png")
    rows = [good, good, row("study7"), {"id": "CXR3_IM-1"}, "text", {**good, "image_path": [3]}]
    log = ReadLog()
    (study,) = r2gen.read(write(tmp_path, {"test": rows}), log).studies
    assert (study.uid, study.images) == ("1", ())
    assert log.dropped["escaping_path"] == ["../../x.png", "/etc/x.png"]
    assert log.dropped["duplicate_uid"] == ["1: annotation.json test[1]"]
    assert log.dropped["missing_uid"] == ["annotation.json test[2]: study7"]
    assert len(log.dropped["bad_row"]) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "map each split"),
        ('{"train": 3}', "map each split"),
        ('{"trian": [{}]}', "trian"),
    ],
)
def test_a_file_that_is_not_r2gens_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "annotation.json").write_text(text)
    with pytest.raises(UserError, match=message):
        r2gen.read(tmp_path, ReadLog())

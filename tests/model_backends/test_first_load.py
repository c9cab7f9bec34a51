from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard, Source
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.first_load import FIRST_LOADS, compare_with_first_load
from medvlm_harness.model_backends.torch_backend import TorchBackend

SOURCE = Source("org/name")
CARD = ModelCard(name="some", family="dual encoder", source=SOURCE)


class Linear(TorchBackend):
    """Two numbers from a file."""

    card = CARD

    def locate(self) -> Checkpoint:
        return Checkpoint((Path(self.pretrained),))

    def load(self) -> None:
        self.model = torch.nn.Linear(1, 1)


@pytest.fixture
def load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Hash a file of this content as somebody's weights; what is warned of."""

    def run(content: str, card: ModelCard = CARD, *, name: str = "w.bin", **options: Any) -> list[str]:
        (tmp_path / name).write_text(content)
        model = Linear(pretrained=str(tmp_path / name), device="cpu", store=options.get("store", "auto"))
        model.card = card
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lm_eval.medvlm"):
            assert model.weights == {name: hashlib.sha256(content.encode()).hexdigest()}
        return [record.getMessage() for record in caplog.records]

    return run


def test_the_first_load_records_and_a_later_one_with_other_bytes_warns(load: Any, tmp_path: Path) -> None:
    assert load("one") == []
    assert json.loads((tmp_path / FIRST_LOADS).read_text()) == {
        "org/name@unpinned": {"w.bin": hashlib.sha256(b"one").hexdigest()}
    }
    assert load("one") == []
    for _ in range(2):  # and goes on warning
        (line,) = load("two")
        assert "w.bin of org/name@unpinned has other bytes" in line and str(tmp_path / FIRST_LOADS) in line
        assert "\n" not in line
    assert load("one") == []


def test_another_revision_source_or_file_is_another_thing(load: Any) -> None:
    assert load("one") == []
    assert load("two", replace(CARD, source=Source("org/name", "1" * 40))) == []
    assert load("three", replace(CARD, source=Source("org/other"))) == []
    assert load("four", name="other.bin") == []
    assert load("five", replace(CARD, source=None)) == []  # a file of the user's own
    assert len(load("two")) == 1  # negative control


def test_without_a_store_nothing_is_recorded(load: Any, tmp_path: Path) -> None:
    assert load("one", store="off") == []
    assert load("two", store="off") == []
    assert not (tmp_path / FIRST_LOADS).exists()


@pytest.mark.parametrize("store", ["auto", "off"])
def test_a_pinned_hash_is_enforced(load: Any, store: str) -> None:
    pinned = replace(CARD, source=Source("org/name", sha256={"w.bin": hashlib.sha256(b"one").hexdigest()}))
    assert load("one", pinned, store=store) == []
    assert load("anything", pinned, name="not_pinned.bin", store=store) == []
    with pytest.raises(UserError, match=r"w\.bin is not the file that the card of some pins: expected sha256"):
        load("two", pinned, store=store)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "\0"])
def test_a_record_that_is_damaged_is_told_and_left(tmp_path: Path, content: str) -> None:
    record = tmp_path / FIRST_LOADS
    record.write_text(content)
    (line,) = compare_with_first_load(SOURCE, {"f": "h"}, record)
    assert "were not compared" in line and "\n" not in line
    assert record.read_text() == content


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = compare_with_first_load(SOURCE, {"f": "h"}, tmp_path / "file" / FIRST_LOADS)
    assert "were not compared" in line


def record_one(folder: Path, number: int) -> list[str]:
    return compare_with_first_load(Source(f"org/{number}"), {"f": str(number)}, folder / FIRST_LOADS)


def test_processes_share_the_record(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(record_one, [tmp_path] * 20, range(20))) == [[]] * 20
    known = json.loads((tmp_path / FIRST_LOADS).read_text())
    assert known == {f"org/{k}@unpinned": {"f": str(k)} for k in range(20)}
    assert list(tmp_path.glob("*.partial")) == []

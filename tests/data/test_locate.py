from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvlm_harness.data import locate
from medvlm_harness.data.locate import data_root, find_dataset, user_cache
from medvlm_harness.data.prepare import prepare_iu_cxr
from medvlm_harness.data.sources.hub import HubError
from medvlm_harness.errors import UserError


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDVLM_DATA", raising=False)


def prepared(source: Path, out: Path) -> Path:
    return prepare_iu_cxr(source, labels=None, out=out).folder


def test_the_root_is_the_named_folder_or_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_root() == user_cache() == tmp_path / "cache" / "medvlm_harness" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path.home() / ".cache" / "medvlm_harness" / "data"
    monkeypatch.setenv("MEDVLM_DATA", str(tmp_path / "named"))
    assert data_root() == tmp_path / "named"


def test_places_are_tried_in_order(kaggle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = prepared(kaggle_folder, user_cache() / "iu_cxr")
    assert find_dataset("iu_cxr").folder == cached.resolve()
    monkeypatch.setenv("MEDVLM_DATA", str(tmp_path / "named"))
    assert find_dataset("iu_cxr").folder == cached.resolve()
    named = prepared(kaggle_folder, tmp_path / "named" / "iu_cxr")
    assert find_dataset("iu_cxr").folder == named.resolve()
    given = prepared(kaggle_folder, tmp_path / "given" / "iu_cxr")
    assert find_dataset("iu_cxr", data_dir=given).folder == given.resolve()
    assert find_dataset("iu_cxr", data_dir=str(given.parent)).folder == given.resolve()


def test_a_named_folder_without_the_set_is_an_error_and_nothing_else_is_tried(
    kaggle_folder: Path, tmp_path: Path
) -> None:
    prepared(kaggle_folder, user_cache() / "iu_cxr")
    with pytest.raises(UserError, match="data_dir"):
        find_dataset("iu_cxr", data_dir=tmp_path / "typo")


def test_a_set_is_read_once_until_it_is_prepared_again(kaggle_folder: Path) -> None:
    prepared(kaggle_folder, user_cache() / "iu_cxr")
    first = find_dataset("iu_cxr")
    assert find_dataset("iu_cxr") is first
    time.sleep(0.02)  # past the clock tick of coarse file systems
    prepared(kaggle_folder, user_cache() / "iu_cxr")
    assert find_dataset("iu_cxr") is not first


def test_without_any_copy_the_error_gives_the_two_commands() -> None:
    with pytest.raises(UserError) as caught:
        find_dataset("iu_cxr")
    assert str(caught.value) == (
        "no IU-CXR data found (looked in $MEDVLM_DATA/iu_cxr and the user cache; no Hub copy is named).\n"
        "       Prepare a local copy:  medvlm data prepare iu_cxr --source DIR\n"
        '       or, with a network, name a Hub copy:  --metadata \'{"hub_id": "...", "revision": "..."}\''
    )


def test_an_unreachable_hub_ends_in_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise HubError("The Hub is not reachable for a/b: no route")

    monkeypatch.setattr(locate, "read_hub", unreachable)
    with pytest.raises(UserError, match=r"the user cache; the Hub is not reachable\)\.\n +Prepare a local copy"):
        find_dataset("iu_cxr", hub={"id": "a/b", "revision": None, "columns": {"uid": "uid"}})
    assert not user_cache().exists()


def test_a_hub_copy_is_read_into_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"uid": "uid", "findings": "findings"}
    for name in ("a", "b"):
        pq.write_table(pa.table({"uid": ["1"], "findings": [name]}), tmp_path / f"{name}.parquet")
    hub = {"id": str(tmp_path / "a.parquet"), "revision": None, "columns": columns}
    dataset = find_dataset("iu_cxr", hub=hub)
    assert dataset.folder.name == "iu_cxr-hub-unpinned"
    assert (dataset.manifest.source, dataset.manifest.revision) == ("hub", None)
    with monkeypatch.context() as patch:
        patch.setattr(locate, "read_hub", None)
        assert find_dataset("iu_cxr", hub=hub) is dataset
    # Another copy under the same folder name must not be taken for the first.
    time.sleep(0.02)
    other = find_dataset("iu_cxr", hub=hub | {"id": str(tmp_path / "b.parquet")})
    assert other.studies[0].findings == "b"
    pinned = find_dataset("iu_cxr", hub=hub | {"revision": "abc/../def"})
    assert pinned.folder.name == "iu_cxr-hub-abc____def"
    assert pinned.manifest.revision == "abc/../def"


def test_the_demo_set_is_made_where_it_is_missing(kaggle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def prepare_demo(folder: Path) -> Path:  # keeps what is there, as the real one does
        if folder not in made:
            made.append(prepared(kaggle_folder, folder))
        return folder

    module = ModuleType("medvlm_harness.demo.generate")
    module.prepare_demo = prepare_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert find_dataset("demo_cxr") is find_dataset("demo_cxr")
    assert made == [user_cache() / "demo_cxr"]

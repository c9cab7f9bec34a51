"""Which tasks lm-eval's index holds with the plug-in, and what it says of the YAML that users give."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness import plugin
from medvlm_harness.errors import UserError
from medvlm_harness.tracks.declarations import check_file, declared_names, yaml_files

OURS = {"iu_cxr", "iu_cxr_zeroshot", "iu_cxr_view", "demo_cxr", "demo_cxr_zeroshot", "demo_cxr_view"}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """lm-eval's index with an empty folder in place of its 14,000 files."""
    plugin.install()
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    (tmp_path / "builtin").mkdir()
    monkeypatch.setattr(lm_eval.tasks, "__file__", str(tmp_path / "builtin" / "__init__.py"))
    applied = sys.modules["lm_eval.tasks._index"].__dict__["__medvlm_patches__"]
    unpatched = TaskIndex.build.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(TaskIndex, "build", staticmethod(unpatched))
    plugin._add_tasks(sys.modules["lm_eval.tasks._index"])
    assert "_add_tasks" in applied
    yield TaskIndex.build


def test_our_tasks_follow_the_defaults(index: Any, tmp_path: Path) -> None:
    assert set(index([tmp_path / "builtin"])) >= OURS


def test_without_defaults_only_the_folder_of_the_user_is_indexed(index: Any, stock_folder: Path) -> None:
    assert set(index([stock_folder])) == {"stock_task"}
    assert index([]) == {}


def test_our_folder_alone_can_be_asked_for(index: Any) -> None:
    assert set(index([plugin.tasks_folder()])) >= OURS


@pytest.mark.parametrize("spelling", ["as_it_is", "as_string", "through_its_parent", "through_a_link", "twice"])
def test_our_folder_given_beside_the_defaults_warns_of_nothing(
    index: Any, spelling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = plugin.tasks_folder()
    (tmp_path / "link").symlink_to(ours)
    given: dict[str, list[Any]] = {
        "as_it_is": [ours],
        "as_string": [f"{ours}/"],
        "through_its_parent": [ours / "iu_cxr" / ".."],
        "through_a_link": [tmp_path / "link"],
        "twice": [ours, ours],
    }
    with caplog.at_level(logging.WARNING):
        found = index([tmp_path / "builtin", *given[spelling]])
    assert set(found) >= OURS
    assert caplog.records == []


def test_a_user_folder_given_twice_warns_of_nothing(
    index: Any, stock_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = index([tmp_path / "builtin", stock_folder, f"{stock_folder}/."])
    assert "stock_task" in found
    assert caplog.records == []


def test_the_task_of_a_user_goes_before_ours_of_that_name(index: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "view.yaml"
    mine.parent.mkdir()
    mine.write_text("class: !function medvlm_harness.ZeroShot\ntask: iu_cxr_view\ndataset: mine\n", encoding="utf-8")
    assert index([tmp_path / "builtin", mine.parent])["iu_cxr_view"].yaml_path == mine


def test_medvlm_run_indexes_ours_and_the_folders_of_the_user_alone(
    index: Any, stock_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "builtin" / "some.yaml").write_text("task: of_lm_eval\n", encoding="utf-8")
    assert "of_lm_eval" in index([tmp_path / "builtin"])
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    monkeypatch.setattr(plugin.scope, "include_paths", (stock_folder,))
    found = set(index([tmp_path / "builtin"]))
    assert found >= OURS | {"stock_task"}
    assert "of_lm_eval" not in found


BROKEN = {
    "class: !function medvlm_harness.ZeroShot\ntask: mine\nlables: []": "unknown key 'lables'. Did you mean labels",
    "class: !function medvlm_harness.ZeroShoot\ntask: mine": "no task class 'ZeroShoot'. Did you mean ZeroShot",
    "task: mine\nmetric_lst: []": "unknown key 'metric_lst'. Did you mean metric_list",
    "task: mine\ninclude: nowhere": "cannot read",
    "task: mine\ninclude: 3": "",
    "task: mine\ninclude: broken.yaml": "Include cycle",
    "task: [": "not valid YAML",
    "tsak: mine": "unknown key 'tsak'. Did you mean task?",
    "class: !function medvlm_harness.ZeroShot": "expected `task:` to name the task, but got None",
    "group: mine\ntask: 3": "expected `task:` to list the group's tasks, but got 3",
    "group: [mine]\ntask: [a]": "expected `group:` to name the group",
    "- a": "Expected YAML dict",
    "": "Expected YAML dict",
    "\x00": "not valid YAML",
}


@pytest.mark.parametrize(("text", "message"), BROKEN.items(), ids=map(repr, BROKEN))
def test_broken_yaml_of_the_user_is_an_error_with_its_file(index: Any, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "broken.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        index([tmp_path / "builtin", tmp_path / "mine"])
    (line,) = str(raised.value).splitlines()
    assert str(tmp_path / "mine" / "broken.yaml") in line
    assert message in line


def test_a_folder_that_is_none_is_an_error(index: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"to be a folder with task YAML, but .*nowhere is not one"):
        index([tmp_path / "builtin", tmp_path / "nowhere"])


def test_yaml_of_other_tools_is_no_error(index: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other.yaml").write_text("services: {web: {image: x}}\nversion: 3\n", encoding="utf-8")
    assert set(index([tmp_path / "mine"])) == set()


def test_checking_runs_no_code_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    (tmp_path / "a.yaml").write_text("task: a\nprocess_docs: !function evil.x\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("class: !function evil.X\ntask: b\nanything: 1\n", encoding="utf-8")
    assert list(declared_names(tmp_path)) == ["a", "b"]


def test_no_task_of_lm_eval_is_called_broken() -> None:
    """The check must accept whatever lm-eval accepts: its own tasks are the best sample of that there is."""
    import lm_eval

    files = list(yaml_files(Path(lm_eval.__file__).parent / "tasks"))
    assert len(files) > 10_000
    for path in files:
        check_file(path)

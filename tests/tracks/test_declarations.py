from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from medvlm_harness import plugin
from medvlm_harness.errors import UserError
from medvlm_harness.tracks.declarations import TRACKS, check_file, declared_names, declared_tags, summarise, yaml_files

TASKS = plugin.tasks_folder()
PACKAGED = list(yaml_files(TASKS))
FOLDERS = sorted({path.parent for path in PACKAGED})
GOOD = """class: !function medvlm_harness.ZeroShot
task: mine
dataset: mine
labels: [Pneumonia]
metadata: {version: 1}
"""


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index our tasks and not lm-eval's 14,000."""
    plugin.install()
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# --- what the package declares


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
def test_each_packaged_file_loads(path: Path, ours_alone: None) -> None:
    name = check_file(path)
    assert name is not None
    assert name == path.stem.lstrip("_")
    loaded = TaskManager().load([name])["tasks"]
    assert loaded and all(task.is_medvlm for task in loaded.values())
    group = yaml.safe_load(path.read_text()) if path.name.startswith("_") else None
    assert set(loaded) == (set(group["task"]) if group else {name})


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
def test_no_packaged_file_depends_on_where_it_lies(path: Path) -> None:
    for file in {path, *path.parent.glob("_*_yaml")}:
        text = file.read_text(encoding="utf-8")
        for include in re.findall(r"^include:\s*(\S+)", text, re.MULTILINE):
            assert not Path(include).is_absolute() and ".." not in Path(include).parts
            assert (file.parent / include).is_file()
        functions = re.findall(r"!function\s+(\S+)", text)
        # One dot, none leading: a longer name would look for a file beside the YAML first.
        assert all(re.fullmatch(r"medvlm_harness\.\w+", function) for function in functions)
        assert not re.search(r"(^|[\s:\"'])/\w+/", text, re.MULTILINE)  # no absolute path of whoever wrote it


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
def test_each_declaration_has_a_version(path: Path) -> None:
    text = re.sub(r"!function \S+", "x", path.read_text(encoding="utf-8"))
    assert int(yaml.safe_load(text)["metadata"]["version"]) >= 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_names_every_task_and_group_of_its_folder(folder: Path) -> None:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    missing = [name for name in (*declared_names(folder), *declared_tags(folder)) if f"`{name}`" not in readme]
    assert not missing


def test_names_are_unique_and_no_group_matches_the_pattern_of_its_tasks() -> None:
    names = list(declared_names(TASKS))
    assert len(names) == len(set(names)) == len(PACKAGED)
    for path in PACKAGED:
        if path.name.startswith("_"):
            group = yaml.safe_load(path.read_text())
            # `--tasks 'iu_cxr_*'` would load a group iu_cxr_x and its tasks, and fail on the duplicates.
            assert all(task.startswith(f"{group['group']}_") for task in group["task"])


def test_a_pattern_loads_every_task_of_a_set(ours_alone: None) -> None:
    manager = TaskManager()
    loaded = manager.load(manager.match_tasks(["iu_cxr_*"]))["tasks"]
    group = yaml.safe_load((TASKS / "iu_cxr" / "_iu_cxr.yaml").read_text())
    assert set(loaded) == set(group["task"]) > {"iu_cxr_zeroshot", "iu_cxr_text_zeroshot"}


@pytest.mark.parametrize("name", ["iu_cxr", "demo_cxr"])
def test_the_report_reading_ceiling_asks_what_the_images_are_asked(name: str, ours_alone: None) -> None:
    tracks = ("zeroshot", "text_zeroshot", "text_probe", "image_probe")
    loaded = TaskManager().load([f"{name}_{track}" for track in tracks])["tasks"].values()
    assert len({task.label_set.labels for task in loaded}) == 1
    assert len({(tuple(task.subsets), task.no_finding_except) for task in loaded}) == 1


def test_a_tag_names_its_tasks_beside_the_pattern(ours_alone: None) -> None:
    tags = declared_tags(TASKS)
    assert tags["iu_cxr_robustness"] == ["iu_cxr_robustness_retrieval", "iu_cxr_robustness_zeroshot"]
    manager = TaskManager()
    for tag, tasks in tags.items():
        assert sorted(manager.load([tag])["tasks"]) == sorted(tasks)
        assert set(tasks) < set(declared_names(TASKS)) - {tag}


def test_a_summary_says_track_and_data_set() -> None:
    paths = declared_names(TASKS)
    assert summarise(paths["iu_cxr_zeroshot"]) == ("ZeroShot", "iu_cxr")
    assert summarise(paths["iu_cxr_retrieval"]) == ("Retrieval", "iu_cxr")
    assert summarise(paths["iu_cxr"]).kind == "group"


def test_every_track_can_be_named() -> None:
    import medvlm_harness

    assert all(hasattr(medvlm_harness, name) for name in TRACKS)


# --- what users write


def test_a_users_task_loads_beside_ours(tmp_path: Path, ours_alone: None) -> None:
    write(tmp_path, GOOD)
    task = TaskManager(include_path=str(tmp_path)).load(["mine"])["tasks"]["mine"]
    assert task.label_set.names == ("Pneumonia",)
    assert task.dump_config()["metadata"] == {"version": 1}


def test_an_include_of_the_same_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path, "dataset: mine\nlables: [A]\n", "_base_yaml")
    path = write(tmp_path, GOOD.replace("dataset: mine", "include: _base_yaml"))
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key 'lables'"):
        check_file(path)
    write(tmp_path, "dataset: mine\n", "_base_yaml")
    assert check_file(path) == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace("labels", "lables"), r"unknown key 'lables'\. Did you mean labels"),
        (lambda s: s.replace("dataset:", "data_set:"), r"unknown key 'data_set'\. Did you mean dataset"),
        (lambda s: s + "generation_kwargs: {}\n", "unknown key 'generation_kwargs'"),
        (lambda s: s + "views: [frontal\n", "not valid YAML"),
        (lambda s: s + "include: nowhere_yaml\n", "nowhere_yaml"),
        (lambda s: s + "include: mine.yaml\n", "mine"),
        (lambda s: s + "include: 3\n", "mine"),
        (lambda s: s.replace("ZeroShot", "ZeroShoot"), r"'ZeroShoot'\. Did you mean ZeroShot"),
        (lambda s: s.replace("task: mine\n", ""), "expected `task:` to name the task"),
        (lambda s: s.replace("task: mine", "task: [a, b]"), "expected `task:` to name the task"),
        (lambda s: s.replace("task: mine", "tsk: mine").replace("class:", "clas:"), r"Did you mean (task|class)"),
        (lambda s: "- a list\n- of things\n", "mine"),
        (lambda s: "group: mine\n", "expected `task:` to list"),
        (lambda s: "group: [mine]\ntask: [a]\n", "expected `group:` to name"),
        (lambda s: "task: mine\ndataset_pth: x\n", r"unknown key 'dataset_pth'\. Did you mean dataset_path"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_file(
    tmp_path: Path, change: Callable[[str], str], message: str, ours_alone: None
) -> None:
    path = write(tmp_path, change(GOOD))
    with pytest.raises(UserError, match=message) as error:
        check_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):  # and a run that includes the folder stops there
        TaskManager(include_path=str(tmp_path))


def test_another_tools_yaml_is_let_be(tmp_path: Path, ours_alone: None) -> None:
    write(tmp_path, "services:\n  web: {image: nginx}\n", "compose.yaml")
    write(tmp_path, "jobs: [a]\ntasks: [b]\n", "ci.yaml")
    write(tmp_path, GOOD)
    assert list(declared_names(tmp_path)) == ["mine"]
    assert "mine" in TaskManager(include_path=str(tmp_path)).all_tasks


def test_a_class_of_somebody_else_is_not_judged_and_not_imported(tmp_path: Path) -> None:
    write(tmp_path, "raise SystemExit('imported')\n", "theirs.py")
    path = write(tmp_path, "class: !function theirs.Task\ntask: mine\nanything: 1\n")
    assert check_file(path) == "mine"


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--include_path"):
        declared_names(tmp_path / "nowhere")

"""The `medvlm` command as a user types it: real runs in a process of their own, all else in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import pytest

from medvlm_harness import cli, plugin
from medvlm_harness.data.prepare import prepare_iu_cxr
from medvlm_harness.data.splits import assign_split

REPORTS = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
PROJECTIONS = ("uid", "filename", "projection")
MINE = "class: !function medvlm_harness.ZeroShot\ntask: {name}\ninclude: _mine\nmetadata: {{version: 3}}\n"
SHARED = """
dataset: iu_cxr
target: view
labels: {kind: multiclass, options: {frontal: "a frontal chest x-ray", lateral: "a lateral chest x-ray"}}
"""
RUN = ("run", "--model", "medvlm-baseline", "--tasks", "iu_cxr_view")


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def nothing_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, no network, and the current folder in a temporary place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # it read the variable when it was imported
    monkeypatch.setenv("MEDVLM_DEBUG", "0")  # --debug sets it for good
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MEDVLM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def medvlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call the entry point in this process."""
    import lm_eval.utils

    # What `medvlm run` sets for a process, put back after the test.
    monkeypatch.setattr(lm_eval.utils, "setup_logging", lambda *_: None)
    monkeypatch.setattr(plugin.scope, "builtin_tasks", True)
    monkeypatch.setattr(plugin.scope, "include_paths", ())

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["medvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call


def medvlm_process(*arguments: str | Path) -> Outcome:
    """The installed command."""
    program = Path(sys.executable).parent / "medvlm"
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def error_of(outcome: Outcome) -> str:
    """The one `error:` line, after it was checked that there is just one, and no traceback."""
    lines = outcome.err.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    rest = lines[lines.index(error) + 1 :]
    assert all(line.startswith("       ") for line in rest), outcome.err
    assert "Traceback" not in outcome.err
    return error.removeprefix("error: ")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with one task of the user's."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "_mine").write_text(SHARED, encoding="utf-8")
    (folder / "mine_view.yaml").write_text(MINE.format(name="mine_view"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, write_image: Callable[..., Path], write_csv: Callable[..., Path]
) -> Path:
    """$MEDVLM_DATA with twelve studies of the published test split, two views each."""
    folder = tmp_path_factory.mktemp("kaggle")
    uids = [str(uid) for uid in range(200) if assign_split(str(uid), "r2gen") == "test"][:12]
    reports = [(uid, "normal", "normal", "", "cough", "", "the lungs are clear", f"report {uid}") for uid in uids]
    views = [(uid, f"{uid}_{view}.png", view.title()) for uid in uids for view in ("frontal", "lateral")]
    write_csv(folder / "indiana_reports.csv", REPORTS, reports)
    write_csv(folder / "indiana_projections.csv", PROJECTIONS, views)
    for seed, (_, name, _) in enumerate(views):
        write_image(folder / "images" / name, seed=seed)
    out = tmp_path_factory.mktemp("data")
    prepare_iu_cxr(folder, labels=None, out=out / "iu_cxr")
    return out


# Help and lists


def test_help_names_every_command(medvlm: Command) -> None:
    status, out, err = medvlm("--help")
    assert (status, err) == (0, "")
    for command in ("run", "ls", "models", "tasks-dir", "doctor", "data"):
        assert f" {command} " in out


@pytest.mark.parametrize("group", [(), ("data",)])
def test_no_arguments_print_the_help_and_no_empty_error(medvlm: Command, group: tuple[str, ...]) -> None:
    status, out, err = medvlm(*group)
    assert (status, err) == (2, "")
    assert "Usage: medvlm" in out


@pytest.mark.parametrize(
    "command", [("run",), ("ls",), ("models",), ("doctor",), ("data", "prepare"), ("data", "info")]
)
def test_each_command_has_help(medvlm: Command, command: tuple[str, ...]) -> None:
    status, out, err = medvlm(*command, "--help")
    assert (status, err) == (0, "")
    assert f"Usage: medvlm {' '.join(command)}" in out


def test_the_installed_command_starts_without_torch() -> None:
    status, out, err = medvlm_process("tasks-dir")
    assert (status, out, err) == (0, f"{plugin.tasks_folder()}\n", "")


def test_tasks_dir_is_a_folder_with_tasks(medvlm: Command) -> None:
    folder = Path(medvlm("tasks-dir").out.rstrip("\n"))
    assert (folder / "iu_cxr" / "iu_cxr_zeroshot.yaml").is_file()


def test_ls_lists_ours_and_the_folder_of_the_user(medvlm: Command, mine: Path) -> None:
    status, out, err = medvlm("ls", "--include-path", mine)
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.endswith(".yaml") or ".yaml " in line}
    assert {"iu_cxr", "iu_cxr_zeroshot", "demo_cxr_view", "mine_view"} <= set(rows)
    assert rows["mine_view"][1:] == ["ZeroShot", "iu_cxr", str(mine / "mine_view.yaml")]
    assert rows["iu_cxr"][1] == "group"


def test_ls_check_loads_every_task(medvlm: Command, mine: Path) -> None:
    status, out, err = medvlm("ls", "--check", "--include-path", mine)
    assert (status, err) == (0, "")
    checked = [line.split() for line in out.splitlines() if ".yaml" in line]
    assert {row[0] for row in checked} >= {"mine_view", "iu_cxr_view"}
    assert {row[-1] for row in checked} == {"ok"}


def test_ls_check_names_the_task_that_does_not_load(medvlm: Command, mine: Path) -> None:
    text = "class: !function medvlm_harness.ZeroShot\ntask: unlabelled\ndataset: iu_cxr\n"
    (mine / "unlabelled.yaml").write_text(text, encoding="utf-8")
    outcome = medvlm("ls", "--check", "--include_path", mine)
    assert outcome.status == 2
    assert error_of(outcome).endswith("tasks do not load: unlabelled.")
    (row,) = [line for line in outcome.out.splitlines() if "unlabelled.yaml" in line]
    assert "expected `labels:`" in row


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_ls_refuses_a_broken_file(medvlm: Command, mine: Path, check: tuple[str, ...]) -> None:
    (mine / "broken.yaml").write_text(
        "class: !function medvlm_harness.ZeroShot\ntask: b\nlables: []\n", encoding="utf-8"
    )
    outcome = medvlm("ls", *check, "--include-path", mine)
    assert outcome.status == 2
    assert error_of(outcome) == f"{mine}/broken.yaml: unknown key 'lables'. Did you mean labels, aliases?"


def test_brackets_in_names_are_text_and_not_markup(medvlm: Command, tmp_path: Path) -> None:
    folder = tmp_path / "[bold]mine[/red]"  # a folder in a folder
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text('task: "[dim]mine"\n', encoding="utf-8")
    status, out, _ = medvlm("ls", "--include-path", folder)
    assert status == 0
    assert f"{folder}/x.yaml" in out
    assert "[dim]mine" in out


def test_a_pipe_gets_whole_rows_however_long(medvlm: Command, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["a_long_name_of_a_folder" * 4] * 5)
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text("task: mine\n", encoding="utf-8")
    assert f"{folder}/x.yaml" in medvlm("ls", "--include-path", folder).out


def test_models_lists_every_registered_model(medvlm: Command) -> None:
    status, out, err = medvlm("models")
    assert (status, err) == (0, "")
    registered = {point.name for point in entry_points(group="lm_eval.models") if point.dist.name == "medvlm-harness"}
    listed = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert registered <= listed
    assert len(registered) >= 5


def test_doctor_says_what_is_there(medvlm: Command, monkeypatch: pytest.MonkeyPatch, prepared: Path) -> None:
    monkeypatch.setattr(cli, "ACTIVE_AT_START", True)
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    status, out, err = medvlm("doctor")
    assert (status, err) == (0, "")
    rows = dict(line.strip().split("  ", 1) for line in out.splitlines() if "  " in line.strip())
    assert rows["lm-eval plug-in"].strip() == "active"
    assert rows["python"].strip() == sys.version.split()[0]
    assert rows["data iu_cxr"].strip() == str(prepared / "iu_cxr")
    assert rows["data demo_cxr"].strip() == "not prepared"


def test_doctor_fails_where_lm_eval_would_not_find_us(medvlm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ACTIVE_AT_START", False)
    status, out, _ = medvlm("doctor")
    assert status == 1
    assert "NOT active" in out


# Data


def test_prepare_prints_what_was_read_and_dropped(medvlm: Command, kaggle_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "iu_cxr"
    (kaggle_folder / "images" / "deep" / "4_IM-2050-1001.png").write_bytes(b"not an image")
    status, printed, err = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, "--out", out)
    assert (status, err) == (0, "")
    assert "read 3 studies and 2 images (layout kaggle)" in printed
    (dropped,) = [line for line in printed.splitlines() if line.startswith("  dropped: ") and "4_IM-2050-1001" in line]
    assert dropped.startswith("  dropped: 1 ")
    assert f"wrote {out}" in printed
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("option", "value", "meant"), [("--split-scheme", "r2gem", "r2gen"), ("--layout", "kagle", "kaggle")]
)
def test_prepare_names_what_was_meant(
    medvlm: Command, kaggle_folder: Path, option: str, value: str, meant: str
) -> None:
    outcome = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, option, value)
    assert outcome.status == 2
    assert f"Did you mean {meant}?" in error_of(outcome)


def test_a_table_of_labels_that_is_not_there_is_named(medvlm: Command, kaggle_folder: Path) -> None:
    outcome = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, "--labels", "nowhere.csv")
    assert outcome.status == 2
    assert "nowhere.csv" in error_of(outcome)


def test_info_shows_what_was_prepared(medvlm: Command, kaggle_folder: Path, tmp_path: Path) -> None:
    prepared = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, "--split_scheme", "hash")
    assert prepared.status == 0
    status, out, err = medvlm("data", "info", "iu_cxr")
    assert (status, err) == (0, "")
    assert out.startswith(f"iu_cxr: {tmp_path}/cache/medvlm_harness/data/iu_cxr (layout kaggle, licence ")
    for title in ("Splits", "Labels (studies)", "Sections", "Agreement between label sources"):
        assert title in out
    assert medvlm("data", "info", "iu_cxr", "--data-dir", tmp_path / "cache" / "medvlm_harness" / "data").status == 0


# Runs


def test_run_takes_dashes_and_writes_what_lm_eval_writes(
    prepared: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    (second / "_mine").write_text(SHARED, encoding="utf-8")
    (second / "second_view.yaml").write_text(MINE.format(name="second_view"), encoding="utf-8")
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    status, out, err = medvlm_process(
        *(
            "run",
            "--model",
            "medvlm-baseline",
            "--model-args",
            "kind=random,seed=3",
            "--tasks",
            "iu_cxr_*,mine_view,second_view",
        ),
        *("--include-path", mine, "--include_path", "second", "--output-path", "out", "--log-samples", "--limit=16"),
    )
    assert status == 0, err
    assert "Traceback" not in err
    names = {"iu_cxr_view", "mine_view", "second_view", "iu_cxr_retrieval"}
    (results_file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(results_file.read_text(encoding="utf-8"))
    assert names <= set(results["results"])
    assert names <= set(results["medvlm"]["tasks"])
    assert results["medvlm"]["model"]["kind"] == "random"
    assert results["versions"]["mine_view"] == 3
    assert len(list((tmp_path / "out").rglob("samples_mine_view_*.jsonl"))) == 1
    assert "95% interval" in out


def test_the_plan_counts_each_image_once_and_runs_nothing(
    medvlm: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    status, out, err = medvlm("run", "--plan", "--tasks", "iu_cxr_view,iu_cxr_retrieval")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: [int(x) for x in line.split()[1:]] for line in out.splitlines() if "iu_cxr" in line}
    documents, images, texts, new_images, new_texts = rows["iu_cxr_view"]
    assert (documents, images, texts) == (24, 24, 2)
    assert (new_images, new_texts) == (images, texts)
    assert rows["iu_cxr_retrieval"][3] == 0  # its frontal images are among those
    (total,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["all"]]
    assert [int(x) for x in total[1:]] == [sum(row[3] for row in rows.values()), sum(row[4] for row in rows.values())]


def test_a_task_file_runs_by_its_path(
    medvlm: Command, mine: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    status, out, err = medvlm("run", "--plan", "-t", mine / "mine_view.yaml")
    assert (status, err) == (0, "")
    assert "mine_view" in out


# Errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("rnu",), "No such command 'rnu'. Did you mean 'run'?"),
        (("data", "prepar"), "No such command 'prepar'. Did you mean 'prepare'?"),
        (("ls", "--chekc"), "No such option: --chekc"),
        (("ls", "surplus"), "Got unexpected extra argument"),
        (("ls", "--include-path", "nowhere"), "to be a folder with task YAML, but nowhere is not one"),
        (("data", "prepare"), "Missing argument 'name'"),
        (("data", "prepare", "iu_cxrr"), "Unknown data set 'iu_cxrr'. Did you mean iu_cxr?"),
        (("data", "prepare", "zzz"), "Unknown data set 'zzz'. Known: demo_cxr, iu_cxr."),
        (("data", "prepare", "iu_cxr"), "Expected --source DIR"),
        (("data", "prepare", "iu_cxr", "--source", "nowhere"), "nowhere is none"),
        (("data", "prepare", "demo_cxr", "--source", "nowhere"), "leave out --source, --labels and --layout"),
        (("data", "info", "iu_cxrr"), "Unknown data set 'iu_cxrr'. Did you mean iu_cxr?"),
        (("data", "info", "iu_cxr"), "no IU-CXR data found"),
        (("data", "info", "iu_cxr", "--data-dir", "nowhere"), "Expected the prepared set iu_cxr in data_dir nowhere"),
        (("run", "--model", "medvlm-tiny"), "Expected --tasks, such as --tasks 'iu_cxr_*'"),
        (("run", "--tasks", "iu_cxr_view"), "Expected --model, such as --model medvlm-tiny"),
        (
            ("run", "--model", "medvlm-tiny", "--tasks", "iu_cxr_veiw"),
            "Unknown task 'iu_cxr_veiw'. Did you mean iu_cxr_view",
        ),
        (("run", "--model", "medvlm-tiny", "--tasks", "iu_cxr_view,mmlu"), "Unknown task 'mmlu'."),
        (("run", "--model", "medvlm-tiny", "--tasks", "nowhere.yaml"), "Unknown task 'nowhere.yaml'."),
        (
            ("run", "--model", "medvlm-tinny", "--tasks", "iu_cxr_view"),
            "Unknown model 'medvlm-tinny'. Did you mean medvlm-tiny",
        ),
        ((*RUN, "--include-path", "nowhere"), "to be a folder with task YAML, but nowhere is not one"),
        ((*RUN, "--limmit", "3"), "unrecognized arguments: --limmit 3. Did you mean --limit?"),
        ((*RUN, "--debgu"), "unrecognized arguments: --debgu. Did you mean --debug?"),
        ((*RUN, "--limit", "few"), "argument --limit/-L: invalid float value: 'few'"),
        ((*RUN, "--config", "nowhere.yaml"), "Expected --config to be a YAML file, but nowhere.yaml is not one."),
        ((*RUN, "--model-args", "kind=orcle"), "Unknown kind 'orcle' of medvlm-baseline. Did you mean oracle?"),
        ((*RUN, "--model-args", "knd=oracle"), "Unknown option 'knd' of model medvlm-baseline. Did you mean kind?"),
        (RUN, "no IU-CXR data found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_user_can_mend_is_one_line_and_status_2(
    medvlm: Command, arguments: tuple[str, ...], expected: str
) -> None:
    outcome = medvlm(*arguments)
    assert outcome.status == 2
    assert expected in error_of(outcome)
    assert outcome.out == ""


def test_unknown_metadata_is_refused(medvlm: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    outcome = medvlm(*RUN, "--metadata", '{"splitt": "test"}')
    assert outcome.status == 2
    assert "unknown key 'splitt' in --metadata. Did you mean split" in error_of(outcome)


def test_a_broken_folder_stops_a_run_before_any_model_is_built(medvlm: Command, mine: Path) -> None:
    (mine / "broken.yaml").write_text("task: [", encoding="utf-8")
    outcome = medvlm(*RUN, "--include-path", mine)
    assert outcome.status == 2
    assert error_of(outcome).startswith(f"{mine}/broken.yaml: not valid YAML")


def test_a_broken_task_file_given_by_its_path_is_named(medvlm: Command, mine: Path) -> None:
    broken = mine / "broken.yaml"
    broken.write_text("class: !function medvlm_harness.ZeroShot\ntask: b\nlables: []\n", encoding="utf-8")
    outcome = medvlm("run", "--model", "medvlm-baseline", "--tasks", broken)
    assert outcome.status == 2
    assert error_of(outcome).startswith(f"{broken}: unknown key 'lables'")


def test_the_installed_command_ends_with_the_same_line_and_status() -> None:
    outcome = medvlm_process("run", "--model", "medvlm-baseline", "--tasks", "iu_cxr_veiw")
    assert outcome.status == 2
    assert error_of(outcome).startswith("Unknown task 'iu_cxr_veiw'. Did you mean iu_cxr_view")


@pytest.mark.parametrize("arguments", [("--debug", *RUN[:-1], "nowhere"), (*RUN[:-1], "nowhere", "--debug")])
def test_debug_shows_the_traceback(arguments: tuple[str, ...]) -> None:
    outcome = medvlm_process(*arguments)
    assert outcome.status == 1
    assert outcome.err.startswith("Traceback")
    assert "UserError: Unknown task 'nowhere'" in outcome.err


def test_what_nobody_expected_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Path:
        raise RuntimeError("a bug")

    monkeypatch.setattr(plugin, "tasks_folder", fails)
    monkeypatch.setattr(sys, "argv", ["medvlm", "tasks-dir"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_a_disk_that_refuses_is_one_line_and_status_1(medvlm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Path:
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr(plugin, "tasks_folder", fails)
    outcome = medvlm("tasks-dir")
    assert outcome.status == 1
    assert error_of(outcome) == "[Errno 28] No space left on device: '/data/x'"


def test_stopping_by_hand_shows_no_traceback(medvlm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(plugin, "tasks_folder", stopped)
    outcome = medvlm("tasks-dir")
    assert outcome.status == 130
    assert "Traceback" not in outcome.err


def test_the_cache_of_the_user_is_left_alone() -> None:
    assert "pytest" in os.environ["XDG_CACHE_HOME"]

"""`medvlm ls`, `tasks-dir` and `doctor`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.cli import listing


def test_tasks_dir_is_a_folder_with_tasks(medvlm: Callable[..., Any]) -> None:
    folder = Path(medvlm("tasks-dir").out.rstrip("\n"))
    assert (folder / "iu_cxr" / "iu_cxr_zeroshot.yaml").is_file()


def test_ls_lists_ours_and_the_folder_of_the_user(medvlm: Callable[..., Any], mine: Path) -> None:
    status, out, err = medvlm("ls", "--include-path", mine)
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.endswith(".yaml") or ".yaml " in line}
    assert {"iu_cxr", "iu_cxr_zeroshot", "demo_cxr_view", "mine_view"} <= set(rows)
    assert rows["mine_view"][1:] == ["ZeroShot", "iu_cxr", str(mine / "mine_view.yaml")]
    assert rows["iu_cxr"][1] == "group"


def test_ls_check_loads_every_task(medvlm: Callable[..., Any], mine: Path) -> None:
    status, out, err = medvlm("ls", "--check", "--include-path", mine)
    assert (status, err) == (0, "")
    checked = [line.split() for line in out.splitlines() if ".yaml" in line]
    assert {row[0] for row in checked} >= {"mine_view", "iu_cxr_view"}
    assert {row[-1] for row in checked} == {"ok"}


def test_ls_check_names_the_task_that_does_not_load(medvlm: Callable[..., Any], mine: Path) -> None:
    text = "class: !function medvlm_harness.ZeroShot\ntask: unlabelled\ndataset: iu_cxr\n"
    (mine / "unlabelled.yaml").write_text(text, encoding="utf-8")
    outcome = medvlm("ls", "--check", "--include_path", mine)
    assert outcome.status == 2
    assert outcome.error.endswith("tasks do not load: unlabelled.")
    (row,) = [line for line in outcome.out.splitlines() if "unlabelled.yaml" in line]
    assert "expected `labels:`" in row


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_ls_refuses_a_broken_file(medvlm: Callable[..., Any], mine: Path, check: tuple[str, ...]) -> None:
    (mine / "broken.yaml").write_text(
        "class: !function medvlm_harness.ZeroShot\ntask: b\nlables: []\n", encoding="utf-8"
    )
    outcome = medvlm("ls", *check, "--include-path", mine)
    assert outcome.status == 2
    assert outcome.error == f"{mine}/broken.yaml: unknown key 'lables'. Did you mean labels, aliases?"


def test_ls_refuses_a_folder_that_is_not_there(medvlm: Callable[..., Any]) -> None:
    outcome = medvlm("ls", "--include-path", "nowhere")
    assert outcome.status == 2
    assert "to be a folder with task YAML, but nowhere is not one" in outcome.error
    assert outcome.out == ""


def test_doctor_says_what_is_there(medvlm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, prepared: Path) -> None:
    monkeypatch.setattr(listing, "ACTIVE_AT_START", True)
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    status, out, err = medvlm("doctor")
    assert (status, err) == (0, "")
    rows = dict(line.strip().split("  ", 1) for line in out.splitlines() if "  " in line.strip())
    assert rows["lm-eval plug-in"].strip() == "active"
    assert rows["python"].strip() == sys.version.split()[0]
    assert rows["data iu_cxr"].strip() == str(prepared / "iu_cxr")
    assert rows["data demo_cxr"].strip() == "not prepared"


def test_doctor_fails_where_lm_eval_would_not_find_us(
    medvlm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "ACTIVE_AT_START", False)
    status, out, _ = medvlm("doctor")
    assert status == 1
    assert "NOT active" in out

"""What holds for every command: help, how errors end, and that nothing of the user's is touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness import plugin
from medvlm_harness.cli import main

RUN = ("run", "--model", "medvlm-baseline", "--tasks")


def test_help_names_every_command(medvlm: Callable[..., Any]) -> None:
    status, out, err = medvlm("--help")
    assert (status, err) == (0, "")
    for command in ("run", "ls", "models", "tasks-dir", "doctor", "data", "store"):
        assert f" {command} " in out


@pytest.mark.parametrize("group", [(), ("data",), ("store",)])
def test_no_arguments_print_the_help_and_no_empty_error(medvlm: Callable[..., Any], group: tuple[str, ...]) -> None:
    status, out, err = medvlm(*group)
    assert (status, err) == (2, "")
    assert "Usage: medvlm" in out


@pytest.mark.parametrize(
    "command",
    [
        ("run",),
        ("ls",),
        ("models",),
        ("doctor",),
        *(("data", name) for name in ("prepare", "info")),
        *(("store", name) for name in ("info", "prune", "verify", "export")),
    ],
)
def test_each_command_has_help(medvlm: Callable[..., Any], command: tuple[str, ...]) -> None:
    status, out, err = medvlm(*command, "--help")
    assert (status, err) == (0, "")
    assert f"Usage: medvlm {' '.join(command)}" in out


def test_the_installed_command_starts_without_torch(medvlm_process: Callable[..., Any]) -> None:
    status, out, err = medvlm_process("tasks-dir")
    assert (status, out, err) == (0, f"{plugin.tasks_folder()}\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("rnu",), "No such command 'rnu'. Did you mean 'run'?"),
        (("data", "prepar"), "No such command 'prepar'. Did you mean 'prepare'?"),
        (("ls", "--chekc"), "No such option: --chekc"),
        (("ls", "surplus"), "Got unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_user_can_mend_is_one_line_and_status_2(
    medvlm: Callable[..., Any], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in medvlm(*arguments).refusal


def test_the_installed_command_ends_with_the_same_line_and_status(medvlm_process: Callable[..., Any]) -> None:
    outcome = medvlm_process(*RUN, "iu_cxr_veiw")
    assert outcome.status == 2
    assert outcome.error.startswith("Unknown task 'iu_cxr_veiw'. Did you mean iu_cxr_view")


@pytest.mark.parametrize("arguments", [("--debug", *RUN, "nowhere"), (*RUN, "nowhere", "--debug")])
def test_debug_shows_the_traceback(medvlm_process: Callable[..., Any], arguments: tuple[str, ...]) -> None:
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
        main()


def test_a_disk_that_refuses_is_one_line_and_status_1(
    medvlm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Path:
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr(plugin, "tasks_folder", fails)
    outcome = medvlm("tasks-dir")
    assert outcome.status == 1
    assert outcome.error == "[Errno 28] No space left on device: '/data/x'"


def test_stopping_by_hand_shows_no_traceback(medvlm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(plugin, "tasks_folder", stopped)
    outcome = medvlm("tasks-dir")
    assert outcome.status == 130
    assert "Traceback" not in outcome.err


def test_the_cache_of_the_user_is_left_alone() -> None:
    assert "pytest" in os.environ["XDG_CACHE_HOME"]

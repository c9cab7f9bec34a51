"""Tables, as a command prints them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_brackets_in_names_are_text_and_not_markup(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "[bold]mine[/red]"  # a folder in a folder
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text('task: "[dim]mine"\n', encoding="utf-8")
    status, out, _ = medvlm("ls", "--include-path", folder)
    assert status == 0
    assert f"{folder}/x.yaml" in out
    assert "[dim]mine" in out


def test_a_pipe_gets_whole_rows_however_long(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["a_long_name_of_a_folder" * 4] * 5)
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text("task: mine\n", encoding="utf-8")
    assert f"{folder}/x.yaml" in medvlm("ls", "--include-path", folder).out

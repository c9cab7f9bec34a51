"""The `medvlm` command as a user types it: real runs in a process of their own, all else in this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import pytest

from medvlm_harness import plugin
from medvlm_harness.cli import main
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


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one `error:` line, after it was checked that there is just one, and no traceback."""
        lines = self.err.splitlines()
        (error,) = [line for line in lines if line.startswith("error: ")]
        rest = lines[lines.index(error) + 1 :]
        assert all(line.startswith("       ") for line in rest), self.err
        assert "Traceback" not in self.err
        return error.removeprefix("error: ")

    @property
    def refusal(self) -> str:
        """The one line of a command that was refused: status 2, and nothing on standard output."""
        assert self.status == 2
        assert self.out == ""
        return self.error


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
def medvlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the entry point in this process."""
    import lm_eval.utils

    # What `medvlm run` sets for a process, put back after the test.
    monkeypatch.setattr(lm_eval.utils, "setup_logging", lambda *_: None)
    monkeypatch.setattr(plugin.scope, "builtin_tasks", True)
    monkeypatch.setattr(plugin.scope, "include_paths", ())

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["medvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def medvlm_process() -> Callable[..., Outcome]:
    """The installed command."""

    def call(*arguments: str | Path) -> Outcome:
        program = Path(sys.executable).parent / "medvlm"
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def write_task() -> Callable[[Path, str], Path]:
    """Write a folder with one task of the user's, and give it back."""

    def write(folder: Path, name: str) -> Path:
        folder.mkdir()
        (folder / "_mine").write_text(SHARED, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(MINE.format(name=name), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def mine(tmp_path: Path, write_task: Callable[[Path, str], Path]) -> Path:
    """A folder with one task of the user's."""
    return write_task(tmp_path / "mine", "mine_view")


@pytest.fixture(scope="session")
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

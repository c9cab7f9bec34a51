"""The local Hub answers one user, refuses what came too late, and writes what arrives into its folder alone."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.demo.local_hub import TOKEN, Answer, LocalHub
from medvlm_harness.errors import UserError

BEARER = f"Bearer {TOKEN}"


def ask(hub: LocalHub, path: str, content: Any = None, *, bearer: str = BEARER) -> Answer:
    lines = content if isinstance(content, list) else [content]
    return hub.answer(path, {}, bearer, b"\n".join(json.dumps(line).encode() for line in lines))


def commit(name: str, parent: str | None) -> list[dict[str, Any]]:
    file = {"path": name, "content": base64.b64encode(b"1").decode()}
    header = {"summary": "t", **({"parentCommit": parent} if parent else {})}
    return [{"key": "header", "value": header}, {"key": "file", "value": file}]


@pytest.fixture
def hub(tmp_path: Path) -> LocalHub:
    made = LocalHub(folder=tmp_path / "hub")
    asked = {"organization": "acme", "name": "results", "type": "dataset", "visibility": "private"}
    assert ask(made, "/api/repos/create", asked).status == 200
    return made


def test_only_its_user_is_answered(hub: LocalHub) -> None:
    assert ask(hub, "/api/datasets/acme/results", bearer="Bearer other").status == 401
    assert json.loads(ask(hub, "/api/datasets/acme/results").body)["private"] is True
    assert ask(hub, "/api/datasets/acme/none").status == 404
    assert ask(hub, "/api/else").status == 404


def test_a_commit_is_written_and_one_on_an_older_head_is_not(hub: LocalHub, tmp_path: Path) -> None:
    first = hub.repos["datasets/acme/results"].shas[-1]
    assert ask(hub, "/api/datasets/acme/results/commit/main", commit("a/b.txt", first)).status == 200
    assert ask(hub, "/api/datasets/acme/results/commit/main", commit("late.txt", first)).status == 412
    written = [path.relative_to(tmp_path / "hub") for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert written == [Path("datasets/acme/results/a/b.txt")]
    assert ask(hub, "/datasets/acme/results/resolve/main/a/b.txt").body == b"1"


def test_nothing_is_written_outside_of_its_folder(hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="inside the repo"):
        ask(hub, "/api/datasets/acme/results/commit/main", commit("../../../../out.txt", None))
    assert not (tmp_path / "out.txt").exists()


def test_it_says_how_to_reach_it(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "medvlm_harness.demo.local_hub"]
    assert "usage" in subprocess.run(program, capture_output=True, text=True).stderr
    assert "usage" in subprocess.run([*program, str(tmp_path), "x"], capture_output=True, text=True).stderr
    with subprocess.Popen([*program, str(tmp_path), "0"], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        port = re.search(r":(\d+) ", line)
        assert port is not None
        second = subprocess.run([*program, str(tmp_path), port[1]], capture_output=True, text=True)
        running.terminate()
    assert f"error: port {port[1]}: " in second.stderr and second.returncode == 1
    assert line.startswith("export HF_ENDPOINT=http://127.0.0.1:")
    assert f"HF_TOKEN={TOKEN}" in line

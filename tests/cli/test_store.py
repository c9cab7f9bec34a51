"""`medvlm store`: info, prune, verify and export, as a user types them."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from medvlm_harness.requests import Embedding
from medvlm_harness.store import Space, Store

TINY = {"weights": ["ab12" * 16], "precision": "fp32"}
LARGE = {"weights": ["cd34" * 16, "ef56" * 16], "precision": "bf16"}
LARGE_WEIGHTS = hashlib.sha256(("cd34" * 16 + "ef56" * 16).encode()).hexdigest()
IMAGES = Space("embed:image", TINY, name="tiny")
TEXTS = Space("embed:text", TINY, name="tiny")
LABELS = Space("classify", LARGE, "what is seen?", name="large")
DAY = 24 * 3600


def key(number: int) -> str:
    return hashlib.sha256(f"input {number}".encode()).hexdigest()


def fill(path: Path) -> Path:
    """Answers of two models: 1,500 images and 20 texts of `tiny`, last used 40 days ago, and 3 of `large`."""
    store = Store(path)
    vector = Embedding(np.ones(16, np.float32)).to_bytes()
    store.put(IMAGES, {key(i): vector for i in range(1500)})
    store.put(TEXTS, {key(i): vector for i in range(20)})
    store.put(LABELS, {key(i): b'{"margin": [1.0]}' for i in range(3)})
    store.close()
    change(path, "UPDATE spaces SET used = ? WHERE name = 'tiny'", time.time() - 40 * DAY)
    return path


def change(path: Path, statement: str, *values: float) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement, values)


def held(path: Path) -> dict[str, int]:
    """Kind -> answers."""
    store = Store(path, read_only=True)
    found = {info.space.kind: info.answers for info in store.spaces()}
    store.close()
    return found


ALL = {"embed:image": 1500, "embed:text": 20, "classify": 3}


@pytest.fixture
def default() -> Path:
    """The store that commands take if none is named."""
    return fill(Path(os.environ["MEDVLM_STORE"]))


def row_of(printed: str, name: str) -> list[str]:
    """The cells of a model's row."""
    (row,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
    return [cell.strip() for cell in row.split("  ") if cell.strip()]


# --- info


def test_info_shows_the_file_and_a_row_per_model(medvlm: Callable[..., Any], default: Path) -> None:
    status, out, err = medvlm("store", "info")
    assert (status, err) == (0, "")
    assert out.startswith(f"{default}: ")
    assert "B, 1,523 answers\n" in out
    forty_days_ago = time.strftime("%Y-%m-%d", time.localtime(time.time() - 40 * DAY))
    tiny = row_of(out, "tiny")
    assert tiny[1:4] == ["ab12ab12ab12", "fp32", "embed:image 1,500, embed:text 20"]
    assert tiny[5].startswith(forty_days_ago)
    assert row_of(out, "large")[1:5] == [LARGE_WEIGHTS[:12], "bf16", "classify 3", "51 B"]
    assert out.index("large") < out.index("tiny")  # the last used first


def test_info_takes_another_file(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    path = fill(tmp_path / "other.sqlite")
    assert f"{path}: " in medvlm("store", "info", "--file", path).out


def test_info_works_while_a_run_is_writing(medvlm: Callable[..., Any], default: Path) -> None:
    with closing(sqlite3.connect(default, isolation_level=None)) as run:
        run.execute("BEGIN IMMEDIATE")
        run.execute("DELETE FROM answers")
        assert "1,523 answers" in medvlm("store", "info").out
        run.execute("ROLLBACK")


@pytest.mark.parametrize(
    "arguments",
    [("info",), ("prune", "--model", "tiny"), ("verify",), ("verify", "--repair"), ("export", "out.parquet")],
    ids=" ".join,
)
def test_a_store_that_is_not_there_is_an_error_and_is_not_made(
    medvlm: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    for options, path in (((), tmp_path / "store.sqlite"), (("--file", "a/b.sqlite"), Path("a/b.sqlite"))):
        outcome = medvlm("store", *arguments, *options)
        assert outcome.status == 2
        assert outcome.error == f"no store at {path}: the first run makes it; or name one with --file."
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_store_is_refused_and_stays_as_it_was(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    change(tmp_path / "theirs.sqlite", "CREATE TABLE t (a)")
    (tmp_path / "weights.pt").write_bytes(b"precious")
    before = (tmp_path / "theirs.sqlite").read_bytes()
    for arguments in (
        ("info",),
        ("prune", "--model", "x"),
        ("verify",),
        ("verify", "--repair"),
        ("export", "o.sqlite"),
    ):
        assert "another program" in medvlm("store", *arguments, "--file", "theirs.sqlite").error
        assert "a file named *.sqlite" in medvlm("store", *arguments, "--file", "weights.pt").error
    assert (tmp_path / "theirs.sqlite").read_bytes() == before
    # A lock beside it, which is empty, tells other processes to wait.
    assert {path.name for path in tmp_path.iterdir()} - {"theirs.sqlite.lock"} == {"theirs.sqlite", "weights.pt"}


# --- prune


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (("--model", "tiny"), {"classify": 3}),
        (("--model", "AB12ab"), {"classify": 3}),
        (("--model", "cd34"), {"embed:image": 1500, "embed:text": 20}),
        (("--model", LARGE_WEIGHTS[:12]), {"embed:image": 1500, "embed:text": 20}),
        (("--model", "large", "--model", "tiny"), {}),
        (("--older-than", "30d"), {"classify": 3}),
        (("--older_than", "41d"), ALL),
        (("--older-than", "30d", "--model", "large"), ALL),
        (("--max-size", "1GB"), ALL),
        (("--max_size", "0"), {}),
        (("--max-size", "0", "--older-than", "30d"), {"classify": 3}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_prune_removes_what_is_asked_and_nothing_else(
    medvlm: Callable[..., Any], default: Path, arguments: tuple[str, ...], left: dict[str, int]
) -> None:
    status, out, err = medvlm("store", "prune", *arguments)
    assert (status, err) == (0, "")
    assert held(default) == left
    removed = 1523 - sum(left.values())
    assert f"removed {removed:,} answers: " in out


def test_prune_says_what_went_and_how_much_room_was_won(medvlm: Callable[..., Any], default: Path) -> None:
    before = default.stat().st_size
    out = medvlm("store", "prune", "--model", "tiny").out
    assert "  tiny (ab12ab12ab12), embed:image: 1,500 answers\n" in out
    assert "  tiny (ab12ab12ab12), embed:text: 20 answers\n" in out
    won = out.splitlines()[-1].partition("removed 1,520 answers: ")[2]
    assert won.startswith(f"{(before - default.stat().st_size) / 1000:.1f} kB won, ")
    assert won.endswith(f" {default.stat().st_size / 1000:.1f} kB left")
    assert default.stat().st_size < before / 2


def test_a_dry_run_says_the_same_and_removes_nothing(medvlm: Callable[..., Any], default: Path) -> None:
    before = default.read_bytes()
    foretold = medvlm("store", "prune", "--model", "large", "--dry-run").out
    assert default.read_bytes() == before
    assert "would remove 3 answers: about " in foretold
    shown = foretold.splitlines()[0]
    assert shown == f"  large ({LARGE_WEIGHTS[:12]}), classify (what is seen?): 3 answers"
    assert medvlm("store", "prune", "--model", "large").out.splitlines()[0] == shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Expected one or more of --model, --older-than and --max-size"),
        (("--dry-run",), "Expected one or more of --model, --older-than and --max-size"),
        (("--model", "tinyy"), "No answers of a model 'tinyy', by name or hash of its weights. Did you mean tiny?"),
        (("--older-than", "30"), "Expected an age like 12h, 30d or 8w, but got '30'"),
        (("--max-size", "big"), "Expected a size like 500MB, 10GB or 1.5GiB, but got 'big'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_user_can_mend_is_one_line_and_status_2(
    medvlm: Callable[..., Any], default: Path, arguments: tuple[str, ...], expected: str
) -> None:
    outcome = medvlm("store", "prune", *arguments)
    assert outcome.status == 2
    assert expected in outcome.error
    assert held(default) == ALL


# --- verify


def test_a_sound_store_is_said_to_be_so(medvlm: Callable[..., Any], default: Path) -> None:
    for repair in ((), ("--repair",)):
        outcome = medvlm("store", "verify", *repair)
        assert outcome == (0, f"{default}: 1,523 answers, all sound\n", "")
    assert not list(default.parent.glob("*.damaged-*"))


def test_damaged_answers_are_counted_and_repair_leaves_them_out(medvlm: Callable[..., Any], default: Path) -> None:
    change(default, "UPDATE answers SET value = X'00' WHERE id IN (1, 2, 1000)")
    before = default.read_bytes()
    status, out, _ = medvlm("store", "verify")
    assert status == 1
    assert len(out.splitlines()) == 1
    assert f"{default} is damaged (3 of 1,523 answers): run `medvlm store verify --repair`." in out
    assert default.read_bytes() == before
    status, out, _ = medvlm("store", "verify", "--repair")
    assert status == 0
    assert "repaired: 1,520 sound answers taken over; the old file is kept beside it" in out
    assert medvlm("store", "verify").out == f"{default}: 1,520 answers, all sound\n"
    assert len(list(default.parent.glob("store.sqlite.damaged-*-[0-9]"))) == 1


def test_the_command_that_mends_names_the_store(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    fill(tmp_path / "an other.sqlite")
    change(tmp_path / "an other.sqlite", "UPDATE answers SET value = X'00' WHERE id = 1")
    out = medvlm("store", "verify", "--file", "an other.sqlite").out
    assert "run `medvlm store verify --repair --file 'an other.sqlite'`." in out
    assert medvlm("store", "verify", "--repair", "--file", "an other.sqlite").status == 0
    assert medvlm("store", "verify", "--file", "an other.sqlite").status == 0


def test_a_file_that_cannot_be_opened_is_left_alone_until_repair(medvlm: Callable[..., Any], default: Path) -> None:
    damaged = os.urandom(16_384) + default.read_bytes()[16_384:]
    default.write_bytes(damaged)
    status, out, _ = medvlm("store", "verify")
    assert status == 1
    assert "is damaged (file is not a database): run `medvlm store verify --repair`" in out
    outcome = medvlm("store", "info")
    assert outcome.status == 2
    assert "is damaged (file is not a database): run `medvlm store verify --repair`." in outcome.error
    assert default.read_bytes() == damaged
    status, out, _ = medvlm("store", "verify", "--repair")
    assert status == 0
    assert "repaired: 0 sound answers taken over" in out
    (aside,) = default.parent.glob("store.sqlite.damaged-*-[0-9]")
    assert aside.stat().st_size == len(damaged)
    assert medvlm("store", "verify").status == 0


# --- export


def test_the_stores_of_two_machines_become_one(medvlm: Callable[..., Any], default: Path, tmp_path: Path) -> None:
    second = Store(tmp_path / "second.sqlite")
    second.put(IMAGES, {key(i): b"\0" + bytes(8) for i in range(1490, 1510)})
    second.close()
    out = tmp_path / "deep" / "all.sqlite"
    assert medvlm("store", "export", out).out == f"wrote 1,523 of 1,523 answers to {out}\n"
    assert medvlm("store", "export", out, "--file", second.path).out == f"wrote 10 of 20 answers to {out}\n"
    assert held(out) == {**ALL, "embed:image": 1510}
    assert medvlm("store", "export", out).out.startswith("wrote 0 of 1,523")


def test_one_model_is_exported_alone(medvlm: Callable[..., Any], default: Path, tmp_path: Path) -> None:
    medvlm("store", "export", tmp_path / "large.sqlite", "--model", "ef56")
    assert held(tmp_path / "large.sqlite") == {"classify": 3}
    medvlm("store", "export", tmp_path / "large.parquet", "--model", "large")
    assert pq.read_table(tmp_path / "large.parquet")["text"].to_pylist() == ['{"margin": [1.0]}'] * 3


def test_a_table_has_a_row_per_answer(medvlm: Callable[..., Any], default: Path, tmp_path: Path) -> None:
    outcome = medvlm("store", "export", "answers.parquet")
    assert outcome == (0, "wrote 1,523 of 1,523 answers to answers.parquet\n", "")
    table = pq.read_table(tmp_path / "answers.parquet")
    assert table.num_rows == 1523
    assert table["vector"].null_count == 3
    assert table["text"].null_count == 1520


def test_what_is_damaged_is_not_exported(medvlm: Callable[..., Any], default: Path, tmp_path: Path) -> None:
    change(default, "UPDATE answers SET digest = X'00' WHERE id = 1")
    for name in ("out.sqlite", "out.parquet"):
        assert medvlm("store", "export", name).out == f"wrote 1,522 of 1,523 answers to {name}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("out.csv",), "Expected OUT.sqlite or OUT.parquet, but got out.csv."),
        (("out.sqlite", "--model", "tinyy"), "Did you mean tiny?"),
        (("store.sqlite",), "Expected another file than the store itself, but got store.sqlite."),
        (("there.parquet",), "there.parquet is there already: name another file, or remove it."),
        (("theirs.sqlite",), "theirs.sqlite is a database of another program"),
        ((), "Missing argument 'out'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_export_that_would_harm_is_refused(
    medvlm: Callable[..., Any], default: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "there.parquet").write_bytes(b"precious")
    change(tmp_path / "theirs.sqlite", "CREATE TABLE t (a)")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    outcome = medvlm("store", "export", *arguments)
    assert outcome.status == 2
    assert expected in outcome.error
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {name: after[name] for name in before} == before
    assert set(after) <= set(before) | {"out.sqlite", "store.sqlite-wal", "store.sqlite-shm", "theirs.sqlite.lock"}


def test_the_help_says_that_stores_are_merged(medvlm: Callable[..., Any]) -> None:
    text = " ".join(medvlm("store", "export", "--help").out.split())
    assert "the stores of several machines become one" in text


def test_a_folder_that_may_not_be_written_is_one_line(medvlm: Callable[..., Any], default: Path) -> None:
    outcome = medvlm("store", "export", "nowhere/out.parquet")
    assert outcome.status == 1
    assert "nowhere/out.parquet" in outcome.error

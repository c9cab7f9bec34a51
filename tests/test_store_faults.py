"""The store when things go wrong around it: killed writers, a full disk, no permission, two at once."""

from __future__ import annotations

import inspect
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.store import Space, Store

SPACE = Space("embed:image", {"weights": "ab"})
KILLS = 30
FOREVER = 1_000_000  # batches
CANNOT = 77  # exit status of a child that may not become another user


def batch(number: int) -> dict[str, bytes]:
    """64 answers of about the size of an embedding; each tells from its key what it must be."""
    import hashlib

    keys = [hashlib.sha256(f"{number} {item}".encode()).hexdigest() for item in range(64)]
    return {key: key.encode() * 32 for key in keys}


# Begins each program that a test runs beside itself; its log goes to `said`.
PROGRAM = f"""
import json, logging, os, resource, sys
from pathlib import Path
from medvlm_harness.store import Space, Store

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("lm_eval.medvlm").addHandler(handler)
SPACE = Space("embed:image", {{"weights": "ab"}})

{inspect.getsource(batch)}
"""


def start(program: str, *arguments: Path | str | int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM + program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(program: str, *arguments: Path | str | int) -> dict[str, Any]:
    """What a program prints at its end, as JSON."""
    with start(program, *arguments) as process:
        printed, _ = process.communicate()
    if process.returncode == CANNOT:
        pytest.skip(f"another user is needed, who may read a temporary folder: {printed.strip()}")
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(printed)
    return result


def content(path: Path) -> set[tuple[str, str, bytes]]:
    store = Store(path)
    found = list(store.rows())
    assert store.verify().sound
    store.close()
    assert len(set(found)) == len(found)
    return set(found)


# --- killed

WRITE = """
store = Store(Path(sys.argv[1]))
store._connection.execute("PRAGMA wal_autocheckpoint = 20")  # so that some are killed while they do that
print("open", flush=True)
for number in range(int(sys.argv[2])):
    if len(store.get(SPACE, batch(number))) < 64:
        store.put(SPACE, batch(number))
    print(number, flush=True)
store.close()
"""


def killed_writer(path: Path, target: int | None, pause: float) -> list[int]:
    """Kill a writer some seconds after it reported a batch, or after its start; the batches that it reported."""
    with start(WRITE, path, FOREVER) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while target is not None and f"{target}\n" not in lines[-1:]:
            lines.append(process.stdout.readline())
            assert lines[-1], "the writer ended by itself"
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    return [int(line) for line in lines if line.strip().isdigit()]


def test_a_writer_killed_thirty_times_loses_nothing_that_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "killed.sqlite"
    chance = random.Random(3)
    reported = 0  # batches
    for kill in range(KILLS):
        early = kill % 5 == 0  # before or while it opens the file
        target = None if early else reported + chance.randrange(4)
        numbers = killed_writer(path, target, pause=chance.uniform(0, 0.3 if early else 0.004))
        reported = max(reported, *(number + 1 for number in numbers), 0)
        store = Store(path, read_only=path.exists() and bool(kill % 3))  # one that may write tidies up
        found = [store.get(SPACE, batch(number)) for number in range(reported + 2)]
        store.close()
        assert found[:reported] == [batch(number) for number in range(reported)]
        assert found[reported] in ({}, batch(reported))
        assert found[reported + 1] == {}
    for name in ("killed", "undisturbed"):
        with start(WRITE, tmp_path / f"{name}.sqlite", reported + 5) as process:
            process.communicate()
        assert process.returncode == 0
    assert content(path) == content(tmp_path / "undisturbed.sqlite")
    assert not list(tmp_path.glob("*.damaged-*"))


# --- no room


def test_a_full_disk_leaves_answers_out_and_room_lets_them_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "full.sqlite")
    store.put(SPACE, batch(0))
    assert store._connection is not None
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    other = Space("embed:text", {"weights": "ab"})
    for number in (1, 2):
        store.put(SPACE, batch(number))
        store.put(other, batch(number))
        assert store.get(SPACE, batch(number)) == store.get(other, batch(number)) == {}
    assert store.get(SPACE, batch(0)) == batch(0)
    (record,) = caplog.records
    assert record.message.endswith("is full; the run goes on, and what it computes now is not kept.")
    store._connection.execute("PRAGMA max_page_count = 100000")
    for number in (1, 2):
        store.put(SPACE, batch(number))
        assert store.get(SPACE, batch(number)) == batch(number)
    assert store.verify() == (3 * 64, 0, ())
    store.close()


FILL = """
store = Store(Path(sys.argv[1]))
store.put(SPACE, batch(0))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, most))  # Python ignores the signal, so that writing fails
for number in (1, 2, 3):
    store.put(SPACE, batch(number))
refused = [number for number in (1, 2, 3) if not store.get(SPACE, batch(number))]
kept = store.get(SPACE, batch(0)) == batch(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
for number in (1, 2, 3):
    store.put(SPACE, batch(number))
late = [number for number in (1, 2, 3) if store.get(SPACE, batch(number)) == batch(number)]
print(json.dumps({"refused": refused, "kept": kept, "late": late, "said": said, "sound": store.verify().sound}))
store.close()
"""


def test_the_end_of_a_quota_is_a_full_disk(tmp_path: Path) -> None:
    result = finish(FILL, tmp_path / "quota.sqlite")
    assert result["kept"]
    assert result["refused"][-2:] == [2, 3]
    (line,) = result["said"]
    assert line.endswith("; the run goes on, and what it computes now is not kept.")
    assert (result["late"], result["sound"]) == ([1, 2, 3], True)


# --- no permission

LOOK = f"""
def cannot(why):
    print(why)
    sys.exit({CANNOT})

if os.getuid() == 0:  # for whom permissions mean nothing
    try:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    except OSError as error:
        cannot(error)
path = Path(sys.argv[1])
if not os.access(path.parent, os.X_OK | os.R_OK):
    cannot("this folder is closed")
store = Store(path)
found = []
for _ in range(3):
    found.append(store.get(SPACE, batch(0)))
    store.put(SPACE, batch(1))
others = store.get(SPACE, batch(1))
store.close()
whole = [one == batch(0) for one in found]
print(json.dumps({{"whole": whole, "nothing": not any(found), "others": len(others), "said": said}}))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="medvlm-store-"))
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("folder_mode", "file_mode"),
    [(0o555, 0o444), (0o777, 0o444), (0o555, 0o666)],
    ids=["folder and file", "file", "folder"],
)
def test_what_may_only_be_read_is_read_and_nothing_is_kept(open_folder: Path, folder_mode: int, file_mode: int) -> None:
    path = open_folder / "answers.sqlite"
    store = Store(path)
    store.put(SPACE, batch(0))
    store.close()
    path.chmod(file_mode)
    open_folder.chmod(folder_mode)
    before = path.read_bytes()
    result = finish(LOOK, path)
    assert (result["whole"], result["others"]) == ([True] * 3, 0)
    (line,) = result["said"]
    assert "not kept" in line
    assert path.read_bytes() == before


def test_what_a_killed_writer_left_in_a_closed_folder_is_read_as_far_as_may_be(
    open_folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "answers.sqlite")
    store.put(SPACE, batch(0))  # in the WAL alone
    for ending in ("", "-wal"):
        shutil.copy(f"{store.path}{ending}", f"{open_folder}/answers.sqlite{ending}")
    store.close()
    open_folder.chmod(0o555)
    result = finish(LOOK, open_folder / "answers.sqlite")
    assert result["nothing"] or all(result["whole"])
    assert result["others"] == 0
    assert result["said"]


def test_where_no_file_can_be_made_the_run_goes_on_without_one(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    result = finish(LOOK, open_folder / "answers.sqlite")
    assert result["nothing"]
    (line,) = result["said"]
    assert line.endswith("the run goes on without it, and nothing is kept.")
    assert list(open_folder.iterdir()) == []


def test_where_a_folder_is_a_file_the_run_goes_on_without_a_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path / "file" / "answers.sqlite")
    store.put(SPACE, batch(0))
    assert store.get(SPACE, batch(0)) == {}
    assert len(caplog.records) == 1


# --- two at once

SHARE = """
folder, mine, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(rounds):
    print("ready", flush=True)
    sys.stdin.readline()
    store = Store(folder / f"{number}.sqlite")
    for item in range(3):
        store.put(SPACE, batch(item))
        store.put(SPACE, batch(item + 10 * mine))
        store.put(Space(f"of {mine}", {}), batch(item))
    store.close()
print(json.dumps(said), flush=True)
"""


def shared_rounds(folder: Path, rounds: int) -> list[list[str]]:
    """Two programs begin each round at the same moment, on the same file; what each of them said."""
    pair = [start(SHARE, folder, mine, rounds) for mine in (1, 2)]
    try:
        for _ in range(rounds):
            for process in pair:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in pair:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
        return [json.loads(process.communicate()[0]) for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def everything_of_both() -> set[tuple[str, str, bytes]]:
    spaces = [(SPACE, first + item) for first in (0, 10, 20) for item in range(3)]
    spaces += [(Space(f"of {mine}", {}), item) for mine in (1, 2) for item in range(3)]
    return {(space.sha256, key, value) for space, n in spaces for key, value in batch(n).items()}


def test_two_that_make_one_file_at_the_same_moment_lose_nothing(tmp_path: Path) -> None:
    assert shared_rounds(tmp_path, rounds=8) == [[], []]
    expected = everything_of_both()
    for number in range(8):
        assert content(tmp_path / f"{number}.sqlite") == expected


def test_two_that_meet_one_damaged_file_at_the_same_moment_lose_nothing(tmp_path: Path) -> None:
    old = Space("old", {})
    store = Store(tmp_path / "0.sqlite")
    for number in range(5):
        store.put(old, batch(number))
    store.close()
    sound = store.path.read_bytes()
    damaged = [sound[: len(sound) // 2], bytes(16_384) + sound[16_384:], b"no database at all" * 99]
    for number, data in enumerate(damaged):
        (tmp_path / f"{number}.sqlite").write_bytes(data)
    for said in shared_rounds(tmp_path, rounds=len(damaged)):
        assert all("set aside as" in line for line in said)
    for number in range(len(damaged)):
        new = {row for row in content(tmp_path / f"{number}.sqlite") if row[0] != old.sha256}
        assert new == everything_of_both()
        assert len(list(tmp_path.glob(f"{number}.sqlite.damaged-*[0-9]"))) == 1

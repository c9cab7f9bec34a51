"""A damaged store: never a wrong answer, never an exception, said in the log, and mended on the way."""

from __future__ import annotations

import fcntl
import hashlib
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from medvlm_harness import store as store_module
from medvlm_harness.store import Answers, Space, Store
from medvlm_harness.store_file import PAGE_SIZE, DamagedError, create, readable

SPACES = [Space(kind, {"weights": "ab"}) for kind in ("embed:image", "embed:text", "classify")]
EACH = 120  # answers per space


class Sound(NamedTuple):
    """A store as a run left it, to be damaged."""

    data: bytes
    answers: list[Answers]  # by space


class Run(NamedTuple):
    """What a run on a damaged store had from it, before it put what it missed."""

    found: list[Answers]
    said: list[str]

    @property
    def total(self) -> int:
        """How many answers that is."""
        return sum(map(len, self.found))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests make some hundred files, and none of them is about a machine that loses its power."""

    def hasty(path: Path) -> sqlite3.Connection:
        connection = create(path)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    monkeypatch.setattr(store_module, "create", hasty)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    chance = random.Random(1)
    store = Store(tmp_path_factory.mktemp("sound") / "sound.sqlite")
    every: list[Answers] = [{} for _ in SPACES]
    for first in range(0, EACH, 24):  # the spaces lie mixed, as a run leaves them
        for space, known in zip(SPACES, every, strict=True):
            keys = [hashlib.sha256(f"{first} {item}".encode()).hexdigest() for item in range(24)]
            batch = {key: chance.randbytes(chance.choice([40, 2049, 2049])) for key in keys}
            store.put(space, batch)
            known.update(batch)
    store.close()
    return Sound(store.path.read_bytes(), every)


@pytest.fixture
def run(sound: Sound, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[Path], Run]]:
    """Do as a run does, and check what must hold whatever the damage."""
    opened = []

    def on(path: Path) -> Run:
        caplog.clear()
        store = Store(path)
        opened.append(store)
        found = []
        for space, known in zip(SPACES, sound.answers, strict=True):
            answers = store.get(space, known)
            assert answers.items() <= known.items()
            store.put(space, {key: value for key, value in known.items() if key not in answers})
            found.append(answers)
        said = [record.getMessage() for record in caplog.records]
        for line in said:
            for name in re.findall(r"set aside as (\S+),", line):
                assert (path.parent / name).is_file()
        store.close()
        # Damage that this run did not meet may be met by the next one. After it nothing is missing.
        store = Store(path)
        opened.append(store)
        for space, known in zip(SPACES, sound.answers, strict=True):
            answers = store.get(space, known)
            assert answers.items() <= known.items()
            store.put(space, {key: value for key, value in known.items() if key not in answers})
            assert store.get(space, known) == known
        return Run(found, said)

    yield on
    for store in opened:
        store.close()


def page(number: int, data: bytes, content: bytes) -> bytes:
    """The file with another content of one page, counted from 0."""
    return data[: number * PAGE_SIZE] + content + data[(number + 1) * PAGE_SIZE :]


def pages(sound: Sound) -> list[int]:
    """The first ones, which hold everything up, and a choice of the others."""
    last = len(sound.data) // PAGE_SIZE - 1
    return [*range(7), *range(7, last, 8), last]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 0.99])
def test_of_a_truncated_file_what_is_left_is_taken_over(
    sound: Sound, run: Callable[[Path], Run], tmp_path: Path, share: float
) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(sound.data[: int(share * len(sound.data))])
    had = run(path)
    assert "set aside as a.sqlite.damaged-" in had.said[0]
    assert had.total >= (share - 0.3) * len(SPACES) * EACH


@pytest.mark.parametrize("size", [0, 1, 16, 99, 512, PAGE_SIZE, 3 * PAGE_SIZE])
def test_of_a_stump_nothing_is_left_and_the_run_goes_on(
    sound: Sound, run: Callable[[Path], Run], tmp_path: Path, size: int
) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(sound.data[:size])
    had = run(path)
    assert had.total < 0.2 * len(SPACES) * EACH
    assert bool(had.said) == (size > 1)  # to SQLite both others are new files


@pytest.mark.parametrize("kind", ["zeros", "noise"])
def test_a_page_that_is_lost_takes_little_with_it(
    sound: Sound, run: Callable[[Path], Run], tmp_path: Path, kind: str
) -> None:
    for number in pages(sound):
        content = bytes(PAGE_SIZE) if kind == "zeros" else random.Random(number).randbytes(PAGE_SIZE)
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(page(number, sound.data, content))
        had = run(path)
        assert had.said or had.total == len(SPACES) * EACH
        if number >= 7:
            assert had.total > 0.9 * len(SPACES) * EACH


def test_what_is_left_beside_a_lost_page_is_counted_once(sound: Sound, tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(page(len(sound.data) // PAGE_SIZE // 2, sound.data, bytes(PAGE_SIZE)))
    store = Store(path, read_only=True)
    rows = list(store.rows())
    found = store.verify()
    store.close()
    assert 0.9 * len(SPACES) * EACH < len(rows) < len(SPACES) * EACH
    assert len(set(rows)) == len(rows) == found.answers
    assert found.damaged == 0
    assert found.problems


class BrokenTable:
    """Stands in for a connection: ids 1 to 9, and from either end reading breaks off after six."""

    def execute(self, query: str) -> Iterator[tuple[int]]:
        ids = range(1, 7) if query.endswith("ORDER BY id ASC") else range(9, 3, -1)
        yield from ((number,) for number in ids)
        raise DamagedError


def test_rows_that_can_be_read_from_both_ends_are_had_once() -> None:
    connection: Any = BrokenTable()
    assert [number for (number,) in readable(connection, "SELECT id FROM t")] == [1, 2, 3, 4, 5, 6, 9, 8, 7]


@pytest.mark.parametrize("seed", range(5))
def test_scattered_bits_are_found_out(sound: Sound, run: Callable[[Path], Run], tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(sound.data)
    for _ in range(40):
        data[chance.randrange(PAGE_SIZE, len(data))] ^= 1 << chance.randrange(8)
    path = tmp_path / "a.sqlite"
    path.write_bytes(data)
    had = run(path)
    assert had.said
    assert 0.5 * len(SPACES) * EACH < had.total < len(SPACES) * EACH


@pytest.mark.parametrize("offset", [16, 18, 20, 28, 47, 52, 59, 100, 104, 105])
def test_a_damaged_header_costs_no_exception(
    sound: Sound, run: Callable[[Path], Run], tmp_path: Path, offset: int
) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(sound.data[:offset] + bytes([sound.data[offset] ^ 0x55]) + sound.data[offset + 1 :])
    had = run(path)
    assert had.said or had.total == len(SPACES) * EACH
    # Nothing of the size that a damaged number asks for.
    assert all(one.stat().st_size < 4 * len(sound.data) for one in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["answers", "spaces", "sqlite_autoindex_answers_1"])
def test_a_damaged_schema_costs_no_exception(
    sound: Sound, run: Callable[[Path], Run], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "a.sqlite"
    # No name that was looked for, and no text: Python cannot decode what SQLite says of it.
    path.write_bytes(sound.data.replace(name.encode(), b"\xff" + name[1:].encode()))
    had = run(path)
    assert "set aside as" in had.said[0]


def test_a_text_with_the_name_of_a_store_is_set_aside_as_it_was(run: Callable[[Path], Run], tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    path.write_text("no database at all\n" * 5000, encoding="utf-8")
    had = run(path)
    (line,) = had.said
    assert "file is not a database; set aside as" in line
    (aside,) = tmp_path.glob("a.sqlite.damaged-*[0-9]")
    assert aside.read_text(encoding="utf-8") == "no database at all\n" * 5000


VALUES = ("NULL", "99", "'text'", "X'00'")


@pytest.mark.parametrize("column", ["sha256", "name", "kind", "content", "used"])
def test_a_space_of_the_wrong_type_costs_no_exception(sound: Sound, tmp_path: Path, column: str) -> None:
    for number, value in enumerate(VALUES):
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(sound.data)
        change_unchecked(path, f"UPDATE spaces SET {column} = {value} WHERE kind = 'embed:image'")  # noqa: S608
        store = Store(path)
        store.spaces()
        store.verify()
        list(store.rows())
        store.rebuild()
        assert store.get(SPACES[0], sound.answers[0]).items() <= sound.answers[0].items()
        assert store.get(SPACES[1], sound.answers[1]) == sound.answers[1]
        store.close()


@pytest.mark.parametrize("column", ["space", "input", "value", "digest"])
def test_an_answer_of_the_wrong_type_is_never_given(sound: Sound, tmp_path: Path, column: str) -> None:
    for number, value in enumerate(VALUES):
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(sound.data)
        change_unchecked(path, f"UPDATE answers SET {column} = {value} WHERE id = 5")  # noqa: S608
        store = Store(path)
        assert store.verify().damaged == 1
        assert len(list(store.rows())) == len(SPACES) * EACH - 1
        found = [store.get(space, known) for space, known in zip(SPACES, sound.answers, strict=True)]
        assert sum(map(len, found)) == len(SPACES) * EACH - 1
        assert all(got.items() <= known.items() for got, known in zip(found, sound.answers, strict=True))
        store.close()


def change_unchecked(path: Path, statement: str) -> None:
    """Change rows as damage does: whatever the schema asks of a column."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '         ')")
        version = connection.execute("PRAGMA schema_version").fetchone()[0]
        connection.execute(f"PRAGMA schema_version = {version + 1}")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def test_where_there_is_no_room_to_take_answers_over_the_reason_is_said(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def small(path: Path) -> sqlite3.Connection:
        connection = create(path)
        connection.execute("PRAGMA max_page_count = 10")
        return connection

    path = tmp_path / "a.sqlite"
    path.write_bytes(sound.data)
    monkeypatch.setattr(store_module, "create", small)
    store = Store(path)
    assert store.rebuild() == 0
    (aside,) = tmp_path.glob("a.sqlite.damaged-*[0-9]")
    why, what = (record.getMessage() for record in caplog.records)
    assert why.endswith(f"nothing is taken over from {aside.name}: database or disk is full.")
    assert what.endswith(f"set aside as {aside.name}, 0 answers taken over.")
    assert store.get(SPACES[0], sound.answers[0]) == {}
    store.close()


# --- the write-ahead log

WAL_DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "none": lambda wal, _: wal,
    "truncated": lambda wal, _: wal[: len(wal) // 2],
    "headless": lambda wal, _: bytes(32) + wal[32:],
    "noise": lambda wal, chance: wal[: len(wal) // 3] + chance.randbytes(20_000) + wal[len(wal) // 3 + 20_000 :],
    "all noise": lambda wal, chance: chance.randbytes(len(wal)),
    "one bit": lambda wal, _: wal[:50_000] + bytes([wal[50_000] ^ 1]) + wal[50_001:],
    "empty": lambda wal, _: b"",
    "twice": lambda wal, _: wal + wal,
}


@pytest.mark.parametrize(("damage", "shm"), [*((name, False) for name in WAL_DAMAGE), ("none", True)])
def test_a_damaged_log_costs_no_more_than_what_was_in_it(
    sound: Sound, run: Callable[[Path], Run], tmp_path: Path, damage: str, shm: bool
) -> None:
    before = tmp_path / "before.sqlite"
    before.write_bytes(sound.data)
    added = {key[::-1]: value for key, value in sound.answers[0].items()}
    store = Store(before)
    store.put(SPACES[0], added)
    path = tmp_path / "a.sqlite"
    shutil.copy(before, path)
    Path(f"{path}-wal").write_bytes(WAL_DAMAGE[damage](Path(f"{before}-wal").read_bytes(), random.Random(1)))
    if shm:
        Path(f"{path}-shm").write_bytes(random.Random(2).randbytes(32_768))
    store.close()
    store = Store(path)
    found = store.get(SPACES[0], added)
    assert found.items() <= added.items()
    if damage == "none":
        assert found == added
    store.put(SPACES[0], added)
    assert store.get(SPACES[0], added) == added
    store.close()
    assert run(path).total == len(SPACES) * EACH


# --- two that have it open


def test_who_has_the_old_file_open_while_another_sets_it_aside_goes_on(
    sound: Sound, run: Callable[[Path], Run], tmp_path: Path
) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(sound.data)
    first, second = Store(path), Store(path)
    assert second.get(SPACES[0], sound.answers[0]) == sound.answers[0]
    assert first.rebuild() == len(SPACES) * EACH
    new = {key[::-1]: value for key, value in sound.answers[1].items()}
    second.put(SPACES[1], new)
    assert second.get(SPACES[1], new) == new
    second.close()  # and takes nothing of the new file with it
    assert first.get(SPACES[2], sound.answers[2]) == sound.answers[2]
    first.put(SPACES[2], new)
    first.close()
    assert run(path).total == len(SPACES) * EACH


def test_who_meets_damage_that_another_has_mended_goes_on_with_the_new_file(
    sound: Sound, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(page(len(sound.data) // PAGE_SIZE // 2, sound.data, bytes(PAGE_SIZE)))
    first, second = Store(path), Store(path)
    for store in (first, second):
        for space, known in zip(SPACES, sound.answers, strict=True):
            found = store.get(space, known)
            assert found.items() <= known.items()
            store.put(space, {key: value for key, value in known.items() if key not in found})
    for space, known in zip(SPACES, sound.answers, strict=True):
        assert first.get(space, known) == second.get(space, known) == known
    for store in (first, second):
        store.close()
    assert len(list(tmp_path.glob("a.sqlite.damaged-*[0-9]"))) == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_nobody_sets_a_file_aside_while_it_is_being_opened(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    path = tmp_path / "a.sqlite"
    if there:
        path.write_bytes(sound.data)
    refused = []

    def watched(target: Path) -> sqlite3.Connection:
        with Path(f"{target}.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(target)
        return create(target)

    monkeypatch.setattr(store_module, "create", watched)
    Store(path).close()
    assert refused == [path]


def test_a_folder_where_no_lock_can_be_had_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise NotImplementedError("this file system has no locks")

    monkeypatch.setattr(store_module.FileLock, "acquire", fails)
    store = Store(tmp_path / "a.sqlite")
    store.put(SPACES[0], {"00": b"x"})
    assert store.get(SPACES[0], ["00"]) == {"00": b"x"}
    store.close()
    assert caplog.records == []
    store.path.write_bytes(b"no database at all" * 99)
    store = Store(store.path)  # which may not be set aside without a lock
    assert store.get(SPACES[0], ["00"]) == {}
    store.close()
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == [
        "the run goes on without it, and nothing is kept."
    ]


def test_a_file_that_was_removed_while_it_was_open_costs_no_exception(sound: Sound, tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(sound.data)
    store = Store(path)
    store.get(SPACES[0], sound.answers[0])
    for one in tmp_path.iterdir():
        one.unlink()
    for space, known in zip(SPACES, sound.answers, strict=True):
        store.put(space, known)
        assert store.get(space, known).items() <= known.items()
    store.close()
    store = Store(path)
    store.put(SPACES[0], sound.answers[0])
    assert store.get(SPACES[0], sound.answers[0]) == sound.answers[0]
    store.close()

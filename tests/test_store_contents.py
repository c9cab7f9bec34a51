"""What a store tells of its contents, and how they are removed, copied, checked and begun anew."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from medvlm_harness import store as module
from medvlm_harness.store import Answers, Space, Store

MODEL = {"weights": ["ab", "cd"], "precision": "fp32", "options": {"size": 224}}
SPACE = Space("embed:image", MODEL, prompt="a prompt", perturbation="noise@3", name="tiny")
SPACES = [
    Space("embed:image", MODEL, name="b"),
    Space("embed:text", MODEL, name="b"),
    Space("classify", {"weights": "ef"}, "which?", "blur@1", name="a"),
]


def key(number: int) -> str:
    return hashlib.sha256(f"input {number}".encode()).hexdigest()


def answers(count: int, tag: str = "") -> Answers:
    return {key(i): f"answer {tag}{i}".encode() * 30 for i in range(count)}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Open stores in a temporary folder, closed at the end."""
    opened = []

    def open_named(name: str = "answers.sqlite") -> Store:
        opened.append(Store(tmp_path / name))
        return opened[-1]

    yield open_named
    for one in opened:
        one.close()


@pytest.fixture
def store(make: Callable[..., Store]) -> Store:
    return make()


@pytest.fixture
def filled(store: Store) -> Store:
    """Three spaces of 1, 2 and 3 answers."""
    for count, space in enumerate(SPACES, start=1):
        store.put(space, answers(count, space.kind))
    return store


def test_spaces_tell_what_is_there_and_how_much(filled: Store) -> None:
    found = filled.spaces()
    assert [info.space for info in found] == [SPACES[2], SPACES[0], SPACES[1]]  # by name, then by kind
    assert [info.space.name for info in found] == ["a", "b", "b"]
    assert [info.answers for info in found] == [3, 1, 2]
    assert [info.bytes for info in found] == [
        sum(map(len, answers(info.answers, info.space.kind).values())) for info in found
    ]


def test_use_is_noted_once_per_process_by_get_and_by_put(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(moment: float) -> None:
        monkeypatch.setattr(module.time, "time", lambda: moment)

    def used(opened: Store) -> float:
        (info,) = opened.spaces()
        return info.used

    at(100.0)
    first = make()
    first.put(SPACE, answers(1))
    at(200.0)
    first.get(SPACE, answers(1))
    assert used(first) == 100.0
    second = make()
    second.get(SPACE, [key(5)])
    assert used(second) == 200.0
    at(300.0)
    third = make()
    third.put(SPACE, answers(1))
    assert used(third) == 300.0


def test_prune_removes_only_what_is_named_and_shrinks_the_file(store: Store) -> None:
    store.put(SPACES[0], {key(i): os.urandom(2000) for i in range(1000)})
    store.put(SPACES[1], answers(50))
    store.put(SPACES[2], answers(20))
    before = store.path.stat().st_size + Path(f"{store.path}-wal").stat().st_size
    assert store.prune([SPACES[0].sha256, SPACES[2].sha256, "00"]) == 1020
    assert [info.space for info in store.spaces()] == [SPACES[1]]
    assert store.get(SPACES[1], answers(50)) == answers(50)
    assert store.get(SPACES[0], answers(50)) == {}
    assert before > 2_000_000
    assert store.path.stat().st_size + Path(f"{store.path}-wal").stat().st_size < 200_000
    assert store.verify().sound


def test_what_another_process_pruned_is_put_again(make: Callable[..., Store]) -> None:
    first, second = make(), make()
    first.put(SPACE, answers(3))
    second.prune([SPACE.sha256])
    second.put(SPACES[0], answers(3, "other"))  # which may take the number that the first one knew
    assert first.get(SPACE, answers(3)) == {}
    first.put(SPACE, answers(2))
    assert second.get(SPACE, answers(3)) == answers(2)
    assert second.get(SPACES[0], answers(3)) == answers(3, "other")


def test_copying_merges_and_keeps_what_is_there(make: Callable[..., Store]) -> None:
    source, target = make("source.sqlite"), make("target.sqlite")
    source.put(SPACES[0], answers(4, "source"))
    source.put(SPACES[1], answers(2, "source"))
    target.put(SPACES[0], answers(1, "target"))
    target.put(SPACES[2], answers(2, "target"))
    assert source.copy_to(target) == 3 + 2
    assert target.get(SPACES[0], answers(4)) == {**answers(4, "source"), **answers(1, "target")}
    assert target.get(SPACES[1], answers(2)) == answers(2, "source")
    assert target.get(SPACES[2], answers(2)) == answers(2, "target")
    assert source.copy_to(target) == 0
    assert source.get(SPACES[2], answers(2)) == {}
    assert {info.space.name for info in target.spaces()} == {"a", "b"}


def test_copying_takes_the_chosen_spaces_alone(filled: Store, make: Callable[..., Store]) -> None:
    target = make("target.sqlite")
    assert filled.copy_to(target, [SPACES[2].sha256]) == 3
    assert [info.space for info in target.spaces()] == [SPACES[2]]


def test_rows_are_every_answer_or_those_of_the_chosen_spaces(filled: Store) -> None:
    def expected(space: Space, count: int) -> set[tuple[str, str, bytes]]:
        return {(space.sha256, k, v) for k, v in answers(count, space.kind).items()}

    every = list(filled.rows())
    assert set(every) == expected(SPACES[0], 1) | expected(SPACES[1], 2) | expected(SPACES[2], 3)
    assert len(every) == 6
    assert set(filled.rows([SPACES[1].sha256])) == expected(SPACES[1], 2)
    assert list(filled.rows([])) == []
    assert list(filled.rows(["00"])) == []


def test_verify_counts_every_answer_and_what_does_not_fit(filled: Store) -> None:
    assert filled.verify() == (6, 0, ())
    assert filled.verify().sound
    with closing(sqlite3.connect(filled.path, isolation_level=None)) as connection:
        connection.execute("UPDATE answers SET value = X'00' WHERE id = 1")
        connection.execute("UPDATE answers SET input = X'00' WHERE id = 2")
    assert filled.verify() == (6, 2, ())
    assert not filled.verify().sound
    assert len(list(filled.rows())) == 4


def test_verify_tells_of_a_damaged_description(filled: Store) -> None:
    with closing(sqlite3.connect(filled.path, isolation_level=None)) as connection:
        connection.execute("UPDATE spaces SET content = '{}' WHERE kind = 'classify'")
    answers_, damaged, (problem,) = filled.verify()
    assert (answers_, damaged) == (6, 3)
    assert problem == "the descriptions of 1 spaces are damaged"
    assert [info.space for info in filled.spaces()] == SPACES[:2]


def test_rebuilding_keeps_what_is_sound_and_the_old_file(filled: Store, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(filled.path, isolation_level=None)) as connection:
        connection.execute("UPDATE answers SET value = X'00' WHERE id = 1")
    assert filled.rebuild() == 5
    assert filled.rebuild() == 5  # within the same second
    assert filled.verify() == (5, 0, ())
    assert filled.get(SPACES[2], answers(3)) == answers(3, "classify")
    assert len(list(filled.path.parent.glob("answers.sqlite.damaged-*-[0-9]"))) == 2
    assert [record.message.count("5 answers taken over") for record in caplog.records] == [1, 1]

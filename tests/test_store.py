"""The store as long as nothing goes wrong: what is found, what is not, whose files it takes, and its upkeep."""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm_harness import store as module
from medvlm_harness.errors import UserError
from medvlm_harness.store import Answers, Space, Store, default_path, open_store
from medvlm_harness.store_file import APPLICATION_ID, FORMAT, checked, connect, create

MODEL = {"weights": ["ab", "cd"], "precision": "fp32", "options": {"size": 224, "crop": {"left": 1}}, "adapter": None}
SPACE = Space("embed:image", MODEL, prompt="a prompt", perturbation="noise@3", name="tiny")
NUMBERS = itertools.count()

# Few values, so that two drawn models are often alike, and often only nearly.
json_values = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 0.0, -0.0, 1.0, 1e300, "", "1", "é\U0001fac1\x00", "null"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", ""]), inner, max_size=3),
    max_leaves=4,
)
json_models = st.dictionaries(st.sampled_from(["a", "b", "é"]), json_values, max_size=2)


def key(number: int) -> str:
    return hashlib.sha256(f"input {number}".encode()).hexdigest()


def answers(count: int, tag: str = "") -> Answers:
    return {key(i): f"answer {tag}{i}".encode() * 30 for i in range(count)}


def same_json(one: Any, other: Any) -> bool:
    """Equal as JSON tells values apart: 1, 1.0, true and "1" are four, and keys have no order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return repr(one) == repr(other)


def reordered(value: Any) -> Any:
    """The same JSON with the keys of every mapping in the opposite order."""
    if isinstance(value, dict):
        return {k: reordered(value[k]) for k in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def other_programs_file(path: Path, *statements: str) -> bytes:
    """A database with these statements run; its bytes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    return path.read_bytes()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Open stores in a temporary folder, closed at the end."""
    opened = []

    def open_named(name: str = "answers.sqlite", **options: Any) -> Store:
        opened.append(Store(tmp_path / name, **options))
        return opened[-1]

    yield open_named
    for one in opened:
        one.close()


@pytest.fixture
def store(make: Callable[..., Store]) -> Store:
    return make()


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One for all examples of a property: each takes a space that no other has."""
    opened = Store(tmp_path_factory.mktemp("store") / "shared.sqlite")
    yield opened
    opened.close()


# --- what is found


@settings(deadline=None)
@given(kept=st.dictionaries(st.binary(min_size=1, max_size=32).map(bytes.hex), st.binary(max_size=300), max_size=20))
def test_a_get_returns_exactly_what_was_put(shared_store: Store, kept: Answers) -> None:
    space = Space("embed:text", {"example": next(NUMBERS)})
    shared_store.put(space, kept)
    assert shared_store.get(space, kept) == kept


@settings(deadline=None)
@given(one=json_models, other=json_models)
def test_two_models_share_answers_only_if_they_are_the_same_json(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = Space("facts", one).sha256 == Space("facts", other).sha256
    assert same == same_json(one, other)


@settings(deadline=None)
@given(model=json_models)
def test_the_order_of_keys_does_not_matter(model: dict[str, Any]) -> None:
    assert Space("facts", model).sha256 == Space("facts", reordered(model)).sha256


@pytest.mark.parametrize(
    "other",
    [
        Space("embed:text", MODEL, SPACE.prompt, SPACE.perturbation),
        Space(SPACE.kind, {**MODEL, "precision": "bf16"}, SPACE.prompt, SPACE.perturbation),
        Space(SPACE.kind, {**MODEL, "weights": ["cd", "ab"]}, SPACE.prompt, SPACE.perturbation),
        Space(SPACE.kind, {**MODEL, "options": {"size": 224, "crop": {"left": 2}}}, SPACE.prompt, SPACE.perturbation),
        Space(SPACE.kind, {**MODEL, "options": {"size": "224", "crop": {"left": 1}}}, SPACE.prompt, SPACE.perturbation),
        Space(SPACE.kind, {**MODEL, "adapter": ""}, SPACE.prompt, SPACE.perturbation),
        Space(SPACE.kind, {k: v for k, v in MODEL.items() if k != "adapter"}, SPACE.prompt, SPACE.perturbation),
        Space(SPACE.kind, MODEL, "a prompt ", SPACE.perturbation),
        Space(SPACE.kind, MODEL, SPACE.prompt, "noise@4"),
        Space(SPACE.kind, MODEL, SPACE.perturbation, SPACE.prompt),
    ],
    ids=["kind", "precision", "order of a list", "nested", "type", "null", "missing", "prompt", "perturbation", "swap"],
)
def test_whatever_decides_an_answer_keeps_it_apart(store: Store, other: Space) -> None:
    store.put(SPACE, answers(3))
    assert store.get(other, answers(3)) == {}


def test_a_model_is_found_under_any_name(store: Store) -> None:
    store.put(SPACE, answers(3))
    renamed = Space(SPACE.kind, reordered(MODEL), SPACE.prompt, SPACE.perturbation, name="another name")
    assert renamed == SPACE
    assert store.get(renamed, answers(3)) == answers(3)


def test_an_input_that_was_never_answered_is_left_out(store: Store) -> None:
    store.put(SPACE, answers(2))
    assert store.get(SPACE, [key(1), key(2), key(1)]) == {key(1): answers(2)[key(1)]}
    assert store.get(SPACE, []) == {}


def test_a_put_replaces_what_was_there_and_nothing_else(store: Store) -> None:
    store.put(SPACE, answers(3))
    store.put(SPACE, {key(1): b"new"})
    assert store.get(SPACE, answers(3)) == {**answers(3), key(1): b"new"}
    assert store.verify().answers == 3


def test_thousands_are_found_in_one_call(store: Store) -> None:
    many = answers(2 * module.ROWS_PER_QUERY + 1)
    store.put(SPACE, many)
    assert store.get(SPACE, many) == many


def test_a_batch_that_cannot_be_kept_whole_is_not_kept_in_part(store: Store) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        store.put(SPACE, {**answers(3), "no hash": b"x"})
    assert store.spaces() == []
    store.put(SPACE, answers(3))
    assert store.get(SPACE, answers(3)) == answers(3)


def test_a_number_that_json_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Space("facts", {"scale": float("nan")}).sha256  # noqa: B018


def test_answers_outlive_the_store_that_took_them(make: Callable[..., Store]) -> None:
    first = make()
    first.put(SPACE, answers(3))
    assert make().get(SPACE, answers(3)) == answers(3)  # at once, by another that has it open
    first.close()
    assert make().get(SPACE, answers(3)) == answers(3)


# --- which file


@pytest.fixture
def no_store_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDVLM_STORE")


def test_off_is_off_by_option_and_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert open_store("off") is None
    monkeypatch.setenv("MEDVLM_STORE", "off")
    assert open_store() is None
    named = open_store(str(tmp_path / "named.sqlite"))  # what was asked for by name is meant
    assert named is not None
    named.close()
    assert (tmp_path / "named.sqlite").is_file()


@pytest.mark.usefixtures("no_store_named")
def test_the_default_file_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_path() == tmp_path / "cache" / "medvlm_harness" / "store.sqlite"
    opened = open_store()
    assert opened is not None
    opened.close()
    assert default_path().is_file()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "medvlm_harness" / "store.sqlite"


def test_the_environment_names_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MEDVLM_STORE", "~/mine.sqlite")
    assert default_path() == tmp_path / "mine.sqlite"
    opened = open_store()
    assert opened is not None
    assert opened.path == tmp_path / "mine.sqlite"
    opened.close()


@pytest.mark.parametrize("name", ["weights.pt", "store", ".sqlite", "store.sqlite3"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(UserError, match=r"a file named \*\.sqlite"):
        open_store(str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == b"precious"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(UserError, match="a file named"):
        open_store(str(tmp_path / "folder.sqlite"))


THEIRS = {
    "plain": ("CREATE TABLE t (a)", "INSERT INTO t VALUES (1)"),
    "signed": (f"PRAGMA application_id = {APPLICATION_ID + 1}",),
    "numbered": (f"PRAGMA user_version = {FORMAT}",),
    # As of a newer SQLite: a table in words that this one does not know.
    "newer SQLite": (
        "CREATE TABLE t (a)",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = 'CREATE TABLE t (a) OF A KIND UNKNOWN'",
    ),
}


@pytest.mark.parametrize("statements", THEIRS.values(), ids=THEIRS)
def test_another_programs_database_is_refused_and_stays_as_it_was(tmp_path: Path, statements: tuple[str, ...]) -> None:
    path = tmp_path / "theirs.sqlite"
    before = other_programs_file(path, *statements)
    with pytest.raises(UserError, match="a database of another program: name another file, or store=off"):
        Store(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_newer_format_is_refused_and_stays_as_it_was(store: Store) -> None:
    store.close()
    before = other_programs_file(store.path, f"PRAGMA user_version = {FORMAT + 1}")
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}, this release reads {FORMAT}: name another file"):
        Store(store.path)
    assert store.path.read_bytes() == before


def test_a_file_that_another_process_is_just_making_is_not_somebody_elses(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    other_programs_file(path, "PRAGMA journal_mode = WAL")  # as far as the other one has come
    looking = connect(path)
    # It ends its work between two looks at the file.
    looking.set_trace_callback(lambda sql: create(path).close() if "user_version" in sql else None)
    checked(looking, path)
    looking.set_trace_callback(None)
    looking.close()
    Store(path).close()


def test_a_store_to_look_at_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        Store(tmp_path / "none.sqlite", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_store_to_look_at_takes_nothing(make: Callable[..., Store], caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    first.put(SPACE, answers(3))
    first.close()
    before = first.path.read_bytes()
    looking = make(read_only=True)
    assert looking.get(SPACE, answers(3)) == answers(3)
    looking.put(SPACE, answers(9))
    for change in (looking.rebuild, lambda: looking.prune([]), lambda: first.copy_to(looking)):
        with pytest.raises(UserError, match=r"cannot be (opened|written)"):
            change()
    looking.close()
    assert first.path.read_bytes() == before
    assert caplog.records == []


def test_a_path_with_signs_that_an_address_cannot_hold_is_opened(make: Callable[..., Store]) -> None:
    strange = make("a %20 b?c#d&mode=x.sqlite")
    strange.put(SPACE, answers(1))
    strange.close()
    assert make("a %20 b?c#d&mode=x.sqlite", read_only=True).get(SPACE, answers(1)) == answers(1)


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(UserError, match="cannot be opened"):
        store.spaces()
    assert store.get(SPACE, answers(1)) == {}
    store.put(SPACE, answers(1))

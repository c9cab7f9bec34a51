"""What `medvlm store` tells, chooses and exports."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm_harness.errors import UserError
from medvlm_harness.requests import Embedding
from medvlm_harness.store import Answers, Space, SpaceInfo, Store
from medvlm_harness.store_upkeep import (
    check,
    export_parquet,
    format_size,
    idle_since,
    of_models,
    parse_age,
    parse_size,
    prune,
    size_on_disk,
    summarise,
    to_fit,
    weights_sha256,
)

RNG = np.random.default_rng(3)
ONE_FILE = {"weights": ["ab" * 32], "precision": "fp32", "code": "1"}
TWO_FILES = {"weights": ["ef" * 32, "cd" * 32], "precision": "bf16", "code": "1"}


def key(number: int) -> str:
    return hashlib.sha256(f"input {number}".encode()).hexdigest()


def noise(count: int, size: int = 2000) -> Answers:
    return {key(i): RNG.bytes(size) for i in range(count)}


def held(name: str = "m", used: float = 0.0, size: int = 0, answers: int = 1, **space: Any) -> SpaceInfo:
    """A space that lies in no file; by default no two of different use are alike."""
    return SpaceInfo(Space(**{"kind": f"facts {used}", "model": ONE_FILE, "name": name, **space}), answers, size, used)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "answers.sqlite")
    yield opened
    opened.close()


def set_use(store: Store, space: Space, moment: float) -> None:
    """Say when a space was used."""
    with closing(sqlite3.connect(store.path, isolation_level=None)) as connection:
        connection.execute("UPDATE spaces SET used = ? WHERE sha256 = ?", (moment, space.sha256))


# --- what is there


def test_the_hash_of_weights_is_the_one_that_results_name() -> None:
    assert weights_sha256(ONE_FILE) == "ab" * 32
    assert weights_sha256(TWO_FILES) == hashlib.sha256(("cd" * 32 + "ef" * 32).encode()).hexdigest()
    assert weights_sha256({"weights": "ab"}) == "ab"
    assert weights_sha256({}) == ""


def test_a_summary_adds_up_the_spaces_of_a_model() -> None:
    infos = [
        held(used=1.0, size=10, answers=2, kind="embed:image"),
        held(used=3.0, size=20, answers=3, kind="embed:text", name="as it is called now"),
        held(used=2.0, size=30, answers=4, kind="embed:image", perturbation="blur@1"),
    ]
    (summary,) = summarise(infos)
    assert summary == ("as it is called now", "ab" * 32, "fp32", {"embed:image": 6, "embed:text": 3}, 60, 3.0)


def test_another_precision_or_code_is_another_row_and_the_last_used_comes_first() -> None:
    infos = [
        held(used=1.0),
        held(used=3.0, model={**ONE_FILE, "precision": "bf16"}),
        held(used=2.0, model={**ONE_FILE, "code": "2"}),
    ]
    assert [(row.precision, row.used) for row in summarise(infos)] == [("bf16", 3.0), ("fp32", 2.0), ("fp32", 1.0)]
    assert summarise([]) == []


def test_checking_changes_nothing_even_of_a_file_that_cannot_be_opened(store: Store, tmp_path: Path) -> None:
    store.put(Space("facts", {}), noise(3))
    assert check(store.path) == (3, 0, ())
    store.close()
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(bytes(16_384) + store.path.read_bytes()[16_384:])
    before = damaged.read_bytes()
    answers, _, problems = check(damaged)
    assert answers == 0
    assert problems == ("file is not a database",)
    assert damaged.read_bytes() == before
    assert not list(tmp_path.glob("*.damaged-*"))


def test_what_is_not_damage_is_not_called_so(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        check(tmp_path / "nowhere.sqlite")


def test_the_size_counts_what_is_not_yet_written_back(store: Store) -> None:
    before = size_on_disk(store.path)
    store.put(Space("facts", {}), noise(100))
    assert size_on_disk(store.path) > before + 200_000
    store.close()
    assert size_on_disk(store.path) == store.path.stat().st_size


# --- which of it


def test_a_model_is_told_by_its_name_or_the_beginning_of_a_hash() -> None:
    one, two = held("one"), held("two", model=TWO_FILES)
    combined = weights_sha256(TWO_FILES)
    for names in (["two"], ["cdcd"], ["EFEF"], [combined], [combined[:4]]):
        assert of_models([one, two], names) == [two]
    assert of_models([one, two], ["one", "two"]) == [one, two]
    assert of_models([one, two], ["abab", "one"]) == [one]


@pytest.mark.parametrize("name", ["tow", "abc", "", "cd", "zz" * 32, "TWO"])
def test_a_model_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=f"No answers of a model '{name}'"):
        of_models([held("one"), held("two", model=TWO_FILES), held("", used=1.0)], ["one", name])


def test_a_model_that_is_not_there_names_what_was_meant() -> None:
    with pytest.raises(UserError, match="Did you mean chexzero"):
        of_models([held("chexzero")], ["chexzreo"])


def test_idle_is_what_no_run_has_used_since() -> None:
    infos = [held(used=float(moment)) for moment in range(5)]
    assert idle_since(infos, 2.0) == infos[:2]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=12),
    share=st.floats(0, 1.2),
    data=st.data(),
)
def test_to_fit_takes_the_least_used_and_no_more_than_it_must(sizes: list[int], share: float, data: Any) -> None:
    infos = [held(used=float(i), size=size, answers=1 + i) for i, size in enumerate(sizes)]
    candidates = data.draw(st.permutations(infos))[: data.draw(st.integers(0, len(infos)))]
    total = 10_000_000
    limit = round(total * share)
    weights = {info.used: info.bytes + 110 * info.answers for info in infos}

    def left_without(going: list[SpaceInfo]) -> float:
        return total * (1 - sum(weights[info.used] for info in going) / sum(weights.values()))

    going = to_fit(infos, candidates, total, limit)
    assert going == sorted(candidates, key=lambda info: info.used)[: len(going)]
    if len(going) < len(candidates):
        assert left_without(going) <= limit + 1
    if going:
        assert left_without(going[:-1]) > limit - 1


SPACES = [
    *(Space(f"embed:{kind}", model, name=name) for name, model in (("old", ONE_FILE), ("new", TWO_FILES))
      for kind in ("image", "text")),
    Space("classify", TWO_FILES, "which?", name="new"),
]  # fmt: skip


@pytest.fixture
def filled(store: Store) -> Store:
    """Five spaces: four of 0.4 MB and what finds it, used in their order, and a small one used last."""
    for moment, space in enumerate(SPACES):
        store.put(space, noise(200 if space.kind != "classify" else 5))
        set_use(store, space, float(moment))
    return store


def test_pruning_without_a_limit_takes_all_candidates(filled: Store) -> None:
    before = size_on_disk(filled.path)
    candidates = of_models(filled.spaces(), ["old"])
    pruned = prune(filled, candidates)
    assert pruned.spaces == candidates
    assert pruned.answers == 400
    assert pruned.bytes == pytest.approx(800_000, rel=0.25)
    assert size_on_disk(filled.path) <= before - pruned.bytes
    assert {info.space.name for info in filled.spaces()} == {"new"}


@pytest.mark.parametrize("limit", [10_000_000, 1_700_000, 1_300_000, 900_000, 500_000, 0])
def test_pruning_to_a_limit_keeps_what_was_used_last(filled: Store, limit: int) -> None:
    before = filled.size()
    pruned = prune(filled, filled.spaces(), limit=limit)
    kept = [info.space for info in sorted(filled.spaces(), key=lambda info: info.used)]
    assert kept == SPACES[len(SPACES) - len(kept) :]
    assert filled.size() <= limit or not kept
    assert before - filled.size() == pruned.bytes
    # With the last one that went the file would have been too large.
    if kept and pruned.spaces:
        assert filled.size() + 500_000 > limit
    assert (pruned.spaces == []) == (before <= limit)


def test_a_limit_holds_while_another_process_reads(filled: Store) -> None:
    # The file itself cannot shrink then, and must not be emptied for it.
    with closing(sqlite3.connect(filled.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM answers").fetchone() == (805,)
        reader.execute("PRAGMA busy_timeout = 0")
        filled._connection.execute("PRAGMA busy_timeout = 0")  # type: ignore[union-attr]
        prune(filled, filled.spaces(), limit=1_600_000)
    assert [info.answers for info in filled.spaces()] == [5, 200, 200, 200]


def test_a_limit_removes_candidates_only(filled: Store) -> None:
    prune(filled, of_models(filled.spaces(), ["new"]), limit=100_000)
    assert {info.space.name for info in filled.spaces()} == {"old"}


def test_a_dry_run_foretells_what_would_go_and_removes_nothing(filled: Store) -> None:
    before = filled.spaces()
    foretold = prune(filled, before, limit=900_000, dry_run=True)
    assert filled.spaces() == before
    done = prune(filled, before, limit=900_000)
    assert (foretold.spaces, foretold.answers) == (done.spaces, done.answers)
    assert foretold.bytes == pytest.approx(done.bytes, rel=0.1)


def test_pruning_nothing_from_an_empty_store_is_nothing(store: Store) -> None:
    assert prune(store, [], limit=0) == ([], 0, 0)
    assert prune(store, []) == ([], 0, 0)


# --- ages and sizes


@pytest.mark.parametrize(
    ("text", "seconds"), [("12h", 43_200), ("30d", 2_592_000), ("1.5 D", 129_600), ("2w", 1_209_600)]
)
def test_an_age_is_read(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "30 days", "1e3d", "3m"])
def test_what_is_no_age_says_what_was_expected(text: str) -> None:
    with pytest.raises(UserError, match=f"Expected an age like 12h, 30d or 8w, but got '{text}'"):
        parse_age(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("700", 700), ("5B", 5), ("10GB", 10**10), ("1.5 gb", 15 * 10**8), ("2KiB", 2048), ("3 MiB", 3 * 2**20),
     ("4k", 4000), ("1TB", 10**12), ("1TiB", 2**40)],
)  # fmt: skip
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "10 gigabytes", "1PB", "1iB", "1e9", "1,5GB"])
def test_what_is_no_size_says_what_was_expected(text: str) -> None:
    with pytest.raises(UserError, match=f"Expected a size like 500MB, 10GB or 1.5GiB, but got '{text}'"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_499, "999.5 kB"), (999_999, "1.0 MB"), (2_449_000, "2.4 MB"),
     (12_345_678_901, "12.3 GB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_a_size_is_shown(size: float, text: str) -> None:
    assert format_size(size) == text


@settings(deadline=None)
@given(st.integers(0, 10**15))
def test_what_is_shown_is_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.06)


# --- out of the store


@pytest.fixture
def answered(store: Store) -> Store:
    """Images and texts with vectors, and labels with JSON."""
    for kind, flag in (("image", None), ("text", True)):
        vectors = {key(i): Embedding(np.full(4, i, np.float32), flag).to_bytes() for i in range(3)}
        store.put(Space(f"embed:{kind}", ONE_FILE, name="one"), vectors)
    scores = {key(i): json.dumps({"margin": [i], "note": "é"}, ensure_ascii=False).encode() for i in range(2)}
    store.put(Space("classify", TWO_FILES, "which?", "blur@1", name="two"), scores)
    return store


def test_a_table_holds_every_answer_with_what_decided_it(answered: Store, tmp_path: Path) -> None:
    out = tmp_path / "answers.parquet"
    assert export_parquet(answered, out, answered.spaces()) == 8
    table = pq.read_table(out)
    assert table.schema.field("vector").type.value_type == "float"
    rows = {(row["kind"], row["input"]): row for row in table.to_pylist()}
    assert len(rows) == 8
    assert rows["embed:text", key(2)] == {
        "model": "one",
        "weights": "ab" * 32,
        "precision": "fp32",
        "kind": "embed:text",
        "input": key(2),
        "perturbation": "",
        "prompt": "",
        "vector": [2.0] * 4,
        "truncated": True,
        "text": None,
    }
    labels = rows["classify", key(1)]
    assert (labels["model"], labels["weights"], labels["precision"]) == ("two", weights_sha256(TWO_FILES), "bf16")
    assert (labels["prompt"], labels["perturbation"], labels["vector"]) == ("which?", "blur@1", None)
    assert json.loads(labels["text"]) == {"margin": [1], "note": "é"}


def test_a_table_of_chosen_models_holds_no_other(answered: Store, tmp_path: Path) -> None:
    out = tmp_path / "two.parquet"
    assert export_parquet(answered, out, of_models(answered.spaces(), ["two"])) == 2
    assert set(pq.read_table(out)["model"].to_pylist()) == {"two"}


def test_a_table_of_nothing_has_its_columns(store: Store, tmp_path: Path) -> None:
    assert export_parquet(store, tmp_path / "none.parquet", []) == 0
    table = pq.read_table(tmp_path / "none.parquet")
    assert (table.num_rows, table.num_columns) == (0, 10)


def test_vectors_come_out_as_they_went_in_over_several_batches(store: Store, tmp_path: Path) -> None:
    vectors = RNG.standard_normal((9000, 3)).astype(np.float32)
    store.put(Space("embed:image", ONE_FILE), {key(i): Embedding(v).to_bytes() for i, v in enumerate(vectors)})
    assert export_parquet(store, tmp_path / "many.parquet", store.spaces()) == 9000
    rows = pq.read_table(tmp_path / "many.parquet").to_pylist()
    found = {row["input"]: row["vector"] for row in rows}
    assert np.array_equal(np.asarray([found[key(i)] for i in range(9000)], np.float32), vectors)


def test_a_table_that_is_there_is_not_overwritten(answered: Store, tmp_path: Path) -> None:
    out = tmp_path / "precious.parquet"
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match="is there already: name another file"):
        export_parquet(answered, out, answered.spaces())
    assert out.read_bytes() == b"precious"


@pytest.mark.parametrize(("kind", "value"), [("embed:image", b"no vector"), ("classify", b"\xff\xfe")])
def test_what_cannot_be_exported_is_named_and_leaves_no_file(
    store: Store, tmp_path: Path, kind: str, value: bytes
) -> None:
    store.put(Space(kind, ONE_FILE, name="one"), {key(1): value})
    with pytest.raises(UserError, match=f"The {kind} of {key(1)} by one cannot be exported"):
        export_parquet(store, tmp_path / "half.parquet", store.spaces())
    assert not list(tmp_path.glob("half.parquet*"))


def test_what_is_damaged_is_left_out(answered: Store, tmp_path: Path) -> None:
    with closing(sqlite3.connect(answered.path, isolation_level=None)) as connection:
        connection.execute("UPDATE answers SET value = X'00' WHERE id = 1")
    assert export_parquet(answered, tmp_path / "sound.parquet", answered.spaces()) == 7

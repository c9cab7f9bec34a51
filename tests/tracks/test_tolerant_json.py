from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm_harness.tracks.tolerant_json import JsonObject, JsonValue, read_json_pieces

LEAVES = st.text(max_size=8)
WELL_FORMED = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def plain(value: JsonValue) -> Any:
    """As `json.loads` gives it."""
    if isinstance(value, JsonObject):
        return {key: plain(one) for key, one in value.pairs}
    return [plain(one) for one in value] if isinstance(value, list) else value


@given(st.lists(WELL_FORMED, min_size=1, max_size=3), st.sampled_from([None, 1]))
@settings(max_examples=60, deadline=None)
def test_what_pythons_reader_takes_is_read_the_same(value: list[Any], indent: int | None) -> None:
    # A bracket begins JSON before a string or bracket alone, and all leaves here are strings.
    found = read_json_pieces(f"Here: {json.dumps(value, indent=indent)} That is all.")
    assert [plain(one) for one in found.values] == [value]
    assert (found.damaged, found.cut) == (0, False)


@given(st.text(alphabet="[]{}\"':,\\ab 1\n", max_size=60))
@settings(max_examples=200, deadline=None)
def test_nothing_makes_it_raise(text: str) -> None:
    found = read_json_pieces(text)
    assert found.damaged >= 0
    [plain(one) for one in found.values]


ROWS = st.lists(st.dictionaries(st.text(max_size=5), LEAVES, min_size=1, max_size=3), min_size=1, max_size=4)


@given(ROWS, st.data())
@settings(max_examples=100, deadline=None)
def test_of_a_cut_text_everything_whole_is_kept(value: list[dict[str, str]], data: st.DataObject) -> None:
    text = json.dumps(value)
    length = data.draw(st.integers(1, len(text)))
    found = read_json_pieces(text[:length])
    assert found.cut == (length < len(text))
    (rows,) = [plain(one) for one in found.values]
    for row, whole in zip(rows, value, strict=False):
        assert list(row.items()) == list(whole.items())[: len(row)]
    for k in range(1, len(value) + 1):
        if len(json.dumps(value[:k])) - 1 <= length:  # up to the bracket that closes the k-th row
            assert rows[k - 1] == value[k - 1]


@pytest.mark.parametrize(
    ("text", "values", "damaged"),
    [
        ("['a', 'b',]", [["a", "b"]], 0),
        ("{'a': True, 'b': None}", [{"a": "True", "b": None}], 0),
        ('[{finding: left effusion, "n": 1}]', [[{"finding": "left effusion", "n": "1"}]], 0),
        ('{"a": "x"}\n{"a": "y"}', [{"a": "x"}, {"a": "y"}], 0),
        ('[{"a": "x"]', [[{"a": "x"}]], 0),  # a missing bracket
        ('["a"}, "b"]', [["a", "b"]], 1),  # one too many
        ('{"a", "b": "c"}', [{"b": "c"}], 1),
        ('{"a": "x', [{}], 1),
        ('{"a": "x\n"b": "y"}', [{"a": "x", "b": "y"}], 0),  # a quote is missing: a line's end ends a string
        (r'["a\q\u0041"]', [["aqA"]], 0),
        (r'["\ud800"]', [["?"]], 0),
        ('["effusion [left]"]', [["effusion [left]"]], 0),
    ],
)
def test_slips_are_read_as_they_were_meant(text: str, values: list[Any], damaged: int) -> None:
    found = read_json_pieces(text)
    assert [plain(one) for one in found.values] == values
    assert found.damaged == damaged


@pytest.mark.parametrize("text", ["", "no effusion [absent]", "see (1) and {x}", "[1, 2]", "effusion]", "}{"[:1]])
def test_brackets_of_prose_are_no_json(text: str) -> None:
    assert read_json_pieces(text).values == []


def test_equal_keys_are_all_kept() -> None:
    (value,) = read_json_pieces('{"absent": "a", "absent": "b"}').values
    assert isinstance(value, JsonObject)
    assert value.pairs == [("absent", "a"), ("absent", "b")]


def test_what_lies_too_deep_is_left_aside_and_counted() -> None:
    depth = 200_000
    found = read_json_pieces("[" * depth + '"x"' + "]" * depth + ' ["y"]')
    assert found.damaged == 1
    assert found.values[-1] == ["y"]


@pytest.mark.parametrize(
    "pattern", ["[", '["', "[ ", '{"a":', '{"a":[', '[""', "['", '["\\', "[{}", "{'", '[" ', "[\n", '] ["a" {']
)
def test_time_grows_with_the_length_and_no_faster(pattern: str) -> None:
    def seconds(times: int) -> float:
        text = pattern * times
        best = 1e9
        for _ in range(2):
            start = time.process_time()
            read_json_pieces(text)
            best = min(best, time.process_time() - start)
        return best

    # Eight times the text: 8 in linear time, 64 in quadratic.
    assert seconds(8_000) < 30 * max(seconds(1_000), 1e-3)

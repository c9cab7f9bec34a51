from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.results.score_table import read_scores
from medvlm_harness.results.scores import write_scores

ROWS: list[dict[str, Any]] = [
    {"task": "t", "study": "b", "image": "1.png", "label": "Z", "target": 1, "margin": 0.25, "probability": 0.5},
    {"task": "t", "study": "a", "image": "2.png", "label": "Z", "target": None, "margin": 0.5, "probability": 0.75},
    {"task": "t", "study": "a", "image": "2.png", "label": "A", "target": 0, "margin": -1.0, "answer": "0+2"},
    {"task": "u", "study": "c", "image": None, "label": "i2t", "rank": 2.5, "tied": 2},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_scores(folder / "scores.parquet", rows)
    return folder / "scores.parquet"


def test_rows_become_documents_by_labels_in_the_order_of_tasks(tmp_path: Path) -> None:
    table = read_scores(write(tmp_path, ROWS), "t")
    assert table.documents == [("a", "2.png"), ("b", "1.png")]
    assert table.labels == ["Z", "A"]
    np.testing.assert_array_equal(table.target, [[np.nan, 0], [1, np.nan]])
    np.testing.assert_array_equal(table.margin, [[0.5, -1], [0.25, np.nan]])
    assert table.answer.tolist() == [[None, "0+2"], [None, None]]
    assert np.isnan(table.rank).all()
    assert table.select(["A"]).margin[:, 0].tolist()[0] == -1
    other = read_scores(tmp_path / "scores.parquet", "u")
    assert (other.documents, other.rank.item(), other.tied.item()) == ([("c", "")], 2.5, 2)


def test_a_column_that_an_earlier_version_did_not_write_is_empty(tmp_path: Path) -> None:
    whole = pq.read_table(write(tmp_path, ROWS))
    pq.write_table(whole.drop_columns(["tied", "answer"]), tmp_path / "old.parquet")
    table = read_scores(tmp_path / "old.parquet", "u")
    assert np.isnan(table.tied).all()
    assert table.answer.tolist() == [[None]]


def test_files_that_hold_something_else_are_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    twice = write(tmp_path / "twice", [*ROWS, ROWS[0]])
    nameless = write(tmp_path / "nameless", [{**ROWS[0], "study": None}])
    text, other, words = (tmp_path / f"{name}.parquet" for name in ("text", "other", "words"))
    text.write_text("no")
    pq.write_table(pa.table({"a": [1]}), other)
    pq.write_table(pa.table({"task": ["t"], "study": ["a"], "label": ["Z"], "margin": ["much"]}), words)
    for file, task, message in (
        (path, "v", "no scores of a task v"),
        (twice, "t", "twice under one label"),
        (nameless, "t", "without a study or a label"),
        (text, "t", r"text\.parquet is none"),
        (other, "t", "no column task"),
        (words, "t", r"words\.parquet is none"),
        (tmp_path / "missing.parquet", "t", r"missing\.parquet is none"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_scores(file, task)
        assert "\n" not in str(caught.value)

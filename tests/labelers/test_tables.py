from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.rules import RulesLabeler
from medvlm_harness.labelers.tables import label_table


class Fails:
    """A labeler that dies at the second report."""

    name, version, sections = "fails", "1", "both"

    def __init__(self) -> None:
        self.asked = 0

    def label(self, text: str) -> dict[str, int | None]:
        self.asked += 1
        if self.asked > 1:
            raise RuntimeError("out of memory")
        return dict.fromkeys(CHEXPERT_14)


def read(path: Path, delimiter: str = ",") -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter=delimiter))


@pytest.fixture
def table(tmp_path: Path, write_csv: Callable[..., Path]) -> Path:
    rows = [
        ("1", 'No effusion, "clear".\nPossible pneumonia', "é"),
        ("2", "", ""),
        ("3", "Mild edema.", "a,b"),
    ]
    return write_csv(tmp_path / "reports.csv", ("uid", "findings", "note"), rows)


def test_rows_and_columns_are_kept_and_fourteen_added(table: Path, tmp_path: Path, rules: RulesLabeler) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "labels.csv"
    written = label_table(table, ["findings"], out, rules, progress=lambda done, total: seen.append((done, total)))
    assert (written.path, written.rows, written.without_text) == (out, 3, 1)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    header, *rows = read(out)
    assert header == ["uid", "findings", "note", *CHEXPERT_14]
    assert [row[:3] for row in rows] == read(table)[1:]
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert (cells[0]["Pleural Effusion"], cells[0]["Pneumonia"], cells[0]["Edema"]) == ("0", "-1", "")
    assert {cells[1][name] for name in CHEXPERT_14} == {""}
    assert cells[2]["Edema"] == "1"


@pytest.mark.parametrize(("source", "target"), [(".csv", ".parquet"), (".parquet", ".csv"), (".parquet", ".parquet"),
                                                (".tsv", ".tsv")])  # fmt: skip
def test_each_kind_of_table_is_read_and_written(tmp_path: Path, rules: RulesLabeler, source: str, target: str) -> None:
    path, out = tmp_path / f"in{source}", tmp_path / f"out{target}"
    if source == ".parquet":
        pq.write_table(pa.table({"n": pa.array([7, 8], pa.int64()), "text": ["No edema.", None]}), path)
    else:
        delimiter = "," if source == ".csv" else "\t"
        path.write_text(f"n{delimiter}text\n7{delimiter}No edema.\n8{delimiter}\n", encoding="utf-8")
    label_table(path, ["text"], out, rules)
    if target == ".parquet":
        result = pq.read_table(out)
        assert result["Edema"].to_pylist() == [0, None]
        assert result.schema.field("Edema").type == pa.int8()
        assert result["n"].type == (pa.int64() if source == ".parquet" else pa.string())
        assert result.schema.metadata[b"medvlm_labeler"] == f"rules {rules.version}".encode()
    else:
        header, *rows = read(out, "," if target == ".csv" else "\t")
        assert [row[header.index("Edema")] for row in rows] == ["0", ""]
        assert [row[0] for row in rows] == ["7", "8"]


def test_several_columns_are_sections_of_one_report(tmp_path: Path, write_csv: Callable[..., Path]) -> None:
    path = write_csv(tmp_path / "t.csv", ("findings", "impression"), [("No edema.", "Effusion."), ("", "Edema.")])
    label_table(path, ["findings", "impression"], tmp_path / "both.csv", RulesLabeler())
    label_table(path, ["findings", "impression"], tmp_path / "one.csv", RulesLabeler("impression"))
    columns = {}
    for name in ("both", "one"):
        header, *rows = read(tmp_path / f"{name}.csv")
        columns[name] = [(row[header.index("Edema")], row[header.index("Pleural Effusion")]) for row in rows]
    assert columns == {"both": [("0", "1"), ("1", "")], "one": [("", "1"), ("1", "")]}


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path, rules: RulesLabeler) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbftext\r\nMild edema.\r\n\r\n")
    assert label_table(path, ["text"], tmp_path / "out.csv", rules).rows == 1


def test_a_table_without_rows_gives_one_without_rows(tmp_path: Path, rules: RulesLabeler) -> None:
    (tmp_path / "t.csv").write_text("text\n")
    label_table(tmp_path / "t.csv", ["text"], tmp_path / "out.csv", rules)
    assert read(tmp_path / "out.csv") == [["text", *CHEXPERT_14]]


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ("uid,findings\n1,x\n", "finding", "one column 'finding' in t.csv, but it is missing. Did you mean findings?"),
        ("a,a\n1,2\n", "a", "one column 'a' in t.csv, but it is there twice"),
        ("text,Edema\nx,1\n", "text", "has a column 'Edema' already"),
        ("text\n1,2\n", "text", "Expected 1 cells in line 2 of t.csv, but got 2"),
        ("", "text", "the file is empty"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, rules: RulesLabeler, content: str, column: str, message: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        label_table(path, [column], tmp_path / "out.csv", rules)
    assert message in str(caught.value)
    assert not (tmp_path / "out.csv").exists()


def test_a_prefix_keeps_labels_of_two_labelers_apart(tmp_path: Path, rules: RulesLabeler) -> None:
    (tmp_path / "t.csv").write_text("text,Edema\nMild edema.,0\n")
    label_table(tmp_path / "t.csv", ["text"], tmp_path / "out.csv", rules, prefix="rules_")
    header, row = read(tmp_path / "out.csv")
    assert dict(zip(header, row, strict=True))["rules_Edema"] == "1"


def test_a_file_that_is_there_is_replaced_only_where_that_is_asked_for(table: Path, rules: RulesLabeler) -> None:
    out = table.with_name("out.csv")
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        label_table(table, ["findings"], out, rules)
    assert out.read_text() == "mine"
    label_table(table, ["findings"], out, rules, overwrite=True)
    assert out.read_text() != "mine"


def test_the_table_that_was_read_is_never_replaced(table: Path, rules: RulesLabeler) -> None:
    before = table.read_bytes()
    with pytest.raises(UserError, match="never replaced"):
        label_table(table, ["findings"], table, rules, overwrite=True)
    assert table.read_bytes() == before


def test_a_labeler_that_fails_leaves_nothing_behind(table: Path) -> None:
    out = table.with_name("out.csv")
    out.write_text("mine")
    with pytest.raises(RuntimeError):
        label_table(table, ["findings"], out, Fails(), overwrite=True)
    assert out.read_text() == "mine"
    assert sorted(path.name for path in table.parent.iterdir()) == ["out.csv", "reports.csv"]


def test_a_full_disk_leaves_the_old_file(table: Path, rules: RulesLabeler, monkeypatch: pytest.MonkeyPatch) -> None:
    out = table.with_name("out.csv")
    out.write_text("mine")

    def full(path: Path, *_: object) -> None:
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr("medvlm_harness.labelers.tables._write_delimited", full)
    with pytest.raises(OSError, match="No space"):
        label_table(table, ["findings"], out, rules, overwrite=True)
    assert out.read_text() == "mine"
    assert sorted(path.name for path in table.parent.iterdir()) == ["out.csv", "reports.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", b"", "Expected a table to read (.csv, .tsv, .parquet), but got t.xlsx"),
        ("t.parquet", b"text\n", "t.parquet is no Parquet file"),
        ("t.csv", b"text\n\xff\xfe\n", "save it as UTF-8"),
        ("t.csv", b'text\n"' + b"a" * (2**24 + 1) + b'"\n', "is no row of a table"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, rules: RulesLabeler, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        label_table(tmp_path / name, ["text"], tmp_path / "out.csv", rules)
    assert message in str(caught.value)


def test_numbers_are_no_text(tmp_path: Path, rules: RulesLabeler) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="Expected text in column 'text'"):
        label_table(tmp_path / "t.parquet", ["text"], tmp_path / "out.csv", rules)

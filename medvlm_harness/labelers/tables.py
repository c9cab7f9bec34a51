"""A table of reports labelled: every column and row kept, one column per observation added, written whole or not."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.files import replacing
from medvlm_harness.labelers.base import Labeler

__all__ = ["TABLE_SUFFIXES", "LabelledTable", "Progress", "label_table", "read_reports"]

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
Progress = Callable[[int, int], None]
"""Called with the number of reports labelled so far and their total."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_HEADED = frozenset({"findings", "impression"})
_LONGEST_CELL = 2**24  # characters; csv's own limit of 2**17 is less than some reports with their addenda


@dataclass(frozen=True, slots=True)
class LabelledTable:
    """What was written."""

    path: Path
    rows: int
    without_text: int  # rows with nothing to read: all their labels are blank


def label_table(
    source: Path,
    text_columns: Sequence[str],
    target: Path,
    labeler: Labeler,
    *,
    prefix: str = "",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LabelledTable:
    """Label each row of a table and write it with fourteen more columns: 1, 0, -1 (uncertain) or blank (unmentioned).

    Args:
        source: a .csv, .tsv (UTF-8, with a header) or .parquet file.
        text_columns: the columns that hold the report; several are read as its sections, in this order.
        target: file to write, of any of the three kinds.
        labeler: reads the reports.
        prefix: put before the observations' names.
        overwrite: replace a target that is there already.
        progress: called after each report.

    Raises:
        UserError: if a column is missing or would be there twice, a file is not of its kind, or the target exists.
    """
    for path, role in ((source, "read"), (target, "write")):
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise UserError(f"Expected a table to {role} ({', '.join(TABLE_SUFFIXES)}), but got {path.name}.")
    if not source.is_file():
        raise UserError(f"Expected a table of reports, but {source} is no file.")
    if target.exists() and target.samefile(source):
        raise UserError(f"Expected another file than {source} to write to: the table that was read is never replaced.")
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already: give another name, or --overwrite to replace it.")
    if not target.parent.is_dir():
        raise UserError(f"Expected an existing folder to write to, but {target.parent} is none.")
    if not text_columns:
        raise UserError("Expected the name of a column of text, but got none.")
    header, columns = _read(source)
    added = [f"{prefix}{name}" for name in CHEXPERT_14]
    texts = _texts(source, _chosen(source, text_columns, header, columns))
    if taken := [name for name in added if name in header]:
        raise UserError(f"{source.name} has a column {taken[0]!r} already: give a prefix for the new ones (--prefix).")
    labels = []
    for done, text in enumerate(texts, start=1):
        labels.append(labeler.label(text) if text else dict.fromkeys(CHEXPERT_14))
        if progress is not None:
            progress(done, len(texts))
    header = [*header, *added]
    columns = [*columns, *([row[name] for row in labels] for name in CHEXPERT_14)]
    with replacing(target) as partial:
        if target.suffix.lower() == ".parquet":
            _write_parquet(partial, header, columns, f"{labeler.name} {labeler.version}")
        else:
            _write_delimited(partial, header, columns, _DELIMITERS[target.suffix.lower()])
    return LabelledTable(target, len(texts), sum(not text for text in texts))


def read_reports(source: Path, text_columns: Sequence[str]) -> list[str]:
    """The reports of a table, one a row; several columns are read as a report's sections, in this order.

    Args:
        source: a .csv, .tsv (UTF-8, with a header) or .parquet file.
        text_columns: the columns that hold the report.

    Raises:
        UserError: if the file is of another kind, or a column is missing.
    """
    if source.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"Expected a table to read ({', '.join(TABLE_SUFFIXES)}), but got {source.name}.")
    if not source.is_file():
        raise UserError(f"Expected a table of reports, but {source} is no file.")
    if not text_columns:
        raise UserError("Expected the name of a column of text, but got none.")
    return _texts(source, _chosen(source, text_columns, *_read(source)))


def _read(source: Path) -> tuple[list[str], list[Any]]:
    """Header and columns."""
    return _read_parquet(source) if source.suffix.lower() == ".parquet" else _read_delimited(source)


def _chosen(source: Path, names: Sequence[str], header: list[str], columns: list[Any]) -> dict[str, Any]:
    """The columns of these names."""
    for name in names:
        if header.count(name) != 1:
            what = "is there twice" if name in header else "is missing"
            raise UserError(
                f"Expected one column {name!r} in {source.name}, but it {what}.{near_matches(name, header)}"
            )
    return {name: columns[header.index(name)] for name in names}


def _read_delimited(path: Path) -> tuple[list[str], list[Any]]:
    """Header and columns; a row that does not fit the header is an error, since every row is kept."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=_DELIMITERS[path.suffix.lower()])
            header = [name.strip() for name in next(reader, [])]
            if not header:
                raise UserError(f"Expected a header in {path.name}, but the file is empty.")
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    raise UserError(
                        f"Expected {len(header)} cells in line {reader.line_num} of {path.name}, but got {len(row)}."
                    )
                if row:
                    rows.append(row)
    except UnicodeDecodeError as error:
        raise UserError(f"Expected {path.name} in UTF-8, but byte {error.start} is none: save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{path.name} line {reader.line_num} is no row of a table: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    return header, [[row[k] for row in rows] for k in range(len(header))]


def _read_parquet(path: Path) -> tuple[list[str], list[Any]]:
    """Header and columns, each an Arrow array of its own type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path.name} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error
    return list(table.column_names), list(table.columns)


def _texts(source: Path, columns: Mapping[str, Any]) -> list[str]:
    """One report a row: the columns as sections, with heads where their names are those of sections."""
    parts = []
    for name, column in columns.items():
        cells = column if isinstance(column, list) else column.to_pylist()
        if wrong := [cell for cell in cells if not isinstance(cell, str | None)]:
            raise UserError(f"Expected text in column {name!r} of {source.name}, but got {wrong[0]!r}.")
        head = f"{name.upper()}: " if len(columns) > 1 and name.lower() in _HEADED else ""
        parts.append([f"{head}{cell}" if cell and cell.strip() else "" for cell in cells])
    return ["\n\n".join(filter(None, row)) for row in zip(*parts, strict=True)]


def _write_delimited(path: Path, header: Sequence[str], columns: Sequence[Any], delimiter: str) -> None:
    cells = [column if isinstance(column, list) else column.to_pylist() for column in columns]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(["" if cell is None else cell for cell in row] for row in zip(*cells, strict=True))


def _write_parquet(path: Path, header: Sequence[str], columns: Sequence[Any], labeler: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = len(header) - len(CHEXPERT_14)
    arrays = [
        pa.array(column, pa.int8() if k >= first else pa.string()) if isinstance(column, list) else column
        for k, column in enumerate(columns)
    ]
    table = pa.table(arrays, names=list(header))
    pq.write_table(table.replace_schema_metadata({"medvlm_labeler": labeler}), path, compression="zstd")

"""The numbers of a public run as tables that a data set viewer shows: one Parquet file each, always alike."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from medvlm_harness.results.publishing.privacy import label_blocks, label_of, labels_of
from medvlm_harness.results.run_files import RunFiles

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TABLES", "parquet_bytes", "run_tables"]

TABLES = ("results", "per_label", "robustness", "subgroups")
"""Names of the tables, which are the configurations of the data set too."""
ESTIMATE = (
    *(("value", "double"), ("stderr", "double"), ("ci95_low", "double"), ("ci95_high", "double"), ("n", "int64")),
    *(("positives", "int64"), ("floor", "double"), ("ceiling", "double"), ("method", "string"), ("reason", "string")),
)
KEYS = {
    "results": ("metric",),
    "per_label": ("label", "metric"),
    "robustness": ("measure",),
    "subgroups": ("attribute", "label", "subgroup", "metric"),
}
RUN = ("run", "model", "task", "dataset", "split", "label_source")
Row = dict[str, Any]


def run_tables(run: RunFiles, *, name: str, model: str) -> dict[str, pa.Table]:
    """Table -> its rows; a table that would be empty is left out."""
    import pyarrow as pa

    found: dict[str, list[Row]] = {table: [] for table in TABLES}
    for task, details in run.tasks.items():
        common = {
            **{"run": name, "model": model, "task": task, "dataset": details["dataset"].get("name")},
            **{"split": details.get("split"), "label_source": details.get("label_source")},
        }
        for table, rows in _rows(details).items():
            found[table] += [common | row for row in rows]
    return {table: pa.Table.from_pylist(rows, schema=_schema(table)) for table, rows in found.items() if rows}


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a file."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _schema(table: str) -> pa.Schema:
    import pyarrow as pa

    types = {"double": pa.float64(), "int64": pa.int64(), "string": pa.string()}
    return pa.schema(
        [(name, pa.string()) for name in (*RUN, *KEYS[table])] + [(name, types[kind]) for name, kind in ESTIMATE]
    )


def _rows(details: Mapping[str, Any]) -> dict[str, list[Row]]:
    labels = labels_of(details)
    named = {name: label_of(name, labels) for name in details["metrics"]}
    of_labels = [
        {"label": label, "metric": name.removesuffix(f"_{label}"), **_estimate(details["metrics"][name])}
        for name, label in named.items()
        if label is not None
    ]
    of_labels += [
        {"label": label, "metric": metric, **_estimate(one)}
        for block, label, its in label_blocks(details)
        for metric, one in _estimates(its, block)
    ]
    return {
        "results": [
            {"metric": name, **_estimate(one)} for name, one in details["metrics"].items() if named[name] is None
        ],
        "per_label": of_labels,
        "robustness": [
            {"measure": measure, **_estimate(one)}
            for measure, one in (details.get("robustness") or {}).items()
            if _is_estimate(one)
        ],
        "subgroups": list(_subgroup_rows(details.get("subgroups") or {})),
    }


def _subgroup_rows(tables: Mapping[str, Any]) -> Iterator[Row]:
    for attribute, of_attribute in tables.items():
        for label, table in of_attribute.items():
            for subgroup, group in (table.get("groups") or {}).items():
                keys = {"attribute": attribute, "label": label, "subgroup": subgroup}
                rates = {metric: one for metric, one in group.items() if _is_estimate(one)}
                for metric, one in rates.items():
                    yield {**keys, "metric": metric, **_estimate(one)}
                if not rates:
                    counts = {key: group.get(key) for key in ("n", "positives", "reason")}
                    yield {**keys, "metric": "auroc", **counts}
            for gap, one in (table.get("gaps") or {}).items():
                if _is_estimate(one):
                    yield {"attribute": attribute, "label": label, "metric": gap, **_estimate(one)}


def _estimates(block: Any, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The estimates of one label in one block, those of scaled probabilities and of operating points by both names."""
    if _is_estimate(block):
        yield prefix, block
    elif isinstance(block, Mapping):
        for name, one in block.items():
            if name not in ("threshold", "scaling"):
                yield from _estimates(one, name if prefix in ("calibration", "selective") else f"{name}_{prefix}")


def _is_estimate(one: Any) -> bool:
    return isinstance(one, Mapping) and {"value", "ci95", "method"} <= one.keys()


def _estimate(one: Mapping[str, Any]) -> Row:
    low, high = one.get("ci95") or (None, None)
    numbers = {name: one.get(name) for name, _ in ESTIMATE if not name.startswith("ci95")}
    return numbers | {"ci95_low": low, "ci95_high": high}

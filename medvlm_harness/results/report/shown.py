"""How one value is written, and what may be said of it beside others: the same in every format."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.report.parts import Cell, Column, Table

__all__ = ["DIRECTIONS", "Shown", "beside_floor", "interval_of", "leading", "metric_title", "number", "shown"]

ROUNDING = 1e-9  # a baseline at its floor differs from it by less
TITLES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "acc": "accuracy",
    "acc_norm": "accuracy, by length",
    "balanced_accuracy": "balanced accuracy",
    "rougeL": "ROUGE-L",
    "mesh_f1": "F1 of coded findings",
    "ece": "ECE",
    "aurc": "AURC",
}
DERIVED = {"_retention": "retained", "_true_minus_other": "gained by the true image"}
DIRECTIONS = {
    "i2t": "image to report",
    "t2i": "report to image",
    "f2i": "findings to impression",
    "i2f": "impression to findings",
}


class Shown(NamedTuple):
    """A cell in words."""

    text: str
    interval: str = ""  # both ends in brackets
    reason: str = ""  # why there is no value, or what is missing from it


def shown(cell: Cell) -> Shown:
    """A cell as text: an estimate with its interval, and with the reason where it has no value."""
    if cell is None:
        return Shown("")
    if isinstance(cell, str):
        return Shown(cell)
    if not isinstance(cell, Estimate):
        return Shown(number(cell))
    if not math.isfinite(cell.value):
        return Shown("n/a", reason=cell.reason or "no value")
    ends = interval_of(cell)
    interval = "" if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"
    return Shown(number(cell.value), interval, cell.reason or "")


def metric_title(metric: str) -> str:
    """A metric's name as readers know it; as it is where it has no other.

    >>> metric_title("i2t_recall@10"), metric_title("auroc_retention"), metric_title("omission")
    ('recall@10, image to report', 'AUROC retained', 'omission')
    """
    for suffix, said in DERIVED.items():
        if metric.endswith(suffix):
            return f"{metric_title(metric.removesuffix(suffix))} {said}"
    direction, _, rest = metric.partition("_")
    if direction in DIRECTIONS and rest:
        return f"{rest.replace('_', ' ')}, {DIRECTIONS[direction]}"
    return TITLES.get(metric, metric.replace("_", " "))


def number(value: float) -> str:
    """Three decimals below 10, else as many digits as matter.

    >>> number(0.63411), number(47781560), number(15.83), number(-0.0001), number(0.0)
    ('0.634', '47,781,560', '15.8', '0.000', '0')
    """
    if isinstance(value, int) or value == 0:
        value = int(value)
        return f"{value:,}"
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    text = f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def interval_of(cell: Cell) -> tuple[float, float] | None:
    """Both ends of the 95% interval, where they are known."""
    if not isinstance(cell, Estimate) or not all(map(math.isfinite, (cell.value, *cell.ci95))):
        return None
    return cell.ci95


def beside_floor(cell: Cell, column: Column) -> Literal["below its floor", "not above its floor", ""]:
    """Whether a score beats what a constant, a prior or copying scores; said only of what is better when higher."""
    ends = interval_of(cell)
    if column.better != "higher" or ends is None or not isinstance(cell, Estimate) or cell.floor is None:
        return ""
    if ends[0] > cell.floor + ROUNDING:
        return ""
    return "below its floor" if ends[1] < cell.floor - ROUNDING else "not above its floor"


def leading(table: Table, baselines: Collection[str] = ()) -> frozenset[tuple[int, str]]:
    """The cells, as row and column, whose value is the best of those it may be compared with, or overlaps the best one.

    Empty where nothing may be said: there is no better end, fewer than two values have intervals, no interval sets any
    of them apart, or the best is not above its floor. Intervals of single runs are wider than that of a paired
    difference: runs that both lead may still differ.

    Args:
        table: of a section.
        baselines: runs that are there to be beaten, and do not compete: what always answers the same is never
            inconsistent.
    """
    across = table.compared == "across"
    columns = [column for column in table.columns if column.better is not None]
    lines: dict[int | str, list[tuple[int, Column]]] = {}
    for k, row in enumerate(table.rows):
        for column in columns:
            if (column.run if across else row.get("run")) not in baselines:
                lines.setdefault(k if across else column.key, []).append((k, column))
    return frozenset(cell for line in lines.values() for cell in _leading(table, line))


def _leading(table: Table, line: Sequence[tuple[int, Column]]) -> set[tuple[int, str]]:
    found: dict[tuple[int, str], tuple[Estimate, tuple[float, float], Column]] = {}
    for k, column in line:
        cell = table.rows[k].get(column.key)
        if isinstance(cell, Estimate) and (ends := interval_of(cell)) is not None:
            found[k, column.key] = cell, ends, column
    if len(found) < 2:
        return set()
    sign = 1 if line[0][1].better == "higher" else -1
    best = max(found, key=lambda place: sign * found[place][0].value)
    near, far = (0, 1) if sign > 0 else (1, 0)
    group = {place for place, (_, ends, _) in found.items() if sign * ends[far] >= sign * found[best][1][near]}
    group = {place for place in group if not beside_floor(found[place][0], found[place][2])}
    return set() if best not in group or len(group) == len(found) else group

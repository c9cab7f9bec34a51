from __future__ import annotations

from typing import Literal

import pytest

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.report.parts import Column, Table
from medvlm_harness.results.report.shown import beside_floor, leading, shown

NAN = float("nan")


def estimate(value: float, low: float, high: float, floor: float | None = None) -> Estimate:
    return Estimate(value, NAN, (low, high), 100, floor=floor)


def ranked(*cells: Estimate, better: Literal["higher", "lower"] = "higher") -> list[int]:
    table = Table("t", "t", [Column("run", "Run"), Column("m", "M", better)], [{"run": "r", "m": one} for one in cells])
    return sorted(k for k, _ in leading(table))


@pytest.mark.parametrize(
    ("cells", "lead"),
    [
        ([estimate(0.9, 0.8, 0.95), estimate(0.5, 0.4, 0.6)], [0]),
        ([estimate(0.9, 0.8, 0.95), estimate(0.82, 0.7, 0.85), estimate(0.5, 0.4, 0.6)], [0, 1]),
        ([estimate(0.9, 0.8, 0.95), estimate(0.85, 0.7, 0.9)], []),  # nothing sets them apart
        ([estimate(0.9, 0.8, 0.95)], []),
        ([estimate(0.9, NAN, NAN), estimate(0.5, 0.4, 0.6)], []),  # the best has no interval
        ([estimate(0.6, 0.5, 0.7, floor=0.65), estimate(0.2, 0.1, 0.3, floor=0.65)], []),  # the best is at its floor
    ],
)
def test_who_leads(cells: list[Estimate], lead: list[int]) -> None:
    assert ranked(*cells) == lead


def test_less_may_be_better() -> None:
    assert ranked(estimate(0.9, 0.8, 0.95), estimate(0.5, 0.4, 0.6), better="lower") == [1]


def test_nothing_leads_where_nothing_is_better_and_baselines_do_not_compete() -> None:
    rows = [{"run": "base", "m": estimate(0.9, 0.8, 0.95)}, {"run": "a", "m": estimate(0.5, 0.4, 0.6)}]
    assert not leading(Table("t", "t", [Column("m", "M")], rows))
    table = Table("t", "t", [Column("m", "M", "higher")], rows)
    assert leading(table) == {(0, "m")}
    assert not leading(table, {"base"})


def test_across_compares_the_runs_of_a_row() -> None:
    columns = [Column("a", "A", "higher", run="a"), Column("b", "B", "higher", run="b")]
    rows = [{"a": estimate(0.9, 0.8, 0.95), "b": estimate(0.5, 0.4, 0.6)}, {"a": estimate(0.1, 0, 0.2), "b": None}]
    assert leading(Table("t", "t", columns, rows, compared="across")) == {(0, "a")}


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (estimate(0.7, 0.6, 0.8, floor=0.5), ""),
        (estimate(0.7, 0.4, 0.8, floor=0.5), "not above its floor"),
        (estimate(0.3, 0.2, 0.4, floor=0.5), "below its floor"),
        (estimate(1 / 24, 1 / 24, 1 / 24, floor=1 / 24 + 1e-16), "not above its floor"),
        (estimate(1 / 24, 1 / 24, 1 / 24, floor=1 / 24 - 1e-16), "not above its floor"),
        (estimate(0.7, 0.6, 0.8), ""),
    ],
)
def test_beside_the_floor(one: Estimate, said: str) -> None:
    assert beside_floor(one, Column("m", "M", "higher")) == said
    assert beside_floor(one, Column("m", "M", "lower")) == ""  # there a floor is what noise gives


def test_a_missing_value_keeps_its_reason() -> None:
    one = shown(Estimate.undefined("no positives", n=3))
    assert (one.text, one.interval, one.reason) == ("n/a", "", "no positives")
    assert shown(estimate(0.63411, 0.5934, 0.67518))[:2] == ("0.634", "[0.593, 0.675]")

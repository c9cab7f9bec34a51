from __future__ import annotations

import time

import pytest

from medvlm_harness.metrics.measurements import measurements

LENGTH, VOLUME, ANGLE, SHARE = "length in mm", "volume in ml", "angle in degrees", "share in percent"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a 3.5 cm mass", {(LENGTH, 35)}),
        ("a 35 mm mass", {(LENGTH, 35)}),
        ("a 35-mm mass", {(LENGTH, 35)}),
        ("a 3.5cm. Stable.", {(LENGTH, 35)}),
        ("a 3 . 5 cm mass", {(LENGTH, 35)}),
        (".5 cm", {(LENGTH, 5)}),
        ("one centimeter", {(LENGTH, 10)}),
        ("2 inches", {(LENGTH, 50.8)}),
        ("3.5 x 2 x 1 cm", {(LENGTH, 35), (LENGTH, 20), (LENGTH, 10)}),
        ("1.5 cm by 20 mm", {(LENGTH, 15), (LENGTH, 20)}),
        ("5-6 mm", {(LENGTH, 5), (LENGTH, 6)}),
        ("from 8 to 10 mm", {(LENGTH, 8), (LENGTH, 10)}),
        ("6mm-8mm", {(LENGTH, 6), (LENGTH, 8)}),
        ("100 ml, then 1 liter", {(VOLUME, 100), (VOLUME, 1000)}),
        ("20 degrees, 30%", {(ANGLE, 20), (SHARE, 30)}),
        ("Rib 7. 3 mm nodule", {(LENGTH, 3)}),
    ],
)
def test_numbers_with_units_are_read_in_one_unit(text: str, expected: set[tuple[str, float]]) -> None:
    assert measurements(text) == expected


@pytest.mark.parametrize(
    "text", ["", "rib 7", "T8", "XXXX cm", "2 views", "in 2010", "3 in the left lung", "5 cmx", "one mass", "1.2.3 cm"]
)
def test_other_numbers_are_no_measurements(text: str) -> None:
    assert measurements(text) == frozenset()


@pytest.mark.parametrize("unit", ["1", "1 x ", "1 to ", "1 . ", "1.", "one ", "1 cm "])
def test_any_model_output_is_read_in_linear_time(unit: str) -> None:
    start = time.perf_counter()
    measurements(unit * 20_000)
    assert time.perf_counter() - start < 2

"""Sizes that a text states, in one unit per kind, so that 3.5 cm and 35 mm are the same."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Measurement", "measurements"]

_UNITS = {  # unit as written, without plural -> kind, factor
    "mm": ("length in mm", 1.0),
    "millimeter": ("length in mm", 1.0),
    "millimetre": ("length in mm", 1.0),
    "cm": ("length in mm", 10.0),
    "centimeter": ("length in mm", 10.0),
    "centimetre": ("length in mm", 10.0),
    "inch": ("length in mm", 25.4),
    "inche": ("length in mm", 25.4),
    "ml": ("volume in ml", 1.0),
    "cc": ("volume in ml", 1.0),
    "liter": ("volume in ml", 1000.0),
    "litre": ("volume in ml", 1000.0),
    "degree": ("angle in degrees", 1.0),
    "°": ("angle in degrees", 1.0),
    "%": ("share in percent", 1.0),
    "percent": ("share in percent", 1.0),
}
_NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_IN_WORDS = {name: str(value) for value, name in enumerate(_NAMES, start=1)}
# Tokenised text writes "4 . 2 cm". At most six digits: no size has more, and a long run must not cost time.
_NUMBER = r"(?<![\d.])(?:\d{1,6}(?:\.\d{1,6}| \. \d{1,6})?|\.\d{1,6})"
_UNIT = r"(?:millimet(?:er|re)s?|centimet(?:er|re)s?|inch(?:es)?|mms?|cms?|ml|cc|lit(?:er|re)s?|degrees?|percent|°|%)"
_FINAL_UNIT = rf"\s?-?\s?(?P<unit>{_UNIT})(?![a-z0-9])"
_LIST = rf"{_NUMBER}(?:\s?-?\s?(?:mm|cm))?(?:\s?(?:x|×|by|-|–|to|or)\s?{_NUMBER}(?:\s?-?\s?(?:mm|cm))?){{0,3}}?"
_MEASURED = re.compile(rf"(?P<numbers>{_LIST}){_FINAL_UNIT}")
_ONE = re.compile(rf"({_NUMBER})(?:\s?-?\s?(mm|cm))?")
_WORDED = re.compile(rf"\b({'|'.join(_IN_WORDS)})(?=[\s-]{_UNIT}(?![a-z0-9]))")


class Measurement(NamedTuple):
    """A number with what it measures."""

    kind: str  # with its unit
    value: float


def measurements(text: str) -> frozenset[Measurement]:
    """Every number with a unit in a text; each extent of "3 x 2 cm" and each end of "5 to 6 mm" by itself.

    Lengths are in mm, volumes in ml. Numbers without a unit (ribs, vertebrae, dates), and units whose number was
    removed by de-identification, are none.

    >>> measurements("A 3.5 cm mass") == measurements("a mass of 35 millimeters")
    True
    """
    found = set()
    for match in _MEASURED.finditer(_WORDED.sub(lambda word: _IN_WORDS[word[1]], text.lower())):
        for number, own_unit in _ONE.findall(match["numbers"]):
            kind, factor = _UNITS[own_unit or match["unit"].rstrip("s")]
            # Rounded: 0.35 * 10 is not 3.5 in binary.
            found.add(Measurement(kind, round(float(number.replace(" ", "")) * factor, 6)))
    return frozenset(found)

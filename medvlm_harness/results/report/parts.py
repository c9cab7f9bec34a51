"""What reports and cards are made of, whatever they are written in: sections of tables and plots, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from medvlm_harness.metrics.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Cell", "Column", "Plot", "Section", "Table"]

Cell = str | int | float | Estimate | None
"""An estimate is shown with its interval, and with its reason where it has no value; None is an empty cell."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the rows' mappings.
        title: its heading.
        better: which way is better, where that can be said.
        explanation: what the numbers are, in a sentence.
    """

    key: str
    title: str
    better: Literal["higher", "lower"] | None = None
    explanation: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; `name` names its file where it becomes one."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure that is drawn when it is needed, and the numbers behind it.

    Attributes:
        name: of its file, without suffix.
        title: what is drawn.
        alt: what it shows, for who cannot see it.
        draw: gives the figure, in the house style.
        data: what is drawn, one mapping per row.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]
    data: Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; `name` is its anchor."""

    name: str
    title: str
    text: Sequence[str] = ()
    parts: Sequence[Table | Plot] = ()

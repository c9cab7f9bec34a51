"""What reports and cards are made of, whatever they are written in: sections of tables and plots, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from medvlm_harness.metrics.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Cell", "Column", "Plot", "Report", "Section", "Table"]

Cell = str | int | float | Estimate | None
"""An estimate is shown with its interval, and with its reason where it has no value; None is an empty cell."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the rows' mappings.
        title: its heading.
        better: which way is better, where that can be said and values may be compared.
        explanation: what the numbers are, in a sentence.
        run: the run that all of it is of, if it is of one. A column with the key `run` says whose each row is.
    """

    key: str
    title: str
    better: Literal["higher", "lower"] | None = None
    explanation: str = ""
    run: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        name: of its file where it becomes one.
        title: what it shows.
        columns: from the left.
        rows: by the columns' keys.
        note: what must be read with it.
        compared: which values may be compared with each other, where their columns have a better end: those below
            each other, or those of one row.
        about: the task it is of, where it is of one.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    note: str = ""
    compared: Literal["down", "across"] = "down"
    about: str = ""

    @property
    def heading(self) -> str:
        """Its title with what it is about, for where it stands alone."""
        return f"{self.title}: {self.about}" if self.about else self.title


@dataclass(frozen=True)
class Plot:
    """A figure that is drawn when it is needed, and the numbers behind it.

    Attributes:
        name: of its file, without suffix.
        title: what is drawn.
        alt: what it shows, for who cannot see it.
        draw: gives the figure, in the house style.
        data: what is drawn, one mapping per row.
        about: the task it is of, where it is of one.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]
    data: Sequence[Mapping[str, object]]
    about: str = ""

    @property
    def heading(self) -> str:
        """Its title with what it is about, for where it stands alone."""
        return f"{self.title}: {self.about}" if self.about else self.title


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; `name` is its anchor."""

    name: str
    title: str
    text: Sequence[str] = ()
    parts: Sequence[Table | Plot] = ()


@dataclass(frozen=True)
class Report:
    """All that a report says, in no format yet.

    Attributes:
        title: of the whole.
        summary: what was run, in a line.
        runs: names of the runs, in the order of their colours.
        baselines: those of them that are there to be beaten.
        alerts: what must be known before anything is read.
        sections: in the order they are read.
    """

    title: str
    summary: str
    runs: Sequence[str]
    baselines: frozenset[str]
    alerts: Sequence[str]
    sections: Sequence[Section]

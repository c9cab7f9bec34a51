"""What the plots of a report share: how each run looks, a forest of intervals, panels with one legend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.plots import COLOURS, house_style, new_figure
from medvlm_harness.results.report.shown import interval_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Row", "counts_text", "forest", "forest_data", "labelled", "legend", "look", "small_multiples", "thinned"]

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")
FLOOR = "#444444"
POINTS = 120  # of one curve: more than a panel of this size can show


@dataclass(frozen=True)
class Row:
    """A row of a forest: what it is, its counts, and each run's value."""

    title: str
    support: str
    values: Mapping[str, Estimate]
    floor: float | None = None


def look(place: int) -> dict[str, Any]:
    """Colour, marker and line of the run at a place; of 28 no two have the same colour and line."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[place % len(LINES)],
    }


def labelled(label: str) -> str:
    """A label's key in words.

    >>> labelled("pleural_effusion")
    'Pleural effusion'
    """
    return label.replace("_", " ").capitalize()


def counts_text(positives: int | None, n: int | None) -> str:
    """Positives of n; a suppressed count is said to be so."""
    return "not shown" if positives is None or n is None else f"{positives}/{n}"


def forest(
    rows: Sequence[Row],
    runs: Mapping[str, int],
    *,
    measure: str,
    support: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Values with their intervals, one row each and the runs below each other within it; supports stand at the right.

    Args:
        rows: from the top.
        runs: whose values -> their places in the report.
        measure: what the axis shows.
        support: what the counts at the right are.
        limits: of the axis; None: what the intervals need.
    """
    step = max(0.34, 0.115 * len(runs) + 0.14)
    with house_style():
        figure, [panel] = new_figure(size=(7.6, 1.0 + step * len(rows)))
        for nth, (run, place) in enumerate(runs.items()):
            shift = (nth - (len(runs) - 1) / 2) * 0.8 / max(len(runs), 2)
            style = {**look(place), "linestyle": "none"}
            named = False
            for k, row in enumerate(rows):
                if (value := row.values.get(run)) is None or (ends := interval_of(value)) is None:
                    continue
                panel.plot(ends, [k + shift] * 2, color=style["color"], linewidth=1.2, solid_capstyle="butt")
                panel.plot([value.value], [k + shift], markersize=4.5, label=None if named else run, **style)
                named = True
        for k, row in enumerate(rows):
            if k % 2:
                panel.axhspan(k - 0.5, k + 0.5, color="#f4f4f4", zorder=0, linewidth=0)
            if row.floor is not None:
                panel.plot([row.floor] * 2, [k - 0.5, k + 0.5], color=FLOOR, linewidth=1, linestyle=(0, (3, 2)))
            panel.annotate(
                row.support,
                (1.01, k),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                annotation_clip=False,
            )
        panel.annotate(support, (1.01, 1.0), xycoords="axes fraction", va="bottom", fontsize=8)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_yticks(range(len(rows)), [row.title for row in rows])
        panel.tick_params(axis="y", length=0)
        panel.grid(visible=False, axis="y")
        panel.set_xlabel(measure)
        if limits:
            panel.set_xlim(*limits)
        legend(figure, [panel])
    return figure


def forest_data(rows: Sequence[Row], runs: Iterable[str]) -> list[dict[str, object]]:
    """The numbers of a forest, one row per interval that is drawn."""
    return [
        {
            "row": row.title,
            "run": run,
            "value": value.value,
            "low": value.ci95[0],
            "high": value.ci95[1],
            "floor": row.floor,
            "n": value.n,
            "positives": value.positives,
        }
        for row in rows
        for run in runs
        if (value := row.values.get(run)) is not None and interval_of(value) is not None
    ]


def small_multiples(count: int, *, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A grid of `count` small panels, at most four beside each other; `rows` such grids below each other.

    Panels that are left over are taken away.
    """
    columns = min(count, 4)
    lines = -(-count // columns)
    size = (2.3, 2.1) if columns > 2 else (3.2, 2.4)
    figure, panels = new_figure(rows=lines * rows, columns=columns, size=size, **options)
    kept: list[Axes] = []
    for start in range(0, len(panels), lines * columns):
        kept += panels[start : start + count]
        for panel in panels[start + count : start + lines * columns]:
            panel.remove()
    return figure, kept


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, above them; none where one run needs no telling apart."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        width = figure.get_size_inches()[0]
        longest = max(map(len, found))
        columns = max(1, min(len(found), int(width / (0.085 * longest + 0.45))))
        figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(found) // columns))  # the panels keep their room
        figure.legend(list(found.values()), list(found), loc="outside upper left", ncols=columns, fontsize=8)


def thinned(points: Sequence[tuple[float, float]], count: int = POINTS) -> list[tuple[float, float]]:
    """A curve by fewer of its points, the first and the last among them: those nearest to even steps along it.

    What is left out lies between two points that are drawn, less than 2 / count from either in x and y together.
    """
    if len(points) <= count:
        return list(points)
    kept, travelled, due = [points[0]], 0.0, 0.0
    total = sum(abs(x1 - x0) + abs(y1 - y0) for (x0, y0), (x1, y1) in pairwise(points))
    for (x0, y0), (x1, y1) in pairwise(points):
        travelled += abs(x1 - x0) + abs(y1 - y0)
        if travelled >= due + total / (count - 2):
            kept.append((x1, y1))
            due = travelled
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]

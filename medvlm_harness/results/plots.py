"""House style of plots, and writing them: PNG or SVG by suffix, with the numbers behind them as CSV beside it.

    with house_style():
        figure, (left, right) = new_figure(columns=2)
        left.plot(...)
    save_plot(figure, Path("curve.svg"), data=rows)

Nothing here touches pyplot: no window, no figure that stays in memory, no backend to choose.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm_harness.errors import UserError
from medvlm_harness.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "SEQUENTIAL", "house_style", "label_points", "new_figure", "plot_data", "save_plot"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""For categories: colour-blind readers tell them apart (Okabe and Ito 2008, less the yellow, which hardly prints)."""
SEQUENTIAL = "viridis"
"""Colour map of numbers: even steps of lightness, so that it survives grey print; light marks need a dark edge."""
PANEL = (4.2, 3.4)  # inches
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib: plots are the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.fonttype": "none",  # text in an SVG stays text: to be searched, copied and read aloud
    "svg.hashsalt": "medvlm-harness",  # ids inside an SVG are drawn at random otherwise
}
# What a format stamps into the file by itself: the date, the version of matplotlib.
UNSTAMPED: Mapping[str, Mapping[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}


@contextmanager
def house_style() -> Iterator[None]:
    """What is drawn inside has the style, whatever the user's matplotlibrc says."""
    import cycler
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        matplotlib.rcParams["axes.prop_cycle"] = cycler.cycler(color=COLOURS)
        yield


def new_figure(
    *, rows: int = 1, columns: int = 1, size: tuple[float, float] = PANEL, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure in the house style and its panels, row by row.

    Args:
        rows: of panels.
        columns: of panels.
        size: width and height of one panel, in inches.
        options: of `Figure.subplots`, such as `sharey=True`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=(size[0] * columns, size[1] * rows))
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(panels.ravel())


def label_points(
    panel: Axes, points: Sequence[tuple[float, float, str]], bars: Sequence[tuple[float, float]] = ()
) -> None:
    """Write each point's name near it, where it covers no other name or point, and best no bar either.

    Call it last: places are chosen for the figure as it is then. In a crowd a name stands where it covers least, with a
    line to its point.

    Args:
        panel: drawn, with its scales and limits.
        points: x, y and name.
        bars: low and high end of each point's vertical bar; none where there are no bars.
    """
    from matplotlib.transforms import Bbox

    figure: Any = panel.figure
    figure.canvas.draw()
    renderer, within, pixels = figure.canvas.get_renderer(), panel.get_window_extent(), figure.dpi / 72
    centres = [panel.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 6 * pixels, y - 6 * pixels, 12 * pixels, 12 * pixels) for x, y in centres]
    thin = []
    for (x, _, _), (low, high) in zip(points, bars, strict=False):
        (left, bottom), (_, top) = panel.transData.transform([(x, low), (x, high)])
        thin.append(Bbox.from_extents(left - 2, bottom, left + 2, top))
    for (x, y, name), (left, bottom) in zip(points, centres, strict=True):
        text = panel.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, zorder=4)
        text.set_in_layout(False)  # a name must not move the axes that it was placed by
        size = text.get_window_extent(renderer)
        text.remove()
        tried: list[tuple[float, int, float, float, Any]] = []
        for radius in (7, 12, 18, 26, 36, 48):
            for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
                # The corner or the edge of the name that is nearest to the point.
                x0 = left + right * radius * pixels - (1 - right) / 2 * size.width
                y0 = bottom + up * radius * 0.7 * pixels - (1 - up) / 2 * size.height
                box = Bbox.from_bounds(x0, y0, size.width, size.height)
                covered = sum(_shared_area(box.padded(2), other) for other in taken)
                outside = size.width * size.height - _shared_area(box, within)
                crossed = sum(_shared_area(box, bar) for bar in thin)
                # In square pixels: to lie across a bar is better than to lie far away.
                cost = 5 * (covered + outside) + 0.3 * crossed + 6 * radius * pixels
                tried.append((cost, len(tried), x0, y0, box))
        _, place, x0, y0, box = min(tried, key=lambda one: one[:2])
        taken.append(box)
        panel.annotate(
            name,
            (x, y),
            xytext=((x0 - left) / pixels, (y0 - bottom) / pixels),
            textcoords="offset points",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6} if place >= 16 else None,
        ).set_in_layout(False)


def _shared_area(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0) * max(height, 0))


def save_plot(figure: Figure, path: Path, *, data: Sequence[Mapping[str, object]]) -> Path:
    """Write the figure, and `<name>.csv` beside it; each whole or not at all, and the same bytes each time.

    Args:
        figure: as `new_figure` gives it.
        path: ends in .png or .svg; its folder is made.
        data: the numbers that are drawn, one mapping per row of the CSV.

    Returns:
        The path of the CSV.

    Raises:
        UserError: for another suffix.
        ValueError: if there is no row, or a value is neither a number, a string nor None.
    """
    suffix = path.suffix.lower()
    if suffix not in UNSTAMPED:
        raise UserError(f"Expected a plot to be named .png or .svg, but got {path.name}.")
    table = plot_data(data)
    drawn = io.BytesIO()
    with house_style():
        figure.savefig(drawn, format=suffix[1:], metadata=dict(UNSTAMPED[suffix]))
    beside = path.with_suffix(".csv")
    for file, content in ((path, drawn.getvalue()), (beside, table.encode())):
        write_whole(file, content)
    return beside


def plot_data(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV: the columns of all rows in the order they first occur; empty for what is None, NaN or missing.

    A text that a spreadsheet would run as a formula has an apostrophe before it.
    """
    if not rows:
        raise ValueError("Expected rows of data for a plot, but got none.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_text(column) for column in columns])
    writer.writerows([_cell(key, row.get(key)) for key in columns] for row in rows)
    return out.getvalue()


def _cell(key: str, value: object) -> object:
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"Expected numbers and strings in the data of a plot, but {key} is {type(value).__name__}.")
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

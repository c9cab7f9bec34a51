from __future__ import annotations

import csv
from pathlib import Path

import matplotlib
import pytest
from matplotlib.text import Text
from PIL import Image

from medvlm_harness.errors import UserError
from medvlm_harness.results.plots import house_style, label_points, new_figure, plot_data, save_plot

ROWS = [{"run": "fp32", "x": 1.0, "y": 0.7}, {"run": "nf4, slow", "x": 2.0, "y": None, "note": "not run"}]


def drawn(value: float = 2.0):  # type: ignore[no-untyped-def]  # a Figure
    with house_style():
        figure, (left, right) = new_figure(columns=2)
        left.plot([1, value], label="a")
        right.bar([0, 1], [1, value])
        left.legend()
    return figure


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_plot_is_the_same_file_and_another_is_not(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "abc"]
    for path, value in zip(paths, (2.0, 2.0, 3.0), strict=True):
        save_plot(drawn(value), path, data=ROWS)
    one, again, other = (path.read_bytes() for path in paths)
    assert one == again
    assert one != other


def test_the_picture_opens_and_its_numbers_lie_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "plot.png"
    beside = save_plot(drawn(), path, data=ROWS)
    assert Image.open(path).size == (1680, 680)
    assert beside == path.with_suffix(".csv")
    with beside.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"run": "fp32", "x": "1.0", "y": "0.7", "note": ""},
            {"run": "nf4, slow", "x": "2.0", "y": "", "note": "not run"},
        ]
    assert {file.name for file in path.parent.iterdir()} == {"plot.png", "plot.csv"}


def test_the_users_own_settings_neither_change_a_plot_nor_are_changed(tmp_path: Path) -> None:
    save_plot(drawn(), tmp_path / "plain.png", data=ROWS)
    with matplotlib.rc_context({"font.size": 30, "figure.dpi": 7, "axes.facecolor": "red"}):
        save_plot(drawn(), tmp_path / "wild.png", data=ROWS)
        assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.facecolor"]) == (30, "red")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "wild.png").read_bytes()


def test_nan_is_an_empty_cell() -> None:
    assert plot_data([{"a": float("nan"), "b": 0}]) == "a,b\n,0\n"


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"named \.png or \.svg, but got plot\.pdf"):
        save_plot(drawn(), tmp_path / "plot.pdf", data=ROWS)
    with pytest.raises(ValueError, match="got none"):
        save_plot(drawn(), tmp_path / "plot.png", data=[])
    with pytest.raises(ValueError, match="x is list"):
        save_plot(drawn(), tmp_path / "plot.png", data=[{"x": [1]}])
    assert list(tmp_path.iterdir()) == []


def test_names_of_points_cover_neither_each_other_nor_points() -> None:
    points = [(0.1 * k, 0.05 * k, f"a long name {k}") for k in range(6)] + [(0.02, 0.0, "close")]
    with house_style():
        figure, (panel,) = new_figure()
        panel.plot(*zip(*(point[:2] for point in points), strict=True), "o")
        panel.margins(0.3)
        label_points(panel, points)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [Text.get_window_extent(text, renderer) for text in panel.texts]
    assert [text.get_text() for text in panel.texts] == [name for _, _, name in points]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    centres = [panel.transData.transform(point[:2]) for point in points]
    assert not any(box.contains(*centre) for box in boxes for centre in centres)

from __future__ import annotations

import pytest
from defusedxml import ElementTree
from matplotlib.figure import Figure

from medvlm_harness.results.plots import house_style, new_figure
from medvlm_harness.results.report.svg import inline_svg

from .conftest import HOSTILE


def drawn(text: str = "name") -> Figure:
    with house_style():
        figure, [panel] = new_figure()
        panel.plot([0, 1, 2], [0.123456, 2, 1], "o-", label=text)
        panel.imshow([[0, 1], [1, 0]], extent=(0, 2, 0, 2))
        panel.legend()
    return figure


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text: str) -> None:
    svg = inline_svg(drawn(text), "figure-a", "f1")
    root = ElementTree.fromstring(svg)
    assert text in [one.text for one in root.iter() if one.tag.endswith("text")]
    assert "<script" not in svg and "<img" not in svg


def test_ids_are_the_figures_own_and_nothing_points_outside() -> None:
    root = ElementTree.fromstring(inline_svg(drawn(), "figure-a", "f1"))
    ids = [one.attrib["id"] for one in root.iter() if "id" in one.attrib]
    assert ids and all(one.startswith("f1-") for one in ids)
    links = [value for one in root.iter() for key, value in one.attrib.items() if key.endswith("href")]
    assert any(link.startswith("data:image/png;base64,") for link in links)
    assert all(link[1:] in ids or link.startswith("data:image/png;base64,") for link in links)
    assert root.attrib["aria-labelledby"] == "figure-a-title figure-a-alt"


def test_marks_keep_their_places_and_their_look() -> None:
    root = ElementTree.fromstring(inline_svg(drawn(), "a", "f1"))
    (group,) = (one for one in root.iter() if len(one) == 3 and all(mark.tag.endswith("use") for mark in one))
    assert "fill:#0072b2" in group.attrib["style"]
    x = [float(mark.attrib["x"]) for mark in group]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)  # evenly apart, to a tenth of a point

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from medvlm_harness.results.report.html import render_html
from medvlm_harness.results.report.parts import Report

from .conftest import HOSTILE

# Elements and attributes by which a page fetches or runs something.
FETCHING = {"img", "link", "iframe", "object", "embed", "source", "video", "audio", "base", "form"}


class Page(HTMLParser):
    """What a parser makes of the page, unlike a search in its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(render_html(report))


@pytest.fixture(scope="module")
def attacked(hostile: Report) -> Page:
    return Page(render_html(hostile))


def test_the_page_is_one_file_that_asks_for_nothing(page: Page) -> None:
    assert not FETCHING & {tag for tag, _ in page.elements}
    links = [
        value for _, found in page.elements for key, value in found.items() if key in ("href", "src", "xlink:href")
    ]
    assert links
    assert all(value is not None and value.startswith(("#", "data:image/png;base64,")) for value in links)
    (policy,) = (found["content"] for tag, found in page.elements if "http-equiv" in found and tag == "meta")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_ids_stand_once_and_what_is_referred_to_is_there(page: Page) -> None:
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    referred = {
        name
        for _, found in page.elements
        for key in ("aria-labelledby", "aria-describedby")
        for name in (found.get(key) or "").split()
    }
    referred |= {(found.get("href") or "")[1:] for tag, found in page.elements if tag in ("a", "use")}
    assert referred <= set(ids)


def test_every_table_figure_and_field_has_a_name(page: Page) -> None:
    for tag, found in page.elements:
        if tag in ("table", "svg"):
            assert found.get("aria-labelledby")
    headers = [found for tag, found in page.elements if tag == "th"]
    assert all(found.get("scope") in ("col", "row") for found in headers)


def test_the_banner_and_the_floors_are_there(page: Page) -> None:
    said = " ".join(page.texts)
    assert "Not for clinical use." in said
    assert "floor 0.500" in said


def test_nothing_from_a_results_file_becomes_an_element_or_an_attribute(attacked: Page) -> None:
    assert [tag for tag, _ in attacked.elements].count("script") == 1
    assert not FETCHING & {tag for tag, _ in attacked.elements}
    assert not any(key.startswith("on") for _, found in attacked.elements for key in found)
    assert not any("javascript:" in (found.get("href") or "") for _, found in attacked.elements)


@pytest.mark.parametrize("text", HOSTILE)
def test_and_yet_it_can_be_read(attacked: Page, text: str) -> None:
    assert text in "".join(attacked.texts)


def test_dollar_signs_in_names_are_not_drawn_as_mathematics(hostile: Report) -> None:
    figures = re.findall(r"<svg.*?</svg>", render_html(hostile), re.DOTALL)
    assert any("$x^2$" in figure for figure in figures)

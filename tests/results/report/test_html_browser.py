"""The page in a real browser: that it works is what a parser cannot say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from medvlm_harness.results.report.html import render_html
from medvlm_harness.results.report.parts import Report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: none of its names is on the path")

# Contrast of each element that has text of its own, WCAG 2: (L1 + 0.05) / (L2 + 0.05), over the nearest background.
CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[0-9.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.a > 0) return found.rgb;
    }
    return parse(getComputedStyle(document.body).backgroundColor).rgb;
  };
  const low = [];
  for (const one of document.querySelectorAll("body *:not(svg *, script, style)")) {
    if (![...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(one).color).rgb), light(behind(one))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([one.tagName, one.className, ratio.toFixed(2), one.textContent.slice(0, 30)].join(" "));
  }
  return [...new Set(low)].slice(0, 5);
}"""


class Browser(NamedTuple):
    """One browser, the page's address, and what it said and asked for."""

    browser: Any
    url: str
    said: list[str]
    asked: list[str]

    def page(self, width: int = 1300, **options: Any) -> Any:
        page = self.browser.new_page(viewport={"width": width, "height": 850}, **options)
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(self.url)
        return page


@pytest.fixture(scope="module")
def browser(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_html(report), encoding="utf-8")
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield Browser(started, path.as_uri(), [], [])
        started.close()


@pytest.fixture(scope="module")
def page(browser: Browser) -> Any:
    return browser.page()


def first_cells(page: Any, table: str) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        f"#{table} tbody tr:not([hidden]) th", "cells => cells.map(cell => cell.textContent.trim())"
    )
    return found


def test_a_column_is_sorted_from_the_keyboard(page: Any) -> None:
    table = "table-labels-demo-cxr-zeroshot"
    heads = page.locator(f"#{table} thead th")
    place = [text.strip().startswith("reader fp32") for text in heads.all_text_contents()].index(True)
    before = first_cells(page, table)
    heads.nth(place).locator("button").focus()
    page.keyboard.press("Enter")
    assert heads.nth(place).get_attribute("aria-sort") == "descending"  # the best first
    values = page.eval_on_selector_all(
        f"#{table} tbody td:nth-child({place + 1})", "cells => cells.map(cell => parseFloat(cell.dataset.sort))"
    )
    known = [value for value in values if value == value]
    assert known == sorted(known, reverse=True)
    assert all(value != value for value in values[len(known) :])  # what is not known comes last
    page.keyboard.press("Space")
    assert heads.nth(place).get_attribute("aria-sort") == "ascending"
    heads.nth(0).locator("button").focus()
    page.keyboard.press("Enter")
    assert first_cells(page, table) == sorted(before, key=str.lower)
    assert heads.nth(place).get_attribute("aria-sort") == "none"


def test_rows_are_filtered_and_counted(page: Any) -> None:
    field = page.locator("input[data-filter]:visible").first
    table = field.get_attribute("data-filter")
    every = first_cells(page, table)
    field.focus()
    page.keyboard.type(every[0].lower())
    left = first_cells(page, table)
    assert 0 < len(left) < len(every)
    assert f"{len(left)} of {len(every)} rows" in page.locator(f"output[data-count={table}]").text_content()
    field.fill("")
    assert first_cells(page, table) == every


def test_a_run_is_hidden_in_all_tables_rows_and_columns(page: Any) -> None:
    box = page.locator(".runs input[value='reader int8']")
    assert page.locator("tr[data-run='reader int8']:not([hidden])").count() > 3
    box.focus()
    page.keyboard.press("Space")
    assert page.locator("[data-run='reader int8']:not([hidden])").count() == 0
    assert page.locator("tr[data-run='reader fp32']:not([hidden])").count() > 3
    page.keyboard.press("Space")
    assert page.locator("[data-run='reader int8'][hidden]").count() == 0


def test_the_first_tab_leads_to_the_results_and_focus_is_seen(browser: Browser) -> None:
    page = browser.page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


@pytest.mark.parametrize("width", [390, 768, 1300])
def test_the_page_itself_never_scrolls_sideways(browser: Browser, width: int) -> None:
    page = browser.page(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Browser, scheme: str) -> None:
    page = browser.page(color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    page.close()


def test_it_prints(page: Any) -> None:
    printed = page.pdf(prefer_css_page_size=True)
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000


def test_nothing_was_said_and_nothing_asked_for_but_the_page(browser: Browser, page: Any) -> None:
    assert browser.said == []
    assert set(browser.asked) == {browser.url}

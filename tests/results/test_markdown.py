"""Whatever a name or an answer is written like, a Markdown page shows it and does nothing else."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from medvlm_harness.results.markdown import escape_markdown, link_text

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/a.png)",
    "[ref]: http://evil.example",
    "a | b | c",
    "`code` and ```fence```",
    "**bold** _em_ __strong__ ~~gone~~",
    "# heading",
    "1. list",
    "- list",
    "+ list",
    "> quote",
    "---",
    "www.evil.example and http://evil.example and me@evil.example",
    "\\| already",
    "&lt;b&gt;",
    "$$x$$",
]


@pytest.mark.parametrize("text", NASTY)
def test_a_reader_sees_what_was_written_and_nothing_happens(text: str) -> None:
    shown = escape_markdown(text)
    assert html.unescape(shown) == text
    # Another's reader of Markdown, with tables and raw HTML allowed, makes one plain paragraph of it.
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(shown)
    assert re.fullmatch(r"<p>[^<>]*</p>\n", page)
    assert html.unescape(page[3:-5]) == text
    # What a Hub makes a link of by itself.
    bare = re.sub(r"&#\d+;", "x", shown)
    assert "://" not in bare
    assert "www." not in bare
    assert "@" not in bare


def test_raw_text_would_do_harm() -> None:
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    harmless = [text for text in NASTY if re.fullmatch(r"<p>[^<>]*</p>\n", reader.render(text))]
    assert len(harmless) <= 6  # those that only mean something in a table, or to a Hub


@pytest.mark.parametrize("text", ["iu_cxr_zeroshot", "0.634 [0.593, 0.675]", "n/a (too few)", "-0.04", "CC BY-NC 4.0"])
def test_plain_names_and_numbers_stay_readable(text: str) -> None:
    assert escape_markdown(text) == text


def test_a_text_becomes_one_line_and_is_cut() -> None:
    assert escape_markdown("a\n\n# b\r\n\u2028c\x00d") == "a # b c d"
    assert len(escape_markdown("x" * 1000, longest=50)) == 50


@pytest.mark.parametrize("text", NASTY)
def test_in_a_link_it_does_not_end_the_link(text: str) -> None:
    page = MarkdownIt("commonmark", {"html": True}).render(f"![{link_text(text)}](a.png)")
    assert html.unescape(page) == f'<p><img src="a.png" alt="{text}" /></p>\n'

"""Markdown tables, and how numbers stand in them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

__all__ = ["Notes", "escape_markdown", "interval_cell", "link_text", "markdown_table", "number_cell"]

# What means something in Markdown or HTML becomes an entity, which can open nothing; what does so only in some places
# is left alone elsewhere, so that names and numbers stay readable in the source.
_SPECIAL = re.compile(
    r"[\\`*|<>~&$@]"
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # emphasis; not inside a word
    r"|:(?=//)|(?<=\])[(:]|!(?=\[)|(?i:(?<=\bwww)\.)"  # links, pictures, definitions
    r"|^[#=]|^[-+](?=[\s+-]|$)|^\d+(?=[.)](?:\s|$))"  # headings, rules and lists
)


def escape_markdown(value: object, *, longest: int | None = None) -> str:
    """One line of Markdown that shows a value as it is written and does nothing else; cut where it is longer.

    >>> escape_markdown("<b>|iu_cxr|</b>")
    '&#60;b&#62;&#124;iu_cxr&#124;&#60;/b&#62;'
    """
    text = "".join(" " if unicodedata.category(one).startswith(("C", "Z")) else one for one in str(value))
    text = " ".join(text.split())
    text = text if longest is None or len(text) <= longest else text[: longest - 1] + "…"
    return _SPECIAL.sub(lambda found: "".join(f"&#{ord(one)};" for one in found[0]), text)


def link_text(text: str, *, longest: int | None = None) -> str:
    """As `escape_markdown`, for what stands in the brackets of a link or a picture."""
    return escape_markdown(text, longest=longest).replace("[", "&#91;").replace("]", "&#93;")


def markdown_table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    head, *rest = (_line(row, widths) for row in rows)
    return [head, rule, *rest]


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    return "|" + "|".join(f" {cell:<{width}} " for cell, width in zip(row, widths, strict=True)) + "|"


def number_cell(value: float | None) -> str:
    """Four decimals; a word where there is no value."""
    return "undefined" if value is None else f"{value:.4f}"


def interval_cell(ends: Sequence[float] | None) -> str:
    """Both ends; empty where they are unknown."""
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


class Notes:
    """Reasons, each with a number that cells refer to."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, reason: str | None) -> str:
        """The cell of a value that is missing."""
        return f"n/a {self.mark(reason or 'no value')}"

    def mark(self, reason: str) -> str:
        """What refers to it."""
        return f"({self.numbers.setdefault(reason, len(self.numbers) + 1)})"

    def lines(self) -> list[str]:
        """Below the table."""
        return [""] * bool(self.numbers) + [f"({number}) {reason}" for reason, number in self.numbers.items()]

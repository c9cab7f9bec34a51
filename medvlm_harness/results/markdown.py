"""Markdown tables, and how numbers stand in them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Notes", "interval_cell", "markdown_table", "number_cell"]


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
        number = self.numbers.setdefault(reason or "no value", len(self.numbers) + 1)
        return f"n/a ({number})"

    def lines(self) -> list[str]:
        """Below the table."""
        return [""] * bool(self.numbers) + [f"({number}) {reason}" for reason, number in self.numbers.items()]

"""How every command prints: tables that a terminal and a pipe can both read."""

from __future__ import annotations

from typing import Any

from rich.console import Console

__all__ = ["print_table"]


def print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """Print rows of any values under their headings; a column of numbers is aligned right."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column, heading in enumerate(header):
        numeric = bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))  # "[x]" in a path or a message is no markup
    console = Console()
    # Folded columns help nobody: a pipe or a file gets the table at its own width.
    console = console if console.is_terminal else Console(width=10_000)
    console.print(table)

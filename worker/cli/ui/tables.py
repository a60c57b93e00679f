"""How commands print lists and times: aligned, within 80 columns, nothing taken for markup."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def new_table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table without lines. numbers: the columns to be aligned on the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(
            column, overflow="fold", justify="right" if column in numbers else "left", no_wrap=column in numbers
        )
    return table


def add_row(table: Table, *cells: Any, style: str = "") -> None:
    """A row; None shows as ``-``, numbers with thousands set apart."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(_shown(cell)) for cell in cells), style=style)


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def print_text(console: Console, text: str = "", style: str = "", indent: int = 0) -> None:
    """A sentence or more, wrapped at words; without text an empty line."""
    console.print(Padding(Text(text, style=style), (0, 0, 0, indent), expand=False) if text else "")


def print_commands(console: Console, *lines: str) -> None:
    """Command lines to be copied: each stays whole, however narrow the terminal."""
    for line in lines:
        console.print(Text(f"  {line}"), soft_wrap=True)

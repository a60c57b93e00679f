"""Tables and texts on a terminal: aligned, within its width. Values are never read as markup."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from worker.formatting import printable, printable_lines


def new_table(*columns: str, numbers: Sequence[str] = (), title: str | None = None) -> Table:
    """A table without lines. numbers: the columns that are aligned on the right and never broken."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for column in columns:
        is_number = column in numbers
        table.add_column(column, overflow="fold", justify="right" if is_number else "left", no_wrap=is_number)
    return table


def new_grid() -> Table:
    """Names and values in two columns, without a header."""
    grid = Table.grid(padding=(0, 2), pad_edge=False)
    grid.add_column(style="dim", min_width=12, max_width=20, overflow="fold")
    grid.add_column(overflow="fold")
    return grid


def add_row(table: Table, *cells: Any, style: str = "") -> None:
    """A row. None shows as ``-``, whole numbers with thousands separated."""
    table.add_row(*(cell if isinstance(cell, Text) else plain(_shown(cell)) for cell in cells), style=style)


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def plain(text: str, keep_lines: bool = False) -> Text:
    """A text without markup, and without characters that a terminal obeys. keep_lines: line breaks may stay."""
    lines = text.splitlines() if keep_lines else [text]
    return Text("\n".join(map(printable, lines)))


def print_text(console: Console, text: str = "", style: str = "", indent: int = 0) -> None:
    """A sentence or more, wrapped at words; without text an empty line."""
    console.print(Padding(Text(printable_lines(text), style=style), (0, 0, 0, indent), expand=False) if text else "")


def print_commands(console: Console, *lines: str) -> None:
    """Command lines to be copied. Each stays whole, however narrow the terminal."""
    for line in lines:
        console.print(Text(f"  {printable(line)}"), soft_wrap=True)

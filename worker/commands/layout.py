"""How commands print lists and times: aligned, within 80 columns, nothing taken for markup."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from worker.storage.pause_cache import ALL


def listing(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table without lines. numbers: the columns to be aligned on the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(
            column, overflow="fold", justify="right" if column in numbers else "left", no_wrap=column in numbers
        )
    return table


def add(table: Table, *cells: Any, style: str = "") -> None:
    """A row; None shows as ``-``, numbers with thousands set apart."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(_shown(cell)) for cell in cells), style=style)


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def say(console: Console, text: str = "", style: str = "", indent: int = 0) -> None:
    """A sentence or more, wrapped at words; without text an empty line."""
    console.print(Padding(Text(text, style=style), (0, 0, 0, indent), expand=False) if text else "")


def command(console: Console, *lines: str) -> None:
    """Command lines to be copied: each stays whole, however narrow the terminal."""
    for line in lines:
        console.print(Text(f"  {line}"), soft_wrap=True)


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 offer``, ``1,200 offers``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def short(moment: datetime | None) -> str:
    """A time in the local zone, as ``31 Jan 14:00``."""
    return moment.astimezone().strftime("%d %b %H:%M") if moment is not None else "-"


def lasting(seconds: float) -> str:
    """``0:45``, ``12:05``, ``3:20:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def whom(partner_id: str) -> str:
    """Who is paused."""
    return "all partners" if partner_id == ALL else f"partner {partner_id}"

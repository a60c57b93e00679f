"""Numbers, times and texts for people and for JSON."""

from datetime import datetime
from typing import Any

from models.exact_json import moment


def printable(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def in_utc(value: Any) -> Any:
    """Times in UTC and decimals as strings, for ``--json``."""
    if isinstance(value, dict):
        return {str(name): in_utc(item) for name, item in value.items()}
    if isinstance(value, list):
        return [in_utc(item) for item in value]
    if isinstance(value, datetime):
        return moment(value)
    return value if isinstance(value, bool | int | float | None) else encodable(str(value))


def encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def local_time(value: datetime | None) -> str:
    """A time in the zone of who reads it."""
    return value.astimezone().strftime("%Y-%m-%d %H:%M:%S") if value is not None else "-"


def pluralize(number: int, one: str, many: str | None = None) -> str:
    """``1 offer``, ``1,200 offers``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def short_time(moment: datetime | None) -> str:
    """A time in the local zone, as ``31 Jan 14:00``."""
    return moment.astimezone().strftime("%d %b %H:%M") if moment is not None else "-"


def duration(seconds: float) -> str:
    """``0:45``, ``12:05``, ``3:20:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

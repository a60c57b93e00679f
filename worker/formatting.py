"""Numbers, times and texts for people, and values for JSON."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

from models.exact_json import moment

OMIT_IF_NONE: Mapping[str, bool] = {"omit_if_none": True}  # metadata of a dataclass's field, for to_json


def to_json(value: Any) -> Any:
    """What ``--json`` prints of a value.

    Dataclasses become objects with their fields in order (without those that are None and marked OMIT_IF_NONE), times
    strings in UTC, decimals and all other values strings.
    """
    if is_dataclass(value):
        shown = ((field, getattr(value, field.name)) for field in fields(value))
        return {
            field.name: to_json(content)
            for field, content in shown
            if content is not None or "omit_if_none" not in field.metadata
        }
    if isinstance(value, dict):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, datetime):
        return moment(value)
    return value if isinstance(value, bool | int | float | None) else encodable(str(value))


def encodable(text: str) -> str:
    """The text with escapes in place of what UTF-8 can't hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """The text with a replacement character for each one that a terminal might obey, or not show; also line breaks."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", encodable(text))


def printable_lines(text: str) -> str:
    """As ``printable``, but line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def terminal_json(text: str) -> str:
    """JSON with escapes for the same characters: its values stay what they are."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1], text)


# C0 and C1; line and paragraph separators; annotations; and Unicode's Default_Ignorable_Code_Point: what has no width,
# or changes the direction of what follows.
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufff9-\ufffb\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff]"
)


def spreadsheet_cell(value: Any) -> Any:
    """A value of a CSV file: printable, and an apostrophe before a text that a spreadsheet would take for a formula."""
    if not isinstance(value, str):
        return value
    return f"'{printable_lines(value)}" if value.startswith(_FORMULA) else printable_lines(value)


def from_spreadsheet(text: str) -> str:
    """The text that ``spreadsheet_cell`` was given."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}",
            "\N{FULLWIDTH HYPHEN-MINUS}", "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip


def shell_word(text: str) -> str:
    """A word of a command line that a person may copy into a shell."""
    return text if re.fullmatch(r"[A-Za-z0-9._-][A-Za-z0-9._~-]*", text) else shlex.quote(text)


def argument(text: str) -> str:
    """As ``shell_word``, for the end of a command line: an id may look like an option."""
    return f"-- {shell_word(text)}" if text.startswith("-") else shell_word(text)


def pluralize(number: int, one: str, many: str | None = None) -> str:
    """``1 offer``, ``1,200 offers``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def local_time(value: datetime | None) -> str:
    """A time in the local zone, as ``2026-01-31 14:00:05``; ``-`` for None."""
    return value.astimezone().strftime("%Y-%m-%d %H:%M:%S") if value is not None else "-"


def short_time(value: datetime | None) -> str:
    """A time in the local zone, as ``31 Jan 14:00``; ``-`` for None."""
    return value.astimezone().strftime("%d %b %H:%M") if value is not None else "-"


def duration(seconds: float) -> str:
    """``0:45``, ``12:05``, ``3:20:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

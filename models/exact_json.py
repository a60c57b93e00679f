"""JSON with exact decimals, and times as RFC 3339 in UTC."""

import json
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_EXPONENT = 100
MAX_DIGITS = 100  # of a whole number


def read_exact(text: str | bytes) -> Any:
    """Reads JSON and keeps decimals as they were written: 19.90 gives ``Decimal("19.90")``. Raises ValueError.

    NaN, Infinity, and numbers with an exponent or digits of 100 or more stay texts: they have no JSON form, or a very
    long one. Raises RecursionError if lists and objects are nested too deep for Python.
    """
    return json.loads(text, parse_float=_decimal, parse_int=_integer, parse_constant=str)


def read_exact_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, as ``read_exact`` reads it, and where it ends. Raises ValueError."""
    return _DECODER.raw_decode(text, start)


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= MAX_DIGITS else text


def _decimal(text: str) -> Decimal | str:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    return number if abs(number.adjusted()) < MAX_EXPONENT else text


_DECODER = json.JSONDecoder(parse_float=_decimal, parse_int=_integer, parse_constant=str)


def write_exact(content: Any) -> str:
    """Compact JSON in ASCII in which a Decimal is a decimal string and a time is RFC 3339. Raises TypeError."""
    return _ENCODER.encode(content)


def _exact(value: Any) -> str:
    if isinstance(value, Decimal):
        return decimal_text(value)
    if isinstance(value, datetime):
        return moment(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_ENCODER = json.JSONEncoder(default=_exact, separators=(",", ":"))  # once: to make one costs 2 µs


def decimal_text(value: Decimal) -> str:
    """A decimal with all its digits and without exponent: ``Decimal("1E+2")`` gives ``100``."""
    return format(value, "f")


def moment(value: datetime) -> str:
    """RFC 3339 in UTC with microseconds: ``2026-01-01T00:00:00.000000Z``."""
    return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def depth_exceeds(content: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than ``limit``."""
    level = [content]
    for _ in range(limit + 1):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True

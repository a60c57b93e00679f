"""Properties of messages that others publish. They may hold anything: only valid text is passed on."""

import re
from collections.abc import Mapping
from typing import Any

_TEXT = re.compile(r"[^\x00\ud800-\udfff]+")  # what PostgreSQL and UTF-8 can hold

# Version, trace id, parent id, flags; version ff and ids of zeros are invalid.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def valid_text(value: Any, max_length: int = 255) -> str | None:
    """The value where it is a text of 1 to ``max_length`` characters that can be stored and sent, else None."""
    is_valid = isinstance(value, str) and len(value) <= max_length and _TEXT.fullmatch(value)
    return value if is_valid else None


def valid_traceparent(value: Any) -> str | None:
    """The value where it is a ``traceparent`` of W3C Trace Context (level 1, section 3.2), whole, else None."""
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else None


def ids_of_message(properties: Mapping[str, Any]) -> dict[str, str]:
    """``message_id`` and ``correlation_id``, each where it is valid."""
    values = {name: valid_text(properties.get(name)) for name in ("message_id", "correlation_id")}
    return {name: value for name, value in values.items() if value is not None}

"""Times on the command line."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

_AGE = re.compile(r"(\d{1,6})\s*([smhdw])")
_UNIT = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Moment(click.ParamType[datetime]):
    """An age (``30m``, ``2h``, ``7d``) or a time in ISO 8601, local unless it names a zone. The value is in UTC."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        age = _AGE.fullmatch(value.strip().lower())
        try:
            if age:
                return datetime.now(UTC) - timedelta(**{_UNIT[age[2]]: int(age[1])})
            return datetime.fromisoformat(value.strip()).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time: give one as 2026-01-31T14:00, or an age as 30m, 2h or 7d", param, ctx)


MOMENT = Moment()

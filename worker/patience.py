"""Waiting for a part that is away: tried again with growing pauses, told once, ended by the stop of the process."""

import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

import structlog

from worker import broker, database

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

FIRST_PAUSE = 0.1  # seconds
LONGEST_PAUSE = 10.0


class Stopping(Exception):
    """The process stops while something waited; it goes on elsewhere."""


def patiently(do: Callable[[], Result], stopping: Event) -> Result:
    """What ``do`` returns, however long the database or the broker is away.

    ``do`` may be repeated: one transaction, or one publish. Raises Stopping when ``stopping`` is set meanwhile.
    """
    pause = FIRST_PAUSE
    since = time.monotonic()
    while True:
        try:
            result = do()
        except Exception as error:
            away = who_is_away(error)
            if away is None:
                raise
            if pause == FIRST_PAUSE:
                log.warning("waiting", waits_for=away, error=type(error).__name__)
            if stopping.wait(pause):
                raise Stopping from None
            pause = min(pause * 2, LONGEST_PAUSE)
        else:
            if pause != FIRST_PAUSE:
                log.info("goes_on", after_s=round(time.monotonic() - since, 1))
            return result


def who_is_away(error: Exception) -> str | None:
    """What is waited for, where database or broker could not be reached, broke off, or are not set up; else None."""
    if database.is_away(error):
        return "database"
    if database.lacks_tables(error):
        return "database tables: run 'confirm-offer db upgrade'"
    if database.lacks_rights(error):
        return "rights in the database: see docs/database-roles.md"
    return "broker" if broker.is_away(error) else None

"""Waiting for a part that is away: tried again with growing pauses, told once, ended by the stop of the process."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock
from typing import TypeVar

import structlog

from worker.errors import ShuttingDown
from worker.messaging import broker
from worker.storage import database

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

INITIAL_BACKOFF = 0.1  # seconds
MAX_BACKOFF = 10.0

_waiting: Counter[str] = Counter()  # threads of this process, by what they wait for
_lock = Lock()


def retry_while_unavailable(do: Callable[[], Result], shutting_down: Event) -> Result:
    """What ``do`` returns, however long the database or the broker is away.

    ``do`` may be repeated: one transaction, or one publish. Raises Stopping when ``stopping`` is set meanwhile.
    """
    try:
        return do()
    except Exception as error:
        away = unavailable_dependency(error)
        if away is None:
            raise
        first = error
    with _logged(away, first):
        return _retry(do, shutting_down)


def _retry(do: Callable[[], Result], shutting_down: Event) -> Result:
    pause = INITIAL_BACKOFF
    while not shutting_down.wait(pause):
        try:
            return do()
        except Exception as error:
            if unavailable_dependency(error) is None:
                raise
        pause = min(pause * 2, MAX_BACKOFF)
    raise ShuttingDown


@contextmanager
def _logged(away: str, error: Exception) -> Iterator[None]:
    """Of the threads that wait for the same, the first one tells, and the last one that it goes on."""
    since = time.monotonic()
    if _count(away, 1) == 1:
        log.warning("waiting", waits_for=away, error=type(error).__name__)
    try:
        yield
    except BaseException:
        _count(away, -1)
        raise
    if _count(away, -1) == 0:
        log.info("goes_on", waited_for=away, after_s=round(time.monotonic() - since, 1))


def _count(away: str, change: int) -> int:
    with _lock:
        _waiting[away] += change
        return _waiting[away]


def unavailable_dependency(error: Exception) -> str | None:
    """What is waited for, where database or broker could not be reached, broke off, or are not set up; else None."""
    if database.is_away(error):
        return "database"
    if database.lacks_tables(error):
        return "database tables: run 'confirm-offer db upgrade'"
    if database.lacks_rights(error):
        return "rights in the database: see docs/database-roles.md"
    return "broker" if broker.is_away(error) else None

"""Waiting while the database or the broker is unavailable: retries with backoff, until the process stops.

The outage is logged once, and its end once, however many threads wait.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from threading import Event, Lock
from typing import TypeVar

import structlog

from worker.backoff import exponential
from worker.errors import ShuttingDown
from worker.storage import database

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

INITIAL_BACKOFF = 0.1  # seconds
MAX_BACKOFF = 10.0

_waiting: Counter[str] = Counter()  # threads of this process that wait, by the dependency they wait for
_lock = Lock()


def retry_while_unavailable(work: Callable[[], Result], shutting_down: Event) -> Result:
    """Runs ``work`` and returns its result, however long the database or the broker is unavailable.

    ``work`` may run several times: it should be one transaction, or one publish. Raises ShuttingDown if
    ``shutting_down`` is set while this waits, and what ``work`` raises for any other reason.
    """
    try:
        return work()
    except Exception as error:
        dependency = unavailable_dependency(error)
        if dependency is None:
            raise
        first_error = error
    with _logged(dependency, first_error):
        return _retry(work, shutting_down)


def _retry(work: Callable[[], Result], shutting_down: Event) -> Result:
    for attempt in count():
        if shutting_down.wait(exponential(INITIAL_BACKOFF, attempt, MAX_BACKOFF)):
            break
        try:
            return work()
        except Exception as error:
            if unavailable_dependency(error) is None:
                raise
    raise ShuttingDown


@contextmanager
def _logged(dependency: str, error: Exception) -> Iterator[None]:
    """Of the threads that wait for a dependency, the first logs the outage and the last logs its end."""
    since = time.monotonic()
    if _count(dependency, 1) == 1:
        log.warning("waiting", waits_for=dependency, error=type(error).__name__)
    try:
        yield
    except BaseException:
        _count(dependency, -1)
        raise
    if _count(dependency, -1) == 0:
        log.info("goes_on", waited_for=dependency, after_s=round(time.monotonic() - since, 1))


def most_awaited() -> str | None:
    """The dependency that most threads of this process wait for; None if none waits."""
    with _lock:
        waiting = [(number, dependency) for dependency, number in _waiting.items() if number > 0]
    return max(waiting)[1] if waiting else None


def _count(dependency: str, change: int) -> int:
    with _lock:
        _waiting[dependency] += change
        return _waiting[dependency]


def unavailable_dependency(error: Exception) -> str | None:
    """The dependency that an error shows to be unreachable or not set up, as a text for logs; None for other errors."""
    if database.is_away(error):
        return "database"
    if database.lacks_tables(error):
        return "database tables: run 'confirm-offer db upgrade'"
    if database.lacks_rights(error):
        return "rights in the database: see docs/database-roles.md"

    from worker.messaging import broker  # with kombu, which a command that asks the database does not need

    return "broker" if broker.is_away(error) else None

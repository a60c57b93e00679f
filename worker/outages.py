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
PROOF = 3  # failures of a job between which others succeed, until it is known to be at fault
GRACE_PAUSE = 0.5  # seconds between tries while the process stops

_waiting: Counter[str] = Counter()  # threads of this process that wait, by the dependency they wait for
_lock = Lock()


def retry_while_unavailable(
    work: Callable[[], Result],
    shutting_down: Event,
    waits_for: Callable[[Exception], str | None] | None = None,
    grace: float = 0.0,
) -> Result:
    """Runs ``work`` and returns its result, however long the database or the broker is unavailable.

    ``work`` may run several times: it should be one transaction, or one publish. Raises ShuttingDown if
    ``shutting_down`` is set while this waits, and what ``work`` raises for any other reason.

    waits_for: which dependency an error makes this wait for, if any: unavailable_dependency by default. grace: seconds
    for which this goes on trying while the process stops.
    """
    waits_for = waits_for or unavailable_dependency
    try:
        return work()
    except Exception as error:
        dependency = waits_for(error)
        if dependency is None:
            raise
        first_error = error
    with _logged(dependency, first_error):
        return _retry(work, shutting_down, waits_for, grace)


def _retry(
    work: Callable[[], Result], shutting_down: Event, waits_for: Callable[[Exception], str | None], grace: float
) -> Result:
    ends_at = float("inf")
    for attempt in count():
        pause = exponential(INITIAL_BACKOFF, attempt, MAX_BACKOFF)
        if shutting_down.is_set() or shutting_down.wait(pause):
            ends_at = min(ends_at, time.monotonic() + grace)
            if time.monotonic() >= ends_at:
                break
            time.sleep(min(pause, GRACE_PAUSE))
        try:
            return work()
        except Exception as error:
            if waits_for(error) is None:
                raise
    raise ShuttingDown


@contextmanager
def _logged(dependency: str, error: Exception) -> Iterator[None]:
    """Of the threads that wait for a dependency, the first logs the outage and the last logs its end."""
    since = time.monotonic()
    if _count(dependency, 1) == 1:
        log.warning("waiting", waits_for=dependency, error=database.name_of(error))
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
    """The dependency that an error makes this wait for, as a text for logs; None for other errors.

    Whatever the database says counts: it may be full, broken, or changed, and what it refuses now, it may take later.
    """
    if (dependency := unreachable_dependency(error)) is not None:
        return dependency
    if database.refused_a_write(error):
        return "a database that takes writes"
    if isinstance(error, database.CommitsWait):
        return "commits of the database, as for a synchronous standby that is away"
    return "database" if database.is_error(error) else None


def reason(error: Exception) -> str | None:
    """Why a dependency is unavailable, as far as its error shows it, for logs."""
    if database.is_error(error):
        problem = database.connection_problem(error)
        return problem.reason if problem is not None else None
    from worker.messaging import broker
    from worker.messaging.inspection import connection_problem
    from worker.messaging.publisher import NotTaken

    if isinstance(error, NotTaken):
        return str(error)
    return connection_problem(error).value if broker.raised(error) else None


def unreachable_dependency(error: Exception) -> str | None:
    """As ``unavailable_dependency``, without errors of the database that one item of a group may cause for all."""
    if database.is_unreachable(error):
        return "database"
    if database.lacks_tables(error):
        return "database tables: run 'confirm-offer db upgrade'"
    if database.lacks_rights(error):
        return "rights in the database: see docs/database-roles.md"

    from worker.messaging import broker  # with kombu, which a command that asks the database does not need

    return "broker" if broker.is_away(error) else None


def may_blame_item(error: Exception) -> bool:
    """Whether an error may be the fault of the one item that was worked on, so that others should go on without it."""
    if unreachable_dependency(error) is not None:
        return False
    return database.may_blame_values(error) or not database.is_error(error)


class Suspicion:
    """Decides whether errors of the database are the fault of one job's content. Only a proof counts.

    The proof is that the job fails alone, again and again after growing pauses, each time by its values, while the
    database takes others between. As long as it is missing, the job waits.
    """

    def __init__(self, others_succeed: Callable[[float], bool]) -> None:
        """others_succeed: whether the database has taken another since the last call. It gets the seconds since the
        first failure, and may raise errors of the database, which prove nothing."""
        self._others_succeed = others_succeed
        self._began = time.monotonic()
        self._failures = 0
        self.is_proven = False

    def waits_for(self, error: Exception) -> str | None:
        """As ``unavailable_dependency``; None once it is proven that the job is at fault."""
        dependency = unavailable_dependency(error)
        if dependency == "database" and database.may_blame_values(error):
            try:
                self._failures += self._others_succeed(time.monotonic() - self._began)
            except Exception as no_proof:
                if not database.is_error(no_proof):
                    raise
            self.is_proven = self._failures > PROOF
        else:
            self._failures = 0
        return None if self.is_proven else dependency

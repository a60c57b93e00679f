"""What one process works with: settings, database, encryption and XONE client.

Each part is made at its first use and belongs to one process: after a fork, the child starts with a new Runtime.
"""

import os
import random
import time
from _thread import start_new_thread
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from threading import Event, Lock
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from models.tables import Booking
from worker.errors import SettingsError
from worker.observability import tracing
from worker.outages import retry_while_unavailable, unreachable_dependency
from worker.settings import (
    BrokerSettings,
    DatabaseSettings,
    EncryptionSettings,
    EventSettings,
    FollowUpSettings,
    RetentionSettings,
    RetrySettings,
    SentrySettings,
    TracingSettings,
    WorkerSettings,
    XoneSettings,
    read,
)
from worker.storage import database
from worker.storage.encryption import Encryption
from worker.storage.group_commit import GroupCommit, Item, Result
from worker.storage.pause_cache import PauseCache

if TYPE_CHECKING:
    from worker.xone.client import Xone


# One transaction stores for many threads: a row that somebody has locked must not stop them.
LIMITS = database.Limits(lock=3.0, statement=30.0, idle_transaction=30.0, silence=12.0)
HANGING_DATABASE = 10.0  # seconds after the last call for which a process that stops waits for an answer
HANG_UP_INTERVAL = 5.0
MAX_REPORTED = 10_000  # confirmations that a process remembers to have reported


class Runtime:
    """Makes each part when it is first asked for: a command needs only the settings of the parts that it uses."""

    def __init__(self, dice: Callable[[], float] = random.random) -> None:
        """dice: returns a number in [0, 1), for jitter."""
        self.dice = dice
        self.shutting_down = Event()
        self.pauses = PauseCache()
        self.events_waiting = Event()  # set by a commit that wrote events; wakes the outbox relay of this process
        self._groups: dict[Any, GroupCommit[Any, Any]] = {}
        self._reported: dict[UUID, None] = {}  # confirmations, the oldest first
        self._lock = Lock()

    @cached_property
    def broker_settings(self) -> BrokerSettings:
        return read(BrokerSettings)

    @cached_property
    def retry_settings(self) -> RetrySettings:
        return read(RetrySettings)

    @cached_property
    def worker_settings(self) -> WorkerSettings:
        return read(WorkerSettings)

    @cached_property
    def follow_up_settings(self) -> FollowUpSettings:
        return read(FollowUpSettings)

    @cached_property
    def event_links(self) -> bool:
        return read(EventSettings).EVENT_LINKS == "on"

    @cached_property
    def retention_settings(self) -> RetentionSettings:
        return read(RetentionSettings)

    @cached_property
    def sentry_settings(self) -> SentrySettings:
        return read(SentrySettings)

    @cached_property
    def xone_settings(self) -> XoneSettings:
        return read(XoneSettings)

    @cached_property
    def engine(self) -> Engine:
        return database.connect(read(DatabaseSettings).url, limits=LIMITS)

    @cached_property
    def encryption(self) -> Encryption:
        return Encryption(read(EncryptionSettings).keys)

    @cached_property
    def xone(self) -> "Xone":
        from worker.xone.client import Xone  # with requests, for which a command that asks the database need not wait

        return Xone(self.xone_settings, self.worker_settings.WORKER_CONCURRENCY, self._has_ever_confirmed)

    def _has_ever_confirmed(self) -> bool:
        """Whether a booking is stored; also if the database does not say."""
        try:
            with self.engine.connect() as connection:
                return connection.execute(select(Booking.confirmation_id).limit(1)).first() is not None
        except SQLAlchemyError:
            return True

    def commit(self, work: Callable[[Connection], Result]) -> Result:
        """Runs ``work`` in a transaction and returns its result once it is committed.

        Waits while the database is unavailable, or refuses it, and then runs ``work`` again, so ``work`` must be
        repeatable: it may have been committed before the connection broke. Raises ShuttingDown if the process stops
        while it waits.
        """
        return retry_while_unavailable(partial(self.commit_once, work), self.shutting_down)

    def commit_group(self, work: Callable[[Connection], Result]) -> Result:
        """As ``commit``, for the items of a group: raises errors that one of them may cause for all."""
        return retry_while_unavailable(
            partial(self.commit_once, work), self.shutting_down, waits_for=unreachable_dependency
        )

    def commit_once(self, work: Callable[[Connection], Result]) -> Result:
        """Runs ``work`` in a transaction, once, and returns its result once it is committed."""
        with self.engine.begin() as connection:
            return work(connection)

    def in_transaction(self, name: str, work: Callable[[Connection], Result]) -> Result:
        """As ``commit``, within a span ``name`` that covers all waiting. docs/tracing.md lists the names."""
        with tracing.transaction(name, self.engine):
            return self.commit(work)

    def commit_in_group(
        self, store_batch: Callable[["Runtime", Sequence[Item]], Sequence[Result]], item: Item
    ) -> Result:
        """Stores an item with ``store_batch``, together with the items of other threads, and returns its result.

        See GroupCommit. ``store_batch`` returns one result for each item, in their order.
        """
        with self._lock:
            group = self._groups.get(store_batch) or self._groups.setdefault(
                store_batch, GroupCommit(partial(store_batch, self))
            )
        result: Result = group.store(item)
        return result

    def was_reported(self, confirmation_id: UUID) -> bool:
        """Whether this process has reported a defect of a confirmation; from now on it has."""
        with self._lock:
            was, self._reported[confirmation_id] = confirmation_id in self._reported, None
            while len(self._reported) > MAX_REPORTED:
                del self._reported[next(iter(self._reported))]
        return was

    def check_settings(self) -> None:
        """Reads all settings of a worker. Raises SettingsError: one line that names each missing or wrong setting."""
        problems = []
        for section in (
            BrokerSettings,
            DatabaseSettings,
            EncryptionSettings,
            XoneSettings,
            RetrySettings,
            FollowUpSettings,
            WorkerSettings,
            EventSettings,
            RetentionSettings,
            SentrySettings,
            TracingSettings,
        ):
            try:
                read(section)
            except SettingsError as error:
                problems.append(str(error))
        if problems:
            raise SettingsError("; ".join(problems))

    def stop(self) -> None:
        """Ends all waits, and in the end those for a database that has connections open and does not answer."""
        self.shutting_down.set()
        start_new_thread(self._give_up_database, ())  # Thread.start() waits, which gevent forbids in a signal's handler

    def _give_up_database(self) -> None:
        time.sleep(self.xone_settings.XONE_TIMEOUT + HANGING_DATABASE)
        while True:
            database.hang_up(self.engine)
            time.sleep(HANG_UP_INTERVAL)

    def close(self) -> None:
        """Closes the connections to the database."""
        if "engine" in self.__dict__:
            self.engine.dispose()


_current = Runtime()


def current() -> Runtime:
    """The Runtime of this process."""
    return _current


def _renew_after_fork() -> None:
    global _current
    _current = Runtime()


os.register_at_fork(after_in_child=_renew_after_fork)

"""What one process works with: settings, database, vault and XONE client. Made at first use, never shared by a fork."""

import os
import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from threading import Event, Lock
from typing import Any

from sqlalchemy import Engine

from worker.errors import SettingsError
from worker.settings import (
    BrokerSettings,
    DatabaseSettings,
    EncryptionSettings,
    EventSettings,
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
from worker.xone.client import Xone


class Runtime:
    """Each part is made when it is first asked for, so a command needs the settings of what it uses and no others."""

    def __init__(self, dice: Callable[[], float] = random.random) -> None:
        self.dice = dice
        self.shutting_down = Event()
        self.pauses = PauseCache()
        self.events_waiting = Event()  # set by a commit that wrote events; wakes the Relay of this process
        self._groups: dict[Any, GroupCommit[Any, Any]] = {}
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
    def event_links(self) -> bool:
        return read(EventSettings).EVENT_LINKS == "on"

    @cached_property
    def retention_days(self) -> float | None:
        return read(RetentionSettings).RETENTION_DAYS

    @cached_property
    def sentry_settings(self) -> SentrySettings:
        return read(SentrySettings)

    @cached_property
    def xone_settings(self) -> XoneSettings:
        return read(XoneSettings)

    @cached_property
    def engine(self) -> Engine:
        return database.connect(read(DatabaseSettings).url)

    @cached_property
    def encryption(self) -> Encryption:
        return Encryption(read(EncryptionSettings).keys)

    @cached_property
    def xone(self) -> Xone:
        return Xone(self.xone_settings, connections=self.worker_settings.WORKER_CONCURRENCY)

    def commit_in_group(self, store: Callable[["Runtime", Sequence[Item]], Sequence[Result]], item: Item) -> Result:
        """What came of an item that is stored by ``store``, together with those of other threads. See GroupCommit."""
        with self._lock:
            group = self._groups.get(store) or self._groups.setdefault(store, GroupCommit(partial(store, self)))
        result: Result = group.store(item)
        return result

    def check_settings(self) -> None:
        """Reads all that a worker needs. Raises SettingsError, in one line for all that is missing or wrong."""
        problems = []
        for section in (
            BrokerSettings,
            DatabaseSettings,
            EncryptionSettings,
            XoneSettings,
            RetrySettings,
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

    def close(self) -> None:
        """Gives back the connections to the database."""
        if "engine" in self.__dict__:
            self.engine.dispose()


_current = Runtime()


def current() -> Runtime:
    """The one of this process."""
    return _current


def _start_afresh() -> None:
    global _current
    _current = Runtime()


os.register_at_fork(after_in_child=_start_afresh)

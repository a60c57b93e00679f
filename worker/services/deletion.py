"""Deletion: deletes rows older than DELETE_AFTER_DAYS or DELETE_EVENTS_AFTER_DAYS, at one rate over all workers."""

from collections.abc import Callable
from datetime import datetime, timedelta
from uuid import UUID

import structlog
from sqlalchemy import Connection, select

from models.tables import Confirmation, OutboxEvent
from tasks.operations.deletion import (
    CONFIRMATIONS,
    EVENTS,
    DailyCount,
    Sweep,
    delete_confirmations,
    delete_events,
)
from worker.observability import metrics
from worker.observability.sentry import report
from worker.runtime import Runtime
from worker.services.service import Service
from worker.storage.database import now
from worker.storage.rate_limiter import reserve_slot

log = structlog.get_logger(__name__)

STEPS_PER_SECOND = 2.0  # of each kind, over all workers; a step deletes up to 500 rows, and what hangs on them
MAX_FAILED = 1000  # confirmations

Delete = Callable[[Connection, list[UUID], datetime], int]


class _Kind:
    """One kind of rows that is deleted. days: after which they are."""

    def __init__(self, command: str, days: float, sweep: Sweep, delete: Delete) -> None:
        self.command, self.days, self._sweep, self._delete = command, days, sweep, delete
        self._count = DailyCount(command, days)
        self.deleted = 0  # in this sweep

    def step(self, connection: Connection) -> tuple[int, bool]:
        """Deletes from one window. Returns how many it deleted, and whether the sweep goes on."""
        before = connection.execute(select(now())).scalar_one() - timedelta(days=self.days)
        ids = self._sweep.window(connection, before)
        deleted = self._delete(connection, ids, before) if ids else 0
        if deleted:
            self._count.add(connection, deleted)
        return deleted, bool(ids)


class Deletion(Service):
    """Runs beside the Scheduler where one of the settings is set."""

    name = "deletion"
    starts_work = True
    interval = 10.0

    def __init__(self, runtime: Runtime, confirmations_days: float | None, events_days: float | None) -> None:
        """The days after which they are deleted; None for never."""
        super().__init__()
        self._runtime = runtime
        self._failed: dict[UUID, Exception] = {}  # confirmations that could not be deleted: they stop no other
        self._kinds: list[_Kind] = []
        if confirmations_days is not None:
            sweep = Sweep(Confirmation.__table__)
            self._kinds.append(_Kind(CONFIRMATIONS, confirmations_days, sweep, self._delete_confirmations))
        if events_days is not None:
            self._kinds.append(_Kind(EVENTS, events_days, Sweep(OutboxEvent.__table__), delete_events))

    def run_once(self) -> bool:
        """Makes a step of each kind, in a slot of its common rate. Returns whether a sweep goes on."""
        goes_on = False
        for kind in self._kinds:
            with self._runtime.engine.begin() as connection:
                wait = reserve_slot(connection, STEPS_PER_SECOND, kind.command)
            if wait is None or self._stopping.wait(wait):
                return False
            known = set(self._failed)
            with self._runtime.engine.begin() as connection:
                deleted, more = kind.step(connection)
            goes_on = goes_on or more
            kind.deleted += deleted
            if kind.deleted and not more:
                log.info("deleted", what=kind.command.removeprefix("delete "), count=kind.deleted, days=kind.days)
                kind.deleted = 0
            self._report(self._failed.keys() - known)
        return goes_on

    def _delete_confirmations(self, connection: Connection, ids: list[UUID], before: datetime) -> int:
        return delete_confirmations(connection, ids, before, self._failed)

    def _report(self, failed: set[UUID]) -> None:
        for id_ in failed:
            report(self._failed[id_], duty=self.name, confirmation=str(id_))
            metrics.put_off()
        while len(self._failed) > MAX_FAILED:  # the oldest is tried again, and reported again
            del self._failed[next(iter(self._failed))]

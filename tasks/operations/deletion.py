"""Deleting rows whose time is over: confirmations that ended, with all that hangs on them, and published events.

A sweep goes through a table by its primary key, a window of rows at a time, each in a transaction of its own. Ids grow
with time, so it ends at the first window in which all rows are young, and no index is needed that live work would have
to keep. It never deletes what is open, under review, unpublished, locked, or in a batch that has not ended.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, Table, delete, insert, select, update

from models.states import DELETABLE, BatchState
from models.tables import AuditEntry, Base, Batch, BatchItem, Confirmation, OutboxEvent
from tasks.halving import in_halves
from tasks.operations.audit import who
from worker.storage.database import in_literally, locked, now

WINDOW = 500  # rows that a step looks at, and deletes at most
CONFIRMATIONS, EVENTS = "delete confirmations", "delete events"  # commands of the audit

# All tables with rows of a confirmation, those first that refer to others of them.
PARTS = [table for table in reversed(Base.metadata.sorted_tables) if "confirmation_id" in table.c]


class Sweep:
    """Where a sweep through a table is. Belongs to one thread."""

    def __init__(self, table: Table) -> None:
        self._table = table.c
        self._after = UUID(int=0)

    def window(self, connection: Connection, before: datetime) -> list[UUID]:
        """The ids of the next rows; none at the end, after which the sweep begins anew. before: when one was made."""
        query = select(self._table.id, self._table.created_at).where(self._table.id > self._after)
        rows = connection.execute(query.order_by(self._table.id).limit(WINDOW)).all()
        has_old_rows = any(row.created_at < before for row in rows)
        self._after = rows[-1].id if has_old_rows else UUID(int=0)
        return [row.id for row in rows] if has_old_rows else []


def delete_confirmations(
    connection: Connection, ids: Sequence[UUID], before: datetime, failed: dict[UUID, Exception]
) -> int:
    """Deletes those of these confirmations that ended before this time. Returns their number.

    failed: those that could not be deleted before, which are left out; those that can't be deleted now are added.
    """
    chosen = [id_ for id_ in ids if id_ not in failed]
    unpublished = select(OutboxEvent.id).where(
        OutboxEvent.confirmation_id == Confirmation.id, OutboxEvent.published_at.is_(None)
    )
    of_open_batch = (
        select(BatchItem.batch_id)
        .join(Batch, Batch.id == BatchItem.batch_id)
        .where(BatchItem.confirmation_id == Confirmation.id, Batch.state.in_([BatchState.RUNNING, BatchState.PAUSED]))
    )
    query = select(Confirmation.id).where(
        Confirmation.id.in_(chosen),
        in_literally(Confirmation.state, DELETABLE),
        Confirmation.updated_at < before,
        ~unpublished.exists(),
        ~of_open_batch.exists(),
    )
    rows = connection.execute(locked(query, skip_locked=True)).all()
    return in_halves(connection, rows, lambda part: _delete(connection, part), failed)


def _delete(connection: Connection, rows: Sequence[Row[Any]]) -> None:
    ids = [row.id for row in rows]
    for table in PARTS:
        connection.execute(delete(table).where(table.c.confirmation_id.in_(ids)))
    connection.execute(delete(Confirmation).where(Confirmation.id.in_(ids)))


def delete_events(connection: Connection, ids: Sequence[UUID], before: datetime) -> int:
    """Deletes those of these events that were published before this time. Returns their number."""
    is_old = OutboxEvent.id.in_(ids), OutboxEvent.published_at < before
    return connection.execute(delete(OutboxEvent).where(*is_old)).rowcount


class DailyCount:
    """A row of the audit for each day (in UTC) on which a machine deletes something. Belongs to one thread."""

    def __init__(self, command: str, after_days: float) -> None:
        self._command, self._after_days = command, after_days
        self._day, self._id = "", 0

    def add(self, connection: Connection, number: int) -> None:
        """Counts so many more, in the transaction that deletes them."""
        day = connection.execute(select(now())).scalar_one().astimezone(UTC).date().isoformat()
        if day != self._day or not self._count(connection, number):
            self._day, self._id = day, self._find(connection, day) or self._begin(connection, day)
            self._count(connection, number)

    def _count(self, connection: Connection, number: int) -> bool:
        grown = update(AuditEntry).where(AuditEntry.id == self._id).values(count=AuditEntry.count + number)
        return connection.execute(grown).rowcount == 1

    def _find(self, connection: Connection, day: str) -> int | None:
        rows = connection.execute(
            select(AuditEntry.id, AuditEntry.details)
            .where(
                AuditEntry.command == self._command,
                AuditEntry.by == who(),
                AuditEntry.at >= datetime.fromisoformat(day).replace(tzinfo=UTC),
            )
            .order_by(AuditEntry.id.desc())
        )
        return next((row.id for row in rows if row.details == self._details(day)), None)

    def _begin(self, connection: Connection, day: str) -> int:
        values = {"command": self._command, "by": who(), "count": 0, "details": self._details(day)}
        return connection.execute(insert(AuditEntry).values(at=now(), **values).returning(AuditEntry.id)).scalar_one()

    def _details(self, day: str) -> dict[str, Any]:
        return {"day": day, "after_days": self._after_days}


def memory_begins(connection: Connection) -> datetime | None:
    """From when on all published events are stored, by the audit; None if none was ever deleted.

    Events of a confirmation go with it: DELETE_AFTER_DAYS counts too. What the audit says is exact to a day.
    """
    at: datetime = connection.execute(select(now())).scalar_one()
    rows = connection.execute(select(AuditEntry.details).where(AuditEntry.command.in_([CONFIRMATIONS, EVENTS])))
    return max((_deleted_before(details, at) for details in rows.scalars()), default=None)


def _deleted_before(details: dict[str, Any], at: datetime) -> datetime:
    end_of_day = datetime.fromisoformat(details["day"]).replace(tzinfo=UTC) + timedelta(days=1)
    return min(at, end_of_day) - timedelta(days=details["after_days"])

"""Publishing stored events again: same ids, same bytes, those of a confirmation in their order.

This changes no column: an event stays published, and those that are not published yet are left to the outbox relay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Engine, Row, func, select, tuple_

from models.event import EventType
from models.tables import Confirmation, OutboxEvent, is_offer
from worker.storage.database import now

PAGE = 500
CLOCK_SKEW = 86400.0  # seconds; of a worker, whose clock ids are of, against the database's, with room to spare


def _first_id(at: datetime, seconds: float) -> UUID:
    """The first id of a time, and so many seconds later. Ids are UUIDs of version 7, which begin with the time."""
    milliseconds = min(max(int((at.timestamp() + seconds) * 1000), 0), 2**48 - 1)
    return UUID(int=milliseconds << 80)


@dataclass(frozen=True)
class EventSelection:
    """Published events written at or after ``since`` and before ``until``; only of one type or offer, if given."""

    since: datetime
    until: datetime
    type: EventType | None = None
    offer_id: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Conditions on events."""
        conditions: list[ColumnElement[bool]] = [
            OutboxEvent.published_at.is_not(None),
            OutboxEvent.id >= _first_id(self.since, -CLOCK_SKEW),
            OutboxEvent.id < _first_id(self.until, CLOCK_SKEW),
            OutboxEvent.created_at >= self.since,
            OutboxEvent.created_at < self.until,
        ]
        if self.type is not None:
            conditions.append(OutboxEvent.type == self.type)
        if self.offer_id is not None:
            of_offer = select(Confirmation.id).where(is_offer(self.offer_id))
            conditions.append(OutboxEvent.confirmation_id.in_(of_offer))
        return conditions


def clock(connection: Connection) -> datetime:
    """The time by the database's clock: an upper bound that leaves out events which are written from now on."""
    at: datetime = connection.execute(select(now())).scalar_one()
    return at


def count(connection: Connection, selection: EventSelection) -> int:
    """How many events are selected."""
    return connection.execute(select(func.count()).select_from(OutboxEvent).where(*selection.conditions())).scalar_one()


def pages(engine: Engine, selection: EventSelection, size: int = PAGE) -> Iterator[Sequence[Row[Any]]]:
    """The events in pages, by confirmation, the oldest first, and by sequence. No transaction is open between pages.

    size: events in a page.
    """
    place = tuple_(OutboxEvent.confirmation_id, OutboxEvent.sequence)
    query = (
        select(OutboxEvent.__table__)
        .where(*selection.conditions())
        .order_by(OutboxEvent.confirmation_id, OutboxEvent.sequence)
        .limit(size)
    )
    after: list[ColumnElement[bool]] = []
    while True:
        with engine.connect() as connection:
            rows = connection.execute(query.where(*after)).all()
        if rows:
            yield rows
        if len(rows) < size:
            return
        after = [place > tuple_(rows[-1].confirmation_id, rows[-1].sequence)]

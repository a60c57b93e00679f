"""Publishing stored events again: same ids, same bytes, in the order of their confirmation.

The Relay's columns are not touched: an event stays published, and what is not yet published is the Relay's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Row, func, select, tuple_

from models.event import EventType
from models.tables import Confirmation, OutboxEvent
from worker.storage.database import now

PAGE = 500


@dataclass(frozen=True)
class Which:
    """Published events written at or after ``since`` and before ``until``, of one type or offer where named."""

    since: datetime
    until: datetime
    type: EventType | None = None
    offer_id: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = [
            OutboxEvent.published_at.is_not(None),
            OutboxEvent.created_at >= self.since,
            OutboxEvent.created_at < self.until,
        ]
        if self.type is not None:
            found.append(OutboxEvent.type == self.type)
        if self.offer_id is not None:
            of_offer = select(Confirmation.id).where(Confirmation.offer_id == self.offer_id)
            found.append(OutboxEvent.confirmation_id.in_(of_offer))
        return found


def clock(connection: Connection) -> datetime:
    """The database's: what is written from now on is not stored yet."""
    at: datetime = connection.execute(select(now())).scalar_one()
    return at


def count(connection: Connection, which: Which) -> int:
    return connection.execute(select(func.count()).select_from(OutboxEvent).where(*which.conditions())).scalar_one()


def pages(engine: Engine, which: Which, size: int = PAGE) -> Iterator[Sequence[Row[Any]]]:
    """The events by confirmation, the oldest first, and by sequence. No transaction is open between two pages."""
    place = tuple_(OutboxEvent.confirmation_id, OutboxEvent.sequence)
    query = (
        select(OutboxEvent.__table__)
        .where(*which.conditions())
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

"""All that is known of a confirmation, read from the database. Decrypts nothing: see tasks/privacy/reveal.py."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Engine, Row, or_, select

from models.states import BatchState, State
from models.tables import Attempt, Batch, BatchItem, Booking, Confirmation, OutboxEvent, Policy
from tasks.operations import pauses
from worker.storage import pause_cache
from worker.storage.database import now

MAX_FOUND = 20  # of one name
_NEVER_SHOWN = ("confirmation_id", "recorded_at", "position")
_BOOKED = (State.CONFIRMED, State.PENDING)


@dataclass(frozen=True)
class Found:
    """A confirmation. ``told`` is what ``show --json`` prints, with times as datetime; the rest is for the screen."""

    id: UUID
    told: dict[str, Any]
    now: datetime
    due_at: datetime | None
    batches: list[Row[Any]]
    pauses: list[Row[Any]]


def find(engine: Engine, name: str, partner_id: str | None = None) -> list[Found]:
    """All confirmations of an offer id, or where there is none of an order reference; of one partner or all."""
    with engine.connect() as connection:
        rows = _rows(connection, Confirmation.offer_id == name, partner_id) or _rows(
            connection, Confirmation.order_reference == name, partner_id
        )
        return [_with_details(connection, row) for row in rows]


def _rows(connection: Connection, is_meant: ColumnElement[bool], partner_id: str | None) -> list[Row[Any]]:
    query = select(Confirmation.__table__, now().label("now")).where(is_meant)
    if partner_id is not None:
        query = query.where(Confirmation.partner_id == partner_id)
    in_order = query.order_by(Confirmation.partner_id, Confirmation.created_at, Confirmation.offer_id)
    return list(connection.execute(in_order.limit(MAX_FOUND)))


def _with_details(connection: Connection, row: Row[Any]) -> Found:
    def all_of(table: Any, order: Any) -> list[Row[Any]]:
        query = select(table.__table__).where(table.confirmation_id == row.id).order_by(order)
        return list(connection.execute(query))

    bookings = all_of(Booking, Booking.id)
    waits = row.state in (State.QUEUED, State.RETRYING)
    told = {
        "partner_id": row.partner_id,
        "offer_id": row.offer_id,
        "order_reference": row.order_reference,
        "state": row.state,
        "error": {"code": row.error_code, "http_status": row.error_http_status, "detail": row.error_detail}
        if row.error_code
        else None,
        "next_attempt_at": row.due_at if waits else None,
        "attempts": [_attempt(attempt) for attempt in all_of(Attempt, Attempt.number)],
        "booking": _columns(bookings[0]) if bookings else None,
        "policies": [_columns(policy) for policy in all_of(Policy, Policy.position)],
        "events": [_event(event) for event in all_of(OutboxEvent, OutboxEvent.sequence)],
        **({"purged_at": row.purged_at} if row.purged_at else {}),
    }
    standing = [] if row.state in _BOOKED else pauses.standing(connection)
    return Found(
        id=row.id,
        told=told,
        now=row.now,
        due_at=row.due_at,
        batches=_batches(connection, row),
        pauses=[pause for pause in standing if pause.partner_id in (pause_cache.ALL, row.partner_id)],
    )


def _attempt(row: Row[Any]) -> dict[str, Any]:
    names = ("number", "started_at", "duration_ms", "outcome", "http_status", "code")
    return {name: row._mapping[name] for name in names}


def _event(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "type": row.type,
        "sequence": row.sequence,
        "time": row.created_at,
        "published_at": row.published_at,
    }


def _columns(row: Row[Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in row._mapping.items()
        if not name.startswith("sealed_") and name not in _NEVER_SHOWN
    }


def _batches(connection: Connection, row: Row[Any]) -> list[Row[Any]]:
    """The batch that feeds it in, and those in which it waits for its turn."""
    is_open = Batch.state.in_([BatchState.RUNNING, BatchState.PAUSED])
    return list(
        connection.execute(
            select(Batch.id, Batch.state, Batch.reason, Batch.by, BatchItem.fed_at)
            .join(BatchItem, BatchItem.batch_id == Batch.id)
            .where(
                or_(is_open, Batch.id == row.batch_id),
                BatchItem.confirmation_id == row.id,
                BatchItem.ended_at.is_(None),
            )
            .order_by(Batch.id)
        )
    )

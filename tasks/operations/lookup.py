"""All that is known of a confirmation, read from the database. Decrypts nothing: see tasks/privacy/reveal.py."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Engine, Row, or_, select

from models.event import LINKS
from models.states import BOOKED, BatchState, State
from models.tables import Attempt, Batch, BatchItem, Booking, Confirmation, OutboxEvent, Policy, is_offer
from tasks.operations import pauses, workers
from tasks.operations.pauses import ActivePause
from tasks.operations.workers import StoppedCalls
from worker.formatting import OMIT_IF_NONE
from worker.storage.database import in_literally, now

MAX_FOUND = 20  # confirmations of one name
MAX_CLOCK_SKEW = timedelta(hours=1)  # between the clock that made an id and that of the database
_UNDER_WAY = (State.QUEUED, State.RETRYING, State.CONFIRMING)

Details = TypeVar("Details")


@dataclass(frozen=True)
class ErrorDetails:
    """The last error of a confirmation."""

    code: str
    http_status: int | None
    detail: str | None


@dataclass(frozen=True)
class AttemptDetails:
    """An attempt. outcome: None while it is under way."""

    number: int
    started_at: datetime
    duration_ms: int | None
    outcome: str | None
    http_status: int | None
    code: str | None


@dataclass(frozen=True)
class BookingDetails:
    """What is stored of a booking without encryption."""

    id: str
    offer_id: str
    provider_reference: str | None
    language: str | None
    provider_customer_id: str | None
    status: str | None
    currency: str | None
    price: Decimal | None
    created_at: datetime | None
    updated_at: datetime | None
    is_instant_booking: bool | None
    payment_status: str | None
    quote_uuid: str | None


@dataclass(frozen=True)
class PolicyDetails:
    """A policy of a booking."""

    id: str | None
    parent_id: str | None
    status: str | None
    policy_type: str | None
    policy_code: str | None
    policy_version: str | None
    policy_start_date: datetime | None
    policy_start_date_tz_offset: str | None
    policy_end_date: datetime | None
    policy_end_date_tz_offset: str | None
    price: Decimal | None
    tax: Decimal | None
    commission: Decimal | None
    cover_amount: Decimal | None
    claim_selector_id: str | None
    pds_url: str | None
    confirmed_at: datetime | None
    cancelled_at: datetime | None
    created_at: datetime | None
    updated_at: datetime | None
    policy_content: dict[str, Any] | None
    extra_fields: dict[str, Any] | None


@dataclass(frozen=True)
class EventDetails:
    """An event of a confirmation. published_at: None while the broker has not taken it."""

    id: UUID
    type: str
    sequence: int
    time: datetime
    published_at: datetime | None


@dataclass(frozen=True)
class ConfirmationDetails:
    """A confirmation, as ``show --json`` prints it."""

    partner_id: str
    offer_id: str
    order_reference: str | None
    state: State
    error: ErrorDetails | None
    next_attempt_at: datetime | None
    attempts: tuple[AttemptDetails, ...]
    booking: BookingDetails | None
    policies: tuple[PolicyDetails, ...]
    events: tuple[EventDetails, ...]
    confirm_by: datetime | None = field(metadata=OMIT_IF_NONE)
    withdrawn_at: datetime | None = field(metadata=OMIT_IF_NONE)
    purged_at: datetime | None = field(metadata=OMIT_IF_NONE)


@dataclass(frozen=True)
class BatchMembership:
    """A batch that will feed a confirmation in, or has done so. fed_at: None before it has."""

    id: int
    state: BatchState
    reason: str | None
    by: str
    fed_at: datetime | None


@dataclass(frozen=True)
class FoundConfirmation:
    """A confirmation, and what decides when it is tried next.

    now: by the database's clock; due_at: when a worker may take it, or take it over; batches: those that have not
    finished with it; pauses: those that stop its calls; stopped: what else does; has_workers: whether any runs.
    """

    id: UUID
    details: ConfirmationDetails
    now: datetime
    due_at: datetime | None
    batches: tuple[BatchMembership, ...]
    pauses: tuple[ActivePause, ...]
    stopped: tuple[StoppedCalls, ...]
    has_workers: bool


@dataclass(frozen=True)
class ListedConfirmation:
    """A confirmation in a list, as JSON shows it. code, http_status: of its last error."""

    partner_id: str
    offer_id: str
    order_reference: str | None
    state: State
    code: str | None
    http_status: int | None
    attempts: int
    created_at: datetime
    updated_at: datetime
    next_attempt_at: datetime | None


def listed(
    connection: Connection,
    limit: int,
    states: Sequence[State] = (),
    partner_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[ListedConfirmation]:
    """The newest confirmations, by when they were accepted, newest first. states: none for all."""
    query = select(Confirmation.__table__).order_by(Confirmation.id.desc()).limit(limit)
    if states:
        query = query.where(in_literally(Confirmation.state, states))
    if partner_id is not None:
        query = query.where(Confirmation.partner_id == partner_id)
    if since is not None:
        query = query.where(Confirmation.created_at >= since, Confirmation.id >= _first_id(since - MAX_CLOCK_SKEW))
    if until is not None:
        query = query.where(Confirmation.created_at < until, Confirmation.id < _first_id(until + MAX_CLOCK_SKEW))
    return [
        ListedConfirmation(
            row.partner_id,
            row.offer_id,
            row.order_reference,
            State(row.state),
            row.error_code,
            row.error_http_status,
            row.attempts,
            row.created_at,
            row.updated_at,
            next_attempt_at=row.due_at if row.state in (State.QUEUED, State.RETRYING) else None,
        )
        for row in connection.execute(query)
    ]


def _first_id(at: datetime) -> UUID:
    """The lowest id (UUIDv7) of that time, so that the primary key finds where to begin and to end."""
    return UUID(int=max(int(at.timestamp() * 1000), 0) << 80)


@dataclass(frozen=True)
class StoredEvent:
    """An event as it was published, without the customers' links. published_at: None before it is."""

    content: dict[str, Any]
    published_at: datetime | None


def stored_event(connection: Connection, event_id: UUID) -> StoredEvent | None:
    """The event with this id, if it is stored."""
    query = select(OutboxEvent.payload, OutboxEvent.published_at).where(OutboxEvent.id == event_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    content: dict[str, Any] = json.loads(row.payload)
    for link in LINKS:
        (content["data"].get("booking") or {}).pop(link, None)
    return StoredEvent(content, row.published_at)


def find(engine: Engine, name: str, partner_id: str | None = None) -> list[FoundConfirmation]:
    """At most MAX_FOUND confirmations with this offer id or, if there is none, with this order reference.

    partner_id: None for all partners.
    """
    with engine.connect() as connection:
        rows = _rows(connection, is_offer(name), partner_id) or _rows(
            connection, Confirmation.order_reference == name, partner_id
        )
        return [_with_details(connection, row) for row in rows]


def _rows(connection: Connection, is_meant: ColumnElement[bool], partner_id: str | None) -> list[Row[Any]]:
    query = select(Confirmation.__table__, now().label("now")).where(is_meant)
    if partner_id is not None:
        query = query.where(Confirmation.partner_id == partner_id)
    in_order = query.order_by(Confirmation.partner_id, Confirmation.created_at, Confirmation.offer_id)
    return list(connection.execute(in_order.limit(MAX_FOUND)))


def _with_details(connection: Connection, row: Row[Any]) -> FoundConfirmation:
    def rows_of(table: Any, order: Any) -> list[Row[Any]]:
        query = select(table.__table__).where(table.confirmation_id == row.id).order_by(order)
        return list(connection.execute(query))

    bookings = rows_of(Booking, Booking.id)
    waits = row.state in (State.QUEUED, State.RETRYING)
    details = ConfirmationDetails(
        partner_id=row.partner_id,
        offer_id=row.offer_id,
        order_reference=row.order_reference,
        state=State(row.state),
        error=ErrorDetails(row.error_code, row.error_http_status, row.error_detail) if row.error_code else None,
        next_attempt_at=row.due_at if waits else None,
        attempts=tuple(_details(AttemptDetails, attempt) for attempt in rows_of(Attempt, Attempt.number)),
        booking=_details(BookingDetails, bookings[0]) if bookings else None,
        policies=tuple(_details(PolicyDetails, policy) for policy in rows_of(Policy, Policy.position)),
        events=tuple(
            EventDetails(event.id, event.type, event.sequence, event.created_at, event.published_at)
            for event in rows_of(OutboxEvent, OutboxEvent.sequence)
        ),
        confirm_by=row.confirm_by,
        withdrawn_at=row.withdrawn_at,
        purged_at=row.purged_at,
    )
    active_pauses = [] if row.state in BOOKED else pauses.active(connection)
    running = workers.running(connection)
    stopped = workers.stopped_calls(running) if row.state in _UNDER_WAY else []
    return FoundConfirmation(
        id=row.id,
        details=details,
        now=row.now,
        due_at=row.due_at,
        batches=_batches(connection, row),
        pauses=tuple(pause for pause in active_pauses if pause.partner_id in (None, row.partner_id)),
        stopped=tuple(stop for stop in stopped if stop.concerns(row.partner_id)),
        has_workers=bool(running),
    )


def _details(shape: type[Details], row: Any) -> Details:
    """A dataclass with the columns of a row that have the names of its fields."""
    return shape(**{field.name: row._mapping[field.name] for field in fields(shape)})  # type: ignore[arg-type]


def _batches(connection: Connection, row: Row[Any]) -> tuple[BatchMembership, ...]:
    """The batch that has fed a confirmation in, and those in which it still waits to be fed in."""
    is_open = Batch.state.in_([BatchState.RUNNING, BatchState.PAUSED])
    batches = connection.execute(
        select(Batch.id, Batch.state, Batch.reason, Batch.by, BatchItem.fed_at)
        .join(BatchItem, BatchItem.batch_id == Batch.id)
        .where(
            or_(is_open, Batch.id == row.batch_id),
            BatchItem.confirmation_id == row.id,
            BatchItem.ended_at.is_(None),
        )
        .order_by(Batch.id)
    )
    return tuple(
        BatchMembership(batch.id, BatchState(batch.state), batch.reason, batch.by, batch.fed_at) for batch in batches
    )

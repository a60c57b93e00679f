"""Recording the result of an attempt: attempt, state, booking, policies and event in one transaction.

The fencing token of the lease decides who may record. An answer changes nothing if it comes late, after the lease has
gone to another worker; but a booking is stored, whichever worker saw it. A person's decision is recorded by the same
functions: see tasks/operations/resolve.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Connection, Row, Select, bindparam, insert, outerjoin, select, true, update
from uuid_utils.compat import uuid7

from models.event import EventType, booking_data, cloud_event, error_data
from models.exact_json import write_exact
from models.same import is_same_id
from models.states import BOOKED, Outcome, State
from models.tables import Attempt, BatchItem, Booking, Confirmation, OutboxEvent
from tasks.decide import Decision
from tasks.lease import Lease, close_abandoned_attempts
from tasks.stored_booking import is_stored, replace_booking, store_booking
from worker.errors import WITHDRAWN, AlreadyBooked, OrderEnded, Oversized
from worker.storage.database import StatementBatch, locked, now, now_plus
from worker.storage.encryption import Encryption
from worker.storage.sequence_floor import note_server, sequence_floor

log = structlog.get_logger(__name__)

MAX_STORED_ANSWER = 64 * 1024  # bytes of an answer that held no booking; one that holds a large one is kept whole
NOT_RECORDED = "connection-lost", "XONE answered, but the answer could not be recorded"

EVENT_OF = {
    State.CONFIRMED: EventType.BOOKING_CONFIRMED,
    State.PENDING: EventType.BOOKING_PENDING,
    State.CANCELLED: EventType.BOOKING_CANCELLED,
    State.FAILED: EventType.CONFIRMATION_FAILED,
    State.NEEDS_REVIEW: EventType.CONFIRMATION_NEEDS_REVIEW,
}


@dataclass(frozen=True)
class RecordedAttempt:
    """An attempt that has ended. duration: seconds."""

    lease: Lease
    decision: Decision
    duration: float


class Gone(Enum):
    GONE = "the confirmation is not stored any more"


Recorded = State | Gone | None


class OwnerUnknown(Exception):
    """An earlier version has stored a booking with an id of this group, and not whose it is alone."""


def record(
    connection: Connection,
    encryption: Encryption,
    attempts: Sequence[RecordedAttempt],
    with_links: bool,
    owners_are_known: bool = False,
) -> list[Recorded]:
    """Records attempts. Returns the state that each confirmation has now, None if the answer came too late, or GONE.

    with_links: whether events carry customers' links. owners_are_known: as by booking_owner.without_anothers_booking.
    Without, raises OwnerUnknown if an earlier version may have stored a booking for another confirmation, and
    IntegrityError if this version has.
    """
    booking_ids = [attempt.decision.booking.id for attempt in attempts if attempt.decision.booking]
    locked_ids = {"ids": [attempt.lease.id for attempt in attempts], "booking_ids": booking_ids}
    rows = {row.id: row for row in lock_rows(connection, _LOCK_FOR_DECISION, locked_ids)}
    if not owners_are_known and any(row.stored_before for row in rows.values()):
        raise OwnerUnknown
    batch = StatementBatch(connection)
    states: list[Recorded] = []
    for attempt in attempts:
        confirmation_id = attempt.lease.id
        row = rows.pop(confirmation_id, None)
        if row is None:  # another attempt of this confirmation was recorded just before
            batch.flush()
            alone = {"ids": [confirmation_id], "booking_ids": []}
            row = next(iter(lock_rows(connection, _LOCK_FOR_DECISION, alone)), None)
        if row is None:
            _log_gone(attempt)
            states.append(Gone.GONE)
        else:
            states.append(_record(connection, batch, encryption, row, attempt, with_links))
    batch.flush()
    return states


def _record(
    connection: Connection,
    batch: StatementBatch,
    encryption: Encryption,
    row: Row[Any],
    attempt: RecordedAttempt,
    with_links: bool,
) -> State | None:
    lease, decision = attempt.lease, attempt.decision
    owns_lease = row.lease_token == lease.token
    _close_attempt(batch, encryption, attempt, owns_lease, is_purged=row.purged_at is not None)
    if decision.booking is not None:
        if row.state in BOOKED:
            stored = connection.execute(_STORED_BOOKING, {"row_id": lease.id}).scalar_one()
            if not is_same_id(stored, decision.booking.id):
                log.error(  # with all ids: the thread that commits for others has another context
                    "second_booking",
                    confirmation=str(lease.id),
                    partner_id=lease.partner_id,
                    offer_id=lease.offer_id,
                    attempt=lease.number,
                    stored=stored,
                    seen=decision.booking.id,
                )
            return None
        if row.sequence > 0 and is_stored(connection, lease.id):  # one that a person did not believe in
            replace_booking(connection, batch, encryption, row, decision.booking)
        else:
            store_booking(batch, encryption, row, decision.booking)
        if not owns_lease:
            close_abandoned_attempts(connection, [lease.id], lease.token)
    elif not owns_lease:
        return None
    if row.withdrawn_at is not None:
        decision = _of_withdrawn(decision)
    apply_decision(batch, row, decision, lease.number, with_links)
    return decision.state


def _of_withdrawn(decision: Decision) -> Decision:
    """The decision for a confirmation that was withdrawn during the call: it ends, unless XONE may have booked."""
    may_be_booked = decision.answer_unknown or isinstance(decision.error, AlreadyBooked)
    if decision.state not in (State.RETRYING, State.FAILED) or may_be_booked:
        return decision
    return replace(decision, state=State.FAILED, error=OrderEnded(WITHDRAWN), delay=None)


def _log_gone(attempt: RecordedAttempt) -> None:
    """Names the booking of a confirmation that the database has lost during the call."""
    lease, booking = attempt.lease, attempt.decision.booking
    log.warning(
        "confirmation_gone",
        confirmation=str(lease.id),
        partner_id=lease.partner_id,
        offer_id=lease.offer_id,
        booking=booking.id if booking is not None else None,
    )


def lock_for_decision() -> Select[Any]:
    """Selects confirmations and locks them: the rows that ``store_booking`` and ``apply_decision`` need."""
    names = (
        "id", "partner_id", "offer_id", "order_reference", "echo", "correlation_id", "traceparent", "email_hash",
        "state", "lease_token", "attempts", "batch_id", "sequence", "purged_at", "withdrawn_at", "answer_unknown",
        "error_code",
    )  # fmt: skip
    columns = (Confirmation.__table__.c[name] for name in names)
    floor = sequence_floor().label("sequence_floor")
    return locked(select(*columns, now().label("now"), floor), of=Confirmation.__table__)


def lock_rows(
    connection: Connection, query: Select[Any], parameters: dict[str, Any] | None = None
) -> Sequence[Row[Any]]:
    """The rows of a query made by ``lock_for_decision``. Each knows from where its events go on."""
    rows = connection.execute(query, parameters).all()
    if any(row.sequence_floor is None for row in rows):
        note_server(connection)
        rows = connection.execute(query, parameters).all()
    return rows


def next_sequence(row: Row[Any]) -> int:
    """The sequence of the next event. row: of ``lock_rows``."""
    return int(max(row.sequence, row.sequence_floor)) + 1


def apply_decision(batch: StatementBatch, row: Row[Any], decision: Decision, attempts: int, with_links: bool) -> None:
    """Moves a confirmation to the state of a decision. If it has ended, ends its batch item too and writes its event.

    row: of ``lock_rows``; attempts: their number, for the event of a failure.
    """
    _move(batch, row, decision)
    if decision.state in EVENT_OF:
        if row.batch_id is not None:
            end_item(batch, row.batch_id, row.id, decision.state)
        _write_event(batch, row, decision, attempts, with_links)


def end_item(batch: StatementBatch, batch_id: int, confirmation_id: UUID, state: State) -> None:
    """Ends the batch item of a confirmation that has ended in ``state``."""
    batch.add(_END_ITEM, {"batch": batch_id, "row_id": confirmation_id, "state": state})


def _close_attempt(
    batch: StatementBatch, encryption: Encryption, attempt: RecordedAttempt, owns_lease: bool, is_purged: bool
) -> None:
    lease, decision = attempt.lease, attempt.decision
    error = decision.error
    answer = _answer_of(decision, keeps_booking=not owns_lease) if not is_purged else None
    batch.add(
        _CLOSE_ATTEMPT,
        {
            "row_id": lease.id,
            "at": lease.number,
            "outcome": decision.outcome,
            "duration_ms": round(attempt.duration * 1000),
            "http_status": decision.http_status,
            "code": error.code if error is not None else None,
            "detail": error.detail if error is not None else None,
            "sealed_answer": encryption.encrypt(lease.id, f"answer {lease.number}", answer) if answer else None,
        },
    )


def keep_answer(connection: Connection, encryption: Encryption, attempt: RecordedAttempt) -> None:
    """Stores XONE's answer with its attempt, as unknown: the rest could not be recorded, and is left to a read-back."""
    lease, decision = attempt.lease, attempt.decision
    is_purged = connection.execute(select(_confirmations.purged_at).where(_confirmations.id == lease.id)).scalar()
    answer = _answer_of(decision, keeps_booking=True) if is_purged is None else None
    connection.execute(
        _CLOSE_ATTEMPT.where(_attempts.outcome.is_(None), _attempts.lease_token == lease.token),
        {
            "row_id": lease.id,
            "at": lease.number,
            "outcome": Outcome.UNKNOWN,
            "duration_ms": round(attempt.duration * 1000),
            "http_status": decision.http_status,
            "code": NOT_RECORDED[0],
            "detail": NOT_RECORDED[1],
            "sealed_answer": encryption.encrypt(lease.id, f"answer {lease.number}", answer) if answer else None,
        },
    )


def _answer_of(decision: Decision, keeps_booking: bool) -> bytes | None:
    """The answer that is stored with the attempt: one without a booking, or a booking that is not stored as such."""
    if decision.booking is not None:
        return write_exact(decision.booking.model_dump()).encode() if keeps_booking else None
    error = decision.error
    if error is None or not error.answer:
        return None
    return error.answer if isinstance(error, Oversized) else error.answer[:MAX_STORED_ANSWER]


def _move(batch: StatementBatch, row: Row[Any], decision: Decision) -> None:
    """Moves a confirmation to its new state. This ends its lease, also one that another worker holds."""
    error, has_ended = decision.error, decision.state in EVENT_OF
    batch.add(
        _END if has_ended else _RETRY,
        {
            "row_id": row.id,
            "state": decision.state,
            **({"at": next_sequence(row)} if has_ended else {}),
            **({"delay": decision.delay} if decision.delay is not None else {}),
            "used": int(decision.uses_attempt),
            "not_listed": int(decision.not_listed),
            "answer_unknown": decision.answer_unknown,
            "error_code": error.code if error is not None else None,
            "error_http_status": decision.http_status if error is not None else None,
            "error_detail": error.detail if error is not None else None,
        },
    )


def _write_event(batch: StatementBatch, row: Row[Any], decision: Decision, attempts: int, with_links: bool) -> None:
    error = decision.error
    if decision.booking is not None:
        content = booking_data(decision.booking, with_links)
    else:
        assert error is not None
        content = error_data(error.code, decision.http_status, error.detail, attempts)
    write_event(batch, row, EVENT_OF[decision.state], content)


def write_event(batch: StatementBatch, row: Row[Any], event_type: EventType, content: dict[str, Any]) -> None:
    """Writes the next event of a confirmation into the outbox. The caller stores its ``next_sequence``.

    row: of ``lock_rows``; content: of booking_data or error_data.
    """
    event_id, sequence = uuid7(), next_sequence(row)
    data = {
        "partner_id": row.partner_id,
        "offer_id": row.offer_id,
        "order_reference": row.order_reference,
        "metadata": row.echo,
        "sequence": sequence,
        **content,
    }
    batch.add(
        _INSERT_EVENT,
        {
            "id": event_id,
            "aggregatetype": "confirmation",
            "aggregateid": f"{row.partner_id}/{row.offer_id}",
            "type": event_type,
            "payload": cloud_event(event_id, event_type, row.partner_id, row.offer_id, row.now, data),
            "confirmation_id": row.id,
            "sequence": sequence,
            "correlation_id": row.correlation_id,
            "traceparent": row.traceparent,
        },
    )


# Built once: to build a statement costs more than to execute it.
_attempts, _confirmations = Attempt.__table__.c, Confirmation.__table__.c
_STORED_BEFORE = select(Booking.id).where(Booking.id.in_(bindparam("booking_ids")), Booking.partner_id.is_(None))
_stored_before = _STORED_BEFORE.limit(1).subquery("stored_before")
_LOCK_FOR_DECISION = (
    lock_for_decision()
    .add_columns(_stored_before.c.id.is_not(None).label("stored_before"))
    .select_from(outerjoin(Confirmation.__table__, _stored_before, true()))
    .where(Confirmation.id.in_(bindparam("ids")))
    .order_by(Confirmation.id)
)
_STORED_BOOKING = select(Booking.id).where(Booking.confirmation_id == bindparam("row_id"))
_CLOSE_ATTEMPT = update(Attempt.__table__).where(
    _attempts.confirmation_id == bindparam("row_id"), _attempts.number == bindparam("at")
)
_MOVE = (
    update(Confirmation.__table__)
    .where(_confirmations.id == bindparam("row_id"))
    .values(
        lease_token=None,
        dispatched_until=None,
        attempts_used=_confirmations.attempts_used + bindparam("used"),
        crashes=0,
        read_backs=_confirmations.read_backs + bindparam("not_listed"),
        purged_at=None,
        updated_at=now(),
    )
)
_RETRY = _MOVE.values(due_at=now_plus(bindparam("delay")))
_END = _MOVE.values(due_at=None, batch_id=None, sequence=bindparam("at"))
_INSERT_EVENT = insert(OutboxEvent.__table__).values(created_at=now())
_END_ITEM = (
    update(BatchItem.__table__)
    .where(
        BatchItem.__table__.c.batch_id == bindparam("batch"),
        BatchItem.__table__.c.confirmation_id == bindparam("row_id"),
    )
    .values(ended_at=now(), outcome=bindparam("state"))
)

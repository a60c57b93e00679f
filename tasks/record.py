"""Recording what came of an attempt: attempt, state, booking, policies and event in one transaction.

The fencing token decides who may record. An answer that comes late, from a worker whose lease went to another one,
changes nothing; but a booking, once seen, is stored whoever brings it. What a person decides is recorded by the same
pieces: see tasks/resolve.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import Connection, Row, Select, bindparam, insert, select, update
from uuid_utils.compat import uuid7

from models import booking as xone
from models.event import EventType, booking_data, cloud_event, error_data
from models.exact_json import write_exact
from models.states import State
from models.tables import Attempt, BatchItem, Booking, Confirmation, OutboxEvent, Policy, Policyholder
from tasks import email_index
from tasks.decide import Decision
from tasks.lease import Lease, close_abandoned_attempts
from worker.storage.database import Writes, locked, now, now_plus
from worker.storage.encryption import Encryption

log = structlog.get_logger(__name__)

MAX_KEPT_ANSWER = 64 * 1024  # bytes of an answer that became no booking

EVENT_OF = {
    State.CONFIRMED: EventType.BOOKING_CONFIRMED,
    State.PENDING: EventType.BOOKING_PENDING,
    State.FAILED: EventType.CONFIRMATION_FAILED,
    State.NEEDS_REVIEW: EventType.CONFIRMATION_NEEDS_REVIEW,
}


class RecordedAttempt(NamedTuple):
    """What came of an attempt. duration: in seconds."""

    lease: Lease
    decision: Decision
    duration: float


def record(
    connection: Connection, encryption: Encryption, made: Sequence[RecordedAttempt], with_links: bool
) -> list[State | None]:
    """Records decisions. The state that each confirmation has now, or None where the answer came too late to matter.

    with_links: whether events carry customers' links.
    """
    rows = {row.id: row for row in connection.execute(_LOCK_FOR_DECISION, {"these": [it.lease.id for it in made]})}
    writes = Writes(connection)
    states = []
    for lease, decision, duration in made:
        if lease.id not in rows:  # another attempt of this confirmation was recorded just before
            writes.flush()
            rows[lease.id] = connection.execute(_LOCK_FOR_DECISION, {"these": [lease.id]}).one()
        states.append(
            _record(connection, writes, encryption, rows.pop(lease.id), lease, decision, duration, with_links)
        )
    writes.flush()
    return states


def _record(
    connection: Connection,
    writes: Writes,
    encryption: Encryption,
    row: Row[Any],
    lease: Lease,
    decision: Decision,
    duration: float,
    with_links: bool,
) -> State | None:
    ours = row.lease_token == lease.token
    _close_attempt(writes, encryption, lease, decision, duration, ours, row.purged_at is not None)
    if decision.booking is not None:
        if row.state in (State.CONFIRMED, State.PENDING):
            stored = connection.execute(_STORED_BOOKING, {"this": lease.id}).scalar_one()
            if stored != decision.booking.id:
                log.error(  # from whichever thread commits for the others: it names its confirmation itself
                    "second_booking",
                    confirmation=str(lease.id),
                    partner_id=lease.partner_id,
                    offer_id=lease.offer_id,
                    attempt=lease.number,
                    stored=stored,
                    seen=decision.booking.id,
                )
            return None
        store_booking(writes, encryption, row, decision.booking)
        if not ours:
            close_abandoned_attempts(connection, [lease.id], lease.token)
    elif not ours:
        return None
    apply_decision(writes, row, decision, lease.number, with_links)
    return decision.state


def lock_for_decision() -> Select[Any]:
    """Confirmations, locked, as ``settle`` needs them."""
    names = (
        "id", "partner_id", "offer_id", "order_reference", "echo", "correlation_id", "traceparent", "email_hash",
        "state", "lease_token", "attempts", "batch_id", "sequence", "purged_at",
    )  # fmt: skip
    return locked(select(*(Confirmation.__table__.c[name] for name in names), now().label("now")))


def apply_decision(
    connection: Connection | Writes, row: Row[Any], decision: Decision, attempts: int, with_links: bool
) -> None:
    """The confirmation to the state of a decision; where it has ended, the item of its batch too, and its event.

    row: of to_be_settled(); attempts: for the event of a failure.
    """
    _move(connection, row.id, decision)
    if decision.state in EVENT_OF:
        if row.batch_id is not None:
            end_item(connection, row.batch_id, row.id, decision.state)
        _write_event(connection, row, decision, attempts, with_links)


def _close_attempt(
    writes: Writes,
    encryption: Encryption,
    lease: Lease,
    decision: Decision,
    duration: float,
    ours: bool,
    is_purged: bool,
) -> None:
    error = decision.error
    answer = error.answer[:MAX_KEPT_ANSWER] if error is not None and error.answer else None
    if decision.booking is not None and not ours:
        answer = write_exact(decision.booking.model_dump()).encode()
    writes.execute(
        _CLOSE_ATTEMPT,
        {
            "this": lease.id,
            "at": lease.number,
            "outcome": decision.outcome,
            "duration_ms": round(duration * 1000),
            "http_status": decision.http_status,
            "code": error.code if error is not None else None,
            "detail": error.detail if error is not None else None,
            "sealed_answer": encryption.encrypt(lease.id, f"answer {lease.number}", answer)
            if answer and not is_purged
            else None,
        },
    )


def _move(connection: Connection | Writes, confirmation_id: UUID, decision: Decision) -> None:
    """The confirmation to its new state. The lease ends with it, also that of another worker who is still asking."""
    error = decision.error
    connection.execute(
        _END if decision.state in EVENT_OF else _RETRY,
        {
            "this": confirmation_id,
            "state": decision.state,
            **({"delay": decision.delay} if decision.delay is not None else {}),
            "used": int(decision.uses_attempt),
            "not_listed": int(decision.not_listed),
            "answer_unknown": decision.answer_unknown,
            "error_code": error.code if error is not None else None,
            "error_http_status": decision.http_status if error is not None else None,
            "error_detail": error.detail if error is not None else None,
        },
    )


def _write_event(
    connection: Connection | Writes, row: Row[Any], decision: Decision, attempts: int, with_links: bool
) -> None:
    event_id, event_type = uuid7(), EVENT_OF[decision.state]
    sequence = row.sequence + 1
    error = decision.error
    if decision.booking is not None:
        content = booking_data(decision.booking, with_links)
    else:
        assert error is not None
        content = error_data(error.code, decision.http_status, error.detail, attempts)
    data = {
        "partner_id": row.partner_id,
        "offer_id": row.offer_id,
        "order_reference": row.order_reference,
        "metadata": row.echo,
        "sequence": sequence,
        **content,
    }
    connection.execute(
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


def store_booking(
    connection: Connection | Writes, encryption: Encryption, row: Row[Any], booking: xone.Booking
) -> None:
    """The booking with its policies and policyholder. Personal data and secrets are sealed. row: of to_be_settled()."""
    confirmation_id: UUID = row.id

    def encrypt(column: str, text: str | None) -> bytes | None:
        return encryption.encrypt_text(confirmation_id, column, text)

    leftovers = booking.leftovers()
    connection.execute(
        _INSERT_BOOKING,
        {
            "confirmation_id": confirmation_id,
            **_values(booking, _BOOKING_COLUMNS),
            "quote_uuid": booking.quote.uuid if booking.quote else None,
            "sealed_security_token": encrypt("security_token", booking.security_token),
            "sealed_coi_url": encrypt("coi_url", booking.coi.url if booking.coi else None),
            "sealed_coi_pdf": encrypt("coi_pdf", booking.coi.pdf if booking.coi else None),
            "sealed_account_url": encrypt("account_url", booking.account_url),
            "sealed_fnol_link": encrypt("fnol_link", booking.fnol_link),
            "sealed_sign_up_url": encrypt("sign_up_url", booking.sign_up_url),
            "sealed_rest": encrypt("rest", write_exact(leftovers) if leftovers else None),
        },
    )
    holder = booking.policyholder
    if holder is not None:
        person = _values(holder, xone.Person.model_fields)
        connection.execute(
            _INSERT_POLICYHOLDER,
            {
                "confirmation_id": confirmation_id,
                "id": holder.id,
                "created_at": holder.created_at,
                "updated_at": holder.updated_at,
                "sealed_person": encrypt("person", write_exact(person)),
            },
        )
        returned = email_index.of_person(encryption, holder.email)
        email_index.note(connection, confirmation_id, [one for one in returned if one != row.email_hash])
    if booking.policies:
        connection.execute(
            _INSERT_POLICY,
            [
                {
                    "confirmation_id": confirmation_id,
                    "position": position,
                    **_policy_values(policy),
                }
                for position, policy in enumerate(booking.policies)
            ],
        )


def _policy_values(policy: xone.Policy) -> dict[str, Any]:
    extra = policy.extra_fields
    return {**_values(policy, xone.Policy.model_fields), "extra_fields": extra.model_dump() if extra else None}


def _values(received: xone.Received, names: Iterable[str]) -> dict[str, Any]:
    """Fields by name: what fitted its type. What did not is among the leftovers."""
    return {name: getattr(received, name) for name in names}


_BOOKING_COLUMNS = set(xone.Booking.model_fields) & set(Booking.__table__.columns.keys())

# Built once: to build a statement costs more than to execute it.
_attempts, _confirmations = Attempt.__table__.c, Confirmation.__table__.c
_LOCK_FOR_DECISION = lock_for_decision().where(Confirmation.id.in_(bindparam("these"))).order_by(Confirmation.id)
_STORED_BOOKING = select(Booking.id).where(Booking.confirmation_id == bindparam("this"))
_CLOSE_ATTEMPT = update(Attempt.__table__).where(
    _attempts.confirmation_id == bindparam("this"), _attempts.number == bindparam("at")
)
_MOVE = (
    update(Confirmation.__table__)
    .where(_confirmations.id == bindparam("this"))
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
_END = _MOVE.values(due_at=None, batch_id=None, sequence=_confirmations.sequence + 1)
_INSERT_BOOKING = insert(Booking.__table__).values(recorded_at=now())
_INSERT_POLICYHOLDER = insert(Policyholder.__table__)
_INSERT_POLICY = insert(Policy.__table__)
_INSERT_EVENT = insert(OutboxEvent.__table__).values(created_at=now())


def end_item(connection: Connection | Writes, batch_id: int, confirmation_id: UUID, state: State) -> None:
    """The confirmation of an item that was fed in has ended."""
    connection.execute(_END_ITEM, {"batch": batch_id, "this": confirmation_id, "state": state})


_END_ITEM = (
    update(BatchItem.__table__)
    .where(
        BatchItem.__table__.c.batch_id == bindparam("batch"), BatchItem.__table__.c.confirmation_id == bindparam("this")
    )
    .values(ended_at=now(), outcome=bindparam("state"))
)

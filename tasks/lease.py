"""The lease on a confirmation: its holder may call XONE and record the result.

A lease ends at a time of the database's clock and has a fencing token. It outlasts one call, and is renewed before a
call if too little of it is left. If a worker dies, its lease expires; the attempt that was stored before the call then
has an unknown answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, case, delete, not_, or_, select, update

from models.job import quote_ids
from models.states import Outcome, State
from models.tables import Attempt, Confirmation
from worker.errors import EXPIRED, WITHDRAWN, OrderEnded
from worker.storage.database import DIALECTS, now, now_plus, seconds_since
from worker.storage.encryption import Encryption

STOPPED = "connection-lost", "the worker stopped during this attempt"  # code and detail of an abandoned attempt


class LeaseLost(Exception):
    """The lease has expired and another worker holds one, or the confirmation has ended."""


class CallUnwanted(Exception):
    """The order has ended: no confirm call may be made. Says nothing about XONE, so it is no XoneError."""


@dataclass(frozen=True)
class History:
    """What earlier attempts have shown."""

    attempts_used: int = 0
    age: float = 0.0  # seconds since it was queued
    answer_unknown: bool = False  # XONE may have booked
    read_backs: int = 0  # that did not list the booking
    # The error of the last attempt:
    code: str | None = None
    http_status: int | None = None
    detail: str | None = None

    @property
    def already_booked(self) -> bool:
        return self.code in ("already-booked", "still-pending")


@dataclass
class Lease:
    """The right to work on a confirmation, with all data that this needs."""

    id: UUID
    token: UUID
    partner_id: str
    offer_id: str
    order_reference: str | None
    echo: dict[str, Any]
    correlation_id: str | None
    traceparent: str | None
    body: bytes = field(repr=False)
    idempotency_key: UUID
    number: int
    crashes: int  # earlier leases in a row whose worker did not come back
    history: History
    leased_at: float  # monotonic seconds, before the database was asked: the lease runs at least from then on
    is_withdrawn: bool = False
    overdue: float | None = None  # seconds since confirm_by, by the database's clock; negative before it
    call_until: float = float("inf")  # monotonic seconds: later, the database is asked whether confirm_by has passed

    def note_order(self, is_withdrawn: bool, overdue: float | None, asked_at: float) -> None:
        """Keeps what the database has said about the order. asked_at: monotonic seconds, before it was asked."""
        self.is_withdrawn, self.overdue = is_withdrawn, overdue
        self.call_until = asked_at - overdue if overdue is not None else float("inf")

    @property
    def order_ended(self) -> OrderEnded | None:
        """Why no confirm call may be made any more, as far as the database has said; None if one may."""
        if self.is_withdrawn:
            return OrderEnded(WITHDRAWN)
        return OrderEnded(EXPIRED) if self.overdue is not None and self.overdue >= 0 else None

    @cached_property
    def quote_ids(self) -> frozenset[str]:
        return frozenset(quote_ids(self.body))


def acquire(
    connection: Connection, encryption: Encryption, confirmation_ids: Sequence[UUID], token: UUID, lease_seconds: float
) -> dict[UUID, Lease]:
    """Leases those confirmations that are due, and returns the leases by id. Leaves out those leased by others.

    Repeatable: with the same token it finds again what an earlier try has leased.
    """
    leased_at = time.monotonic()
    rows = connection.execute(_ACQUIRE, {"ids": confirmation_ids, "token": token, "lease_seconds": lease_seconds}).all()
    if rows:
        leased = [row.id for row in rows]
        close_abandoned_attempts(connection, leased, token)
        open_attempts(connection, leased, token)
    bodies = [encryption.decrypt(row.id, "body", row.sealed_body) for row in rows]
    return {
        row.id: lease_from_row(row, body, row.age, row.overdue, leased_at)
        for row, body in zip(rows, bodies, strict=True)
    }


def close_abandoned_attempts(connection: Connection, confirmation_ids: Sequence[UUID], token: UUID) -> None:
    """Gives open attempts of other leases the outcome "unknown". Their workers may still come late: see record."""
    connection.execute(_CLOSE_ABANDONED, {"ids": confirmation_ids, "token": token})


def open_attempts(connection: Connection, confirmation_ids: Sequence[UUID], token: UUID) -> dict[UUID, datetime]:
    """Stores the attempts of confirmations leased with this token, before anything is sent.

    Returns the ids of the confirmations, each with the time by the database's clock.
    """
    parameters = {"ids": confirmation_ids, "token": token}
    return {row[0]: row[1] for row in connection.execute(_OPEN_ATTEMPTS[connection.dialect.name], parameters)}


def seconds_overdue(confirm_by: datetime | None, at: datetime) -> float | None:
    """Seconds since confirm_by. at: the time by the database's clock."""
    return (at - confirm_by).total_seconds() if confirm_by is not None else None


def lease_from_row(row: Row[Any], body: bytes, age: float, overdue: float | None, leased_at: float) -> Lease:
    """The lease that a row of ``confirmations`` describes. age: seconds since it was queued; overdue: as in Lease."""
    lease = Lease(
        id=row.id,
        token=row.lease_token,
        partner_id=row.partner_id,
        offer_id=row.offer_id,
        order_reference=row.order_reference,
        echo=row.echo,
        correlation_id=row.correlation_id,
        traceparent=row.traceparent,
        body=body,
        idempotency_key=row.idempotency_key,
        number=row.attempts,
        crashes=row.crashes,
        history=History(
            attempts_used=row.attempts_used,
            age=age,
            answer_unknown=row.answer_unknown,
            read_backs=row.read_backs,
            code=row.error_code,
            http_status=row.error_http_status,
            detail=row.error_detail,
        ),
        leased_at=leased_at,
    )
    lease.note_order(row.withdrawn_at is not None, overdue, leased_at)
    return lease


def exists(connection: Connection, lease: Lease) -> bool:
    """Whether the confirmation is still stored."""
    return connection.execute(select(Confirmation.id).where(Confirmation.id == lease.id)).first() is not None


def release(connection: Connection, lease: Lease, wait: float) -> bool:
    """Ends a lease as if it had not been given: nothing was sent. The confirmation is due in ``wait`` seconds.

    Returns whether it was withdrawn meanwhile. Raises LeaseLost if another worker holds it.
    """
    released = connection.execute(
        update(Confirmation)
        .where(Confirmation.id == lease.id, Confirmation.lease_token == lease.token)
        .values(
            state=State.RETRYING if lease.number > 1 else State.QUEUED,
            lease_token=None,
            due_at=now_plus(wait),
            attempts=Confirmation.attempts - 1,
            crashes=lease.crashes,
            updated_at=now(),
        )
        .returning(Confirmation.withdrawn_at)
    ).one_or_none()
    if released is None:
        raise LeaseLost
    connection.execute(delete(Attempt).where(Attempt.confirmation_id == lease.id, Attempt.number == lease.number))
    return released.withdrawn_at is not None


def postpone(
    connection: Connection, confirmation_id: UUID, wait: float, max_age: float | None = None, is_change: bool = True
) -> bool:
    """Makes a confirmation that is due now due again in ``wait`` seconds, unless it is older than max_age (seconds).

    is_change: whether ``updated_at`` moves. Returns False if it is older, and due.
    """
    is_due = Confirmation.id == confirmation_id, Confirmation.due_at <= now()
    if max_age is not None and connection.execute(select(is_too_old(max_age)).where(*is_due)).scalar():
        return False
    times = {"due_at": now_plus(wait), "updated_at": now() if is_change else Confirmation.updated_at}
    connection.execute(update(Confirmation).where(*is_due).values(dispatched_until=None, **times))
    return True


def is_too_old(max_age: float) -> ColumnElement[bool]:
    """Whether a confirmation is not put back any more. max_age: RETRY_MAX_AGE."""
    return Confirmation.queued_at <= now_plus(-max_age)


def renew(connection: Connection, lease: Lease, lease_seconds: float) -> None:
    """Makes the lease run ``lease_seconds`` from now, and learns whether its order has ended.

    Raises LeaseLost if another worker holds it.
    """
    asked_at = time.monotonic()
    renewed = connection.execute(
        update(Confirmation)
        .where(Confirmation.id == lease.id, Confirmation.lease_token == lease.token)
        .values(due_at=now_plus(lease_seconds), updated_at=now())
        .returning(Confirmation.withdrawn_at, seconds_since(Confirmation.confirm_by).label("overdue"))
    ).one_or_none()
    if renewed is None:
        raise LeaseLost
    lease.note_order(renewed.withdrawn_at is not None, renewed.overdue, asked_at)


# Built once: to build a statement costs more than to execute it.
_row = Confirmation.__table__.c
_has_token = _row.lease_token == bindparam("token")
_abandoned = and_(_row.state == State.CONFIRMING, not_(_has_token))
_ACQUIRE = (
    update(Confirmation.__table__)
    .where(_row.id.in_(bindparam("ids")), or_(_row.due_at <= now(), _has_token))
    .values(
        state=State.CONFIRMING,
        lease_token=bindparam("token"),
        due_at=now_plus(bindparam("lease_seconds")),
        dispatched_until=None,
        attempts=case((_has_token, _row.attempts), else_=_row.attempts + 1),
        answer_unknown=or_(_row.answer_unknown, _abandoned),
        crashes=_row.crashes + case((_abandoned, 1), else_=0),
        queued_at=case((_row.queued_at > now(), now()), else_=_row.queued_at),  # the clock may have been set back
        updated_at=now(),
    )
    .returning(
        Confirmation.__table__,
        seconds_since(_row.queued_at).label("age"),
        seconds_since(_row.confirm_by).label("overdue"),
    )
)
_attempt = Attempt.__table__.c
_leased = select(_row.id, _row.attempts, _row.lease_token, now()).where(_row.id.in_(bindparam("ids")), _has_token)


def _open_attempts(dialect: str) -> Any:
    insert = DIALECTS[dialect].insert(Attempt.__table__)
    insert = insert.from_select(["confirmation_id", "number", "lease_token", "started_at"], _leased)
    again = {"lease_token": insert.excluded.lease_token}
    return insert.on_conflict_do_update(index_elements=["confirmation_id", "number"], set_=again).returning(
        _attempt.confirmation_id, now()
    )


_OPEN_ATTEMPTS = {dialect: _open_attempts(dialect) for dialect in DIALECTS}
_CLOSE_ABANDONED = (
    update(Attempt.__table__)
    .where(
        _attempt.confirmation_id.in_(bindparam("ids")),
        _attempt.outcome.is_(None),
        _attempt.lease_token != bindparam("token"),
    )
    .values(outcome=Outcome.UNKNOWN, code=STOPPED[0], detail=STOPPED[1])
)

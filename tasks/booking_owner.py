"""Whose a booking is. A booking id of a partner belongs to one confirmation; the database holds this.

XONE names the offer of a booking. Where its list names only a quote, two offers may share that quote. Then a booking is
ours only if no other confirmation has it already, or may get it.
"""

import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, and_, or_, select

from models.exact_json import write_exact
from models.job import quote_ids
from models.same import spellings
from models.states import Outcome, State
from models.tables import Booking, Confirmation
from tasks.decide import Decision
from tasks.lease import Lease
from tasks.record import RecordedAttempt
from worker.errors import AlreadyBooked
from worker.storage.database import in_literally
from worker.storage.encryption import Encryption


def owner(connection: Connection, partner_id: str, booking_id: str) -> Row[UUID, str] | None:
    """The confirmation that a booking is stored for: its ``id`` and ``offer_id``. The first one, if there are two."""
    query = (
        select(Confirmation.id, Confirmation.offer_id)
        .join(Booking, Booking.confirmation_id == Confirmation.id)
        .where(Booking.id.in_(spellings(booking_id)), Confirmation.partner_id == partner_id)
        .order_by(Booking.partner_id.is_(None), Booking.recorded_at)
    )
    return connection.execute(query.limit(1)).one_or_none()


def may_be_anothers(connection: Connection, encryption: Encryption, lease: Lease, booking_id: str) -> bool:
    """Whether a booking that has a quote of this confirmation may belong to another one of the same partner."""
    found = owner(connection, lease.partner_id, booking_id)
    if found is not None:
        return bool(found.id != lease.id)
    return any(_shares_quote(row, encryption, lease.quote_ids) for row in _undecided(connection, lease))


def _undecided(connection: Connection, lease: Lease) -> Collection[Row[Any]]:
    """Other confirmations of the partner that XONE may have booked, which have these quotes or may have them."""
    has_quote = or_(
        Confirmation.quote_ids.is_(None),
        *(Confirmation.quote_ids.contains(json.dumps(quote), autoescape=True) for quote in lease.quote_ids),
    )
    is_other = Confirmation.partner_id == lease.partner_id, Confirmation.id != lease.id, Confirmation.attempts > 0
    query = select(Confirmation.id, Confirmation.quote_ids, Confirmation.sealed_body)
    under_way = query.where(Confirmation.due_at.is_not(None), *is_other, has_quote)
    in_review = query.where(_needs_review(), *is_other, has_quote)
    return [*connection.execute(under_way), *connection.execute(in_review)]


def _needs_review() -> ColumnElement[bool]:
    """With the states literally in it, so that the index of what ended badly is used."""
    return and_(
        in_literally(Confirmation.state, [State.FAILED, State.NEEDS_REVIEW]), Confirmation.state == State.NEEDS_REVIEW
    )


def _shares_quote(row: Row[Any], encryption: Encryption, quotes: frozenset[str]) -> bool:
    if row.quote_ids is not None:
        return not quotes.isdisjoint(json.loads(row.quote_ids))
    if row.sealed_body is None:
        return False
    return not quotes.isdisjoint(quote_ids(encryption.decrypt(row.id, "body", row.sealed_body)))


def without_anothers_booking(connection: Connection, attempt: RecordedAttempt) -> RecordedAttempt:
    """The attempt as it is recorded: if its booking is stored for another confirmation, a person must decide."""
    lease, decision = attempt.lease, attempt.decision
    found = owner(connection, lease.partner_id, decision.booking.id) if decision.booking else None
    if decision.booking is None or found is None or found.id == lease.id:
        return attempt
    error = AlreadyBooked(
        "wrong-offer",
        f"XONE answered with a booking that is stored for offer {found.offer_id}",
        decision.http_status,
        write_exact(decision.booking.model_dump()).encode(),
    )
    review = Decision(
        State.NEEDS_REVIEW, Outcome.UNKNOWN, error=error, http_status=decision.http_status, answer_unknown=True
    )
    return replace(attempt, decision=review)

"""A person's answer to ``needs_review``: the booking that exists, or that there is none."""

import json
import unicodedata
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Connection, Row, case, select
from sqlalchemy.exc import IntegrityError

from models.booking import Booking, excess
from models.event import EventType
from models.exact_json import read_exact
from models.same import is_same_id
from models.states import BookingStatuses, Outcome, State
from models.tables import Confirmation, is_offer
from tasks.booking_owner import owner
from tasks.decide import Decision, booked
from tasks.operations.audit import audit
from tasks.operations.batches import skip_everywhere
from tasks.record import EVENT_OF, apply_decision, lock_for_decision, lock_rows, next_sequence
from tasks.stored_booking import is_stored, replace_booking, store_booking
from worker.errors import ResolveError, XoneError
from worker.storage.database import StatementBatch
from worker.storage.encryption import Encryption

MAX_WHY = 500  # characters


@dataclass(frozen=True)
class Resolved:
    """The new state of a confirmation, and the event that says so."""

    state: State
    event_type: EventType
    sequence: int


def read_booking(content: bytes, offer_id: str) -> Booking:
    """The booking in an answer of XONE: ``{"data": {…}}``, or only the object within.

    offer_id: the offer that the booking must be of, in whatever form. Raises ResolveError.
    """
    try:
        answer = read_exact(content)
    except (ValueError, RecursionError) as error:
        place = f": line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ResolveError(f"the booking is no JSON{place}") from None
    data = answer["data"] if isinstance(answer, dict) and "data" in answer else answer
    if (reason := excess(data)) is not None:
        raise ResolveError(f"the booking {reason}: leave out what no consumer needs")
    try:
        booking = Booking.model_validate(data)
    except ValidationError as error:
        fields = sorted({str(problem["loc"][0]) for problem in error.errors() if problem["loc"]})
        lacks = f"lacks a usable {' and '.join(fields)}" if fields else "is no JSON object"
        raise ResolveError(f"the booking {lacks}; it should be as XONE answers it") from None
    if not is_same_id(booking.offer_id, offer_id):
        raise ResolveError(f"the booking is of another offer: {booking.offer_id}, not {offer_id}")
    return booking.model_copy(update={"offer_id": offer_id})


def check_why(text: str) -> str:
    """The text for consumers, without space around it. Raises ResolveError if it can't be sent to them."""
    text = text.strip()
    if not text:
        raise ResolveError("a text is needed")
    if len(text) > MAX_WHY:
        raise ResolveError(f"{len(text)} characters; at most {MAX_WHY} are accepted")
    if any(unicodedata.category(character) in _NOT_ACCEPTED for character in text):
        raise ResolveError("control characters and line breaks are not accepted")
    return text


_NOT_ACCEPTED = frozenset({"Cc", "Cs", "Zl", "Zp"})  # controls, lone surrogates, line and paragraph separators


def resolve_booked(
    connection: Connection,
    encryption: Encryption,
    partner_id: str,
    booking: Booking,
    statuses: BookingStatuses,
    with_links: bool,
    by: str,
    reason: str | None,
) -> Resolved:
    """Records a booking that XONE has, as if XONE had answered with it. Raises ResolveError.

    with_links: whether the event carries customers' links; by: ``user@host``.
    """
    row = _lock_for_review(connection, partner_id, booking.offer_id)
    found = owner(connection, partner_id, booking.id)
    if found is not None and found.id != row.id:
        raise ResolveError(f"booking {booking.id} is stored for offer {found.offer_id} already")
    decision = replace(booked(booking, None, statuses), uses_attempt=False)
    batch = StatementBatch(connection)
    if is_stored(connection, row.id):
        replace_booking(connection, batch, encryption, row, booking)
    else:
        store_booking(batch, encryption, row, booking)
    return _conclude(connection, batch, row, decision, with_links, by, reason, booking=booking.id)


def resolve_failed(
    connection: Connection, partner_id: str, offer_id: str, why: str, by: str, reason: str | None
) -> Resolved:
    """Records that XONE has no booking. why: from check_why, for consumers of the event. Raises ResolveError."""
    row = _lock_for_review(connection, partner_id, offer_id)
    decision = Decision(State.FAILED, Outcome.REFUSED, error=XoneError("resolved", why), uses_attempt=False)
    return _conclude(connection, StatementBatch(connection), row, decision, False, by, reason or why)


def _lock_for_review(connection: Connection, partner_id: str, offer_id: str) -> Row[Any]:
    """Locks a confirmation that needs review and returns its row. No batch feeds it in any more."""
    confirmation_id: UUID | None = connection.execute(
        select(Confirmation.id)
        .where(Confirmation.partner_id == partner_id, is_offer(offer_id))
        .order_by(case((Confirmation.offer_id == offer_id, 0), else_=1), Confirmation.created_at)
        .limit(1)
    ).scalar_one_or_none()
    if confirmation_id is None:
        raise ResolveError(f"no confirmation of offer {offer_id} and partner {partner_id}")
    skip_everywhere(connection, confirmation_id)
    (row,) = lock_rows(connection, lock_for_decision().where(Confirmation.id == confirmation_id))
    if row.state != State.NEEDS_REVIEW:
        raise ResolveError(f"offer {offer_id} is {row.state}, not needs_review: there is nothing to resolve")
    return row


def _conclude(
    connection: Connection,
    batch: StatementBatch,
    row: Row[Any],
    decision: Decision,
    with_links: bool,
    by: str,
    reason: str | None,
    **details: str,
) -> Resolved:
    apply_decision(batch, row, decision, row.attempts, with_links)
    try:
        batch.flush()
    except IntegrityError:
        raise ResolveError("this booking was stored for another offer just now") from None
    facts = {"partner": row.partner_id, "offer": row.offer_id, "state": decision.state, **details}
    audit(connection, "resolve", by, reason, 1, **facts)
    return Resolved(decision.state, EVENT_OF[decision.state], next_sequence(row))

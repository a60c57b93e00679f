"""Compares XONE's list of bookings with what is stored, and takes in what is missing.

A database that has lost its last commits, by a failover to a standby that lagged or by a restore, has lost
confirmations whose messages were acknowledged long before. XONE knows each of their bookings.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from itertools import islice
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Connection, Engine, Select, case, select
from sqlalchemy.exc import IntegrityError
from uuid_utils.compat import uuid4, uuid7

from models.booking import MAX_ID, Booking, excess
from models.job import is_path_id
from models.same import as_uuid
from models.states import State
from models.tables import Confirmation, is_offer
from tasks.booking_owner import owner
from tasks.decide import booked
from tasks.operations.batches import skip_everywhere
from tasks.record import apply_decision, lock_for_decision, lock_rows, store_booking
from worker.storage.database import DIALECTS, StatementBatch, insert_if_absent, now
from worker.storage.encryption import Encryption

NO_OFFER = "none"  # in place of the id that a booking must have
CHUNK = 100  # bookings that are compared in one transaction


class Found(StrEnum):
    """What is stored for a listed booking. The values are public in --json."""

    STORED = "stored"
    UNKNOWN_OFFER = "unknown_offer"  # there is no confirmation of its offer
    NOT_BOOKED = "not_booked"  # the confirmation of its offer has no booking
    IN_HAND = "in_hand"  # a worker is at it
    OTHER_BOOKING = "other_booking"  # the confirmation of its offer has another booking
    WITHOUT_OFFER = "without_offer"  # the list does not say of which offer it is
    UNREADABLE = "unreadable"


MISSING = frozenset({Found.UNKNOWN_OFFER, Found.NOT_BOOKED})
FOR_A_PERSON = frozenset({Found.OTHER_BOOKING, Found.WITHOUT_OFFER, Found.UNREADABLE})


@dataclass(frozen=True)
class Compared:
    """A listed booking, and what is stored for it. booking: None where it can't be read or names no usable offer."""

    found: Found
    booking_id: str
    booking: Booking | None = None

    @property
    def name(self) -> str:
        """For a person: its offer, else its own id."""
        return f"offer {self.booking.offer_id}" if self.booking is not None else f"booking {self.booking_id}"


def partners(connection: Connection) -> list[str]:
    """The partners of all confirmations that are stored."""
    return list(connection.execute(select(Confirmation.partner_id).distinct().order_by("partner_id")).scalars())


def compare(
    engine: Engine, partner_id: str, listing: Iterable[dict[str, Any]], since: datetime
) -> Iterator[Sequence[Compared]]:
    """Yields the bookings of a list that were made at ``since`` or later, in chunks, and changes nothing.

    One whose time is not known counts as later. listing: as XONE lists them, of any length.
    """
    bookings = iter(listing)
    while chunk := list(islice(bookings, CHUNK)):
        read = [compared for listed in chunk if (compared := _read(listed, since)) is not None]
        with engine.connect() as connection:
            chunk_found = [replace(compared, found=_found(connection, partner_id, compared)) for compared in read]
        yield chunk_found  # with no transaction open


def take_in(
    engine: Engine,
    encryption: Encryption,
    partner_id: str,
    compared: Compared,
    confirmed_statuses: frozenset[str],
    with_links: bool,
) -> Found:
    """Stores a booking that is missing: with its policies, policyholder and event, for a confirmation that is made if
    there is none. Returns what was stored before.

    Nobody knows the job of such a confirmation: it has no request, order reference or metadata. If the job comes again,
    it finds its offer booked.
    """
    try:
        with engine.begin() as connection:
            return _take_in(connection, encryption, partner_id, compared, confirmed_statuses, with_links)
    except IntegrityError:  # another command, or a worker, has stored it just now
        with engine.connect() as connection:
            found = _found(connection, partner_id, compared)
        return Found.OTHER_BOOKING if found in MISSING else found


def _take_in(
    connection: Connection,
    encryption: Encryption,
    partner_id: str,
    compared: Compared,
    confirmed_statuses: frozenset[str],
    with_links: bool,
) -> Found:
    booking = compared.booking
    found = _found(connection, partner_id, compared)
    if booking is None or found not in MISSING:
        return found
    if found is Found.UNKNOWN_OFFER:
        connection.execute(_INSERT[connection.dialect.name], _values(partner_id, booking))
    confirmation_id = connection.execute(_of_offer(partner_id, booking.offer_id)).scalars().one()
    skip_everywhere(connection, confirmation_id)
    (row,) = lock_rows(connection, lock_for_decision().where(Confirmation.id == confirmation_id))
    if (now_found := _found(connection, partner_id, compared)) not in MISSING:  # since before it was locked
        return now_found
    batch = StatementBatch(connection)
    store_booking(batch, encryption, row, booking.model_copy(update={"offer_id": row.offer_id}))
    decision = replace(booked(booking, None, confirmed_statuses), uses_attempt=False)
    apply_decision(batch, row, decision, row.attempts, with_links)
    batch.flush()
    return found


def _read(listed: dict[str, Any], since: datetime) -> Compared | None:
    """A booking of the list; None if it was made before ``since``."""
    offer, booking_id = listed.get("offer_id"), str(listed.get("id"))[:MAX_ID]
    try:
        booking = Booking.model_validate({**listed, "offer_id": offer or NO_OFFER}) if excess(listed) is None else None
    except ValidationError:
        booking = None
    if booking is None:
        return Compared(Found.UNREADABLE, booking_id)
    if booking.created_at is not None and booking.created_at < since:
        return None
    if not offer:
        return Compared(Found.WITHOUT_OFFER, booking.id)
    if not is_path_id(booking.offer_id):
        return Compared(Found.UNREADABLE, booking.id)
    return Compared(Found.UNKNOWN_OFFER, booking.id, booking)


def _found(connection: Connection, partner_id: str, compared: Compared) -> Found:
    if owner(connection, partner_id, compared.booking_id) is not None:
        return Found.STORED
    if compared.booking is None:
        return compared.found
    row = connection.execute(_of_offer(partner_id, compared.booking.offer_id)).one_or_none()
    if row is None:
        return Found.UNKNOWN_OFFER
    if row.state in (State.CONFIRMED, State.PENDING):
        return Found.OTHER_BOOKING
    return Found.IN_HAND if row.is_leased else Found.NOT_BOOKED


def _of_offer(partner_id: str, offer_id: str) -> Select[UUID, State, bool]:
    is_leased = Confirmation.lease_token.is_not(None) & (Confirmation.due_at > now())
    return (
        select(Confirmation.id, Confirmation.state, is_leased.label("is_leased"))
        .where(Confirmation.partner_id == partner_id, is_offer(offer_id))
        .order_by(case((Confirmation.offer_id == offer_id, 0), else_=1), Confirmation.created_at)
        .limit(1)
    )


def _values(partner_id: str, booking: Booking) -> dict[str, Any]:
    """The columns of a confirmation of which only the booking is known."""
    offer = {"offer_id": booking.offer_id, "offer_uuid": as_uuid(booking.offer_id)}
    return {"id": uuid7(), "partner_id": partner_id, **offer, "idempotency_key": uuid4()}


_INSERT = {
    dialect: insert_if_absent(dialect, Confirmation.__table__).values(
        echo={},
        quote_ids="[]",
        state=State.QUEUED,
        attempts=0,
        attempts_used=0,
        read_backs=0,
        crashes=0,
        answer_unknown=False,
        sequence=0,
        queued_at=now(),
        created_at=now(),
        updated_at=now(),
    )
    for dialect in DIALECTS
}

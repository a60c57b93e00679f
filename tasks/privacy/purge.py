"""Purging personal data: of confirmations that ended long enough ago, or when the person asks for it.

Purging blanks all encrypted columns, the hashes of e-mails, and customers' links in stored events. Business data stays:
states, ids, prices, policies, attempts, times, events. A confirmation has ended when it is confirmed, pending (XONE has
booked) or failed, and its events are published. One in ``needs_review`` is kept: a person needs its data to decide.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Select, and_, delete, func, select, update

from models.event import BOOKING_EVENTS, without_links
from models.states import PURGEABLE, State
from models.tables import Confirmation, FurtherEmail, OutboxEvent
from tasks import email_index
from tasks.halving import in_halves
from tasks.operations.failures import in_literally
from tasks.privacy.clear_columns import remove_misfits
from tasks.privacy.sealed_columns import SEALED, id_in
from worker.storage.database import locked, now
from worker.storage.encryption import Encryption

STEP = 100  # confirmations in one transaction


@dataclass(frozen=True)
class PersonsConfirmation:
    """A confirmation that contains a person's e-mail. has_ended: whether it can be purged."""

    id: UUID
    partner_id: str
    offer_id: str
    state: State
    has_ended: bool


def has_ended() -> ColumnElement[bool]:
    """A condition that a confirmation has ended, with the states literally in it: see ``ix_confirmations_to_purge``."""
    unpublished = select(OutboxEvent.id).where(
        OutboxEvent.confirmation_id == Confirmation.id, OutboxEvent.published_at.is_(None)
    )
    return and_(in_literally(*PURGEABLE), ~unpublished.exists())


def past_query(before: datetime) -> Select[Any]:
    """The ids of confirmations that ended before this time and still have personal data."""
    is_past = has_ended(), Confirmation.purged_at.is_(None), Confirmation.updated_at < before
    return select(Confirmation.id).where(*is_past)


def count(connection: Connection, before: datetime) -> int:
    """How many confirmations ended before this time and still have personal data."""
    return connection.execute(select(func.count()).select_from(past_query(before).subquery())).scalar_one()


def purge(
    connection: Connection,
    before: datetime,
    limit: int = STEP,
    left_out: Collection[UUID] = (),
    failed: dict[UUID, Exception] | None = None,
) -> int:
    """Purges the confirmations that ended first, at most so many, and returns their number. Skips locked ones.

    left_out: confirmations that are not tried; failed: gets those that could not be purged. Without it, the first one
    raises its error.
    """
    query = past_query(before).order_by(Confirmation.updated_at).limit(limit)
    if left_out:
        query = query.where(Confirmation.id.not_in(left_out))
    rows = connection.execute(locked(query, skip_locked=True)).all()
    if failed is None:
        blank(connection, [row.id for row in rows])
        return len(rows)
    return in_halves(connection, rows, lambda part: blank(connection, [row.id for row in part]), failed)


def of_person(connection: Connection, encryption: Encryption, email: str) -> list[PersonsConfirmation]:
    """The confirmations that contain an e-mail, in the order in which they came."""
    columns = (Confirmation.id, Confirmation.partner_id, Confirmation.offer_id, Confirmation.state)
    is_found = Confirmation.id.in_(email_index.find(connection, encryption, email))
    rows = connection.execute(
        select(*columns, has_ended().label("has_ended")).where(is_found).order_by(Confirmation.id)
    )
    return [
        PersonsConfirmation(row.id, row.partner_id, row.offer_id, State(row.state), bool(row.has_ended)) for row in rows
    ]


def erase(connection: Connection, encryption: Encryption, email: str, confirmation_id: UUID) -> bool:
    """Purges one confirmation of ``of_person``. Returns False if it has not ended, or is another person's by now."""
    query = locked(select(Confirmation.id).where(Confirmation.id == confirmation_id, has_ended()))
    ids = connection.execute(query).scalars().all()
    if not ids or confirmation_id not in email_index.find(connection, encryption, email):
        return False
    blank(connection, ids)
    return True


def blank(connection: Connection, ids: Collection[UUID]) -> None:
    """Purges confirmations, which the caller has locked."""
    if not ids:
        return
    remove_misfits(connection, ids)
    for table, columns in SEALED.items():
        connection.execute(update(table).where(id_in(table).in_(ids)).values(dict.fromkeys(columns)))
    connection.execute(delete(FurtherEmail).where(FurtherEmail.confirmation_id.in_(ids)))
    is_theirs = OutboxEvent.confirmation_id.in_(ids), OutboxEvent.type.in_(BOOKING_EVENTS)
    for event in connection.execute(select(OutboxEvent.id, OutboxEvent.payload).where(*is_theirs)).all():
        payload = without_links(event.payload)
        if payload != event.payload:
            connection.execute(update(OutboxEvent).where(OutboxEvent.id == event.id).values(payload=payload))
    connection.execute(update(Confirmation).where(Confirmation.id.in_(ids)).values(email_hash=None, purged_at=now()))

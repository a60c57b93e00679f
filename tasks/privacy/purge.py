"""The end of personal data: blanked where a confirmation ended long enough ago, or where its person asks for it.

Blanked are all sealed columns, the hashes of e-mails, and customers' links in stored events. Business facts stay:
states, ids, prices, policies, attempts, times, events. A confirmation has ended when it is confirmed, pending (XONE has
booked, and nobody here waits for more) or failed, and its events are published. One that needs review is kept: a person
has still to decide with it.
"""

from collections.abc import Collection
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, delete, func, select, update

from models.event import BOOKING_EVENTS, without_links
from models.states import PURGEABLE
from models.tables import Confirmation, FurtherEmail, OutboxEvent
from tasks import email_index
from tasks.operations.failures import in_literally
from tasks.privacy.sealed_columns import SEALED, id_in
from worker.storage.database import locked, now
from worker.storage.encryption import Encryption

STEP = 100  # confirmations in one transaction


def has_ended() -> ColumnElement[bool]:
    """The states stand literally: see ``ix_confirmations_to_purge``."""
    unpublished = select(OutboxEvent.id).where(
        OutboxEvent.confirmation_id == Confirmation.id, OutboxEvent.published_at.is_(None)
    )
    return and_(in_literally(*PURGEABLE), ~unpublished.exists())


def past_query(before: datetime) -> Select[Any]:
    """The ids of those that ended before and still have their personal data."""
    is_past = has_ended(), Confirmation.purged_at.is_(None), Confirmation.updated_at < before
    return select(Confirmation.id).where(*is_past)


def count(connection: Connection, before: datetime) -> int:
    return connection.execute(select(func.count()).select_from(past_query(before).subquery())).scalar_one()


def purge(connection: Connection, before: datetime, most: int = STEP) -> int:
    """Blanks those that ended first, at most so many, and returns their number. Skips what another one holds."""
    query = past_query(before).order_by(Confirmation.updated_at).limit(most)
    ids = connection.execute(locked(query, skip_locked=True)).scalars().all()
    blank(connection, ids)
    return len(ids)


def of_person(connection: Connection, encryption: Encryption, email: str) -> list[Row[Any]]:
    """The confirmations that an e-mail stands in, and whether each ``has_ended``, in the order they came."""
    columns = (Confirmation.id, Confirmation.partner_id, Confirmation.offer_id, Confirmation.state)
    found = Confirmation.id.in_(email_index.find(connection, encryption, email))
    return list(
        connection.execute(select(*columns, has_ended().label("has_ended")).where(found).order_by(Confirmation.id))
    )


def erase(connection: Connection, encryption: Encryption, email: str, confirmation_id: UUID) -> bool:
    """Blanks one confirmation of ``of_person``; False where it has not ended, or is another person's by now."""
    query = locked(select(Confirmation.id).where(Confirmation.id == confirmation_id, has_ended()))
    ids = connection.execute(query).scalars().all()
    if not ids or confirmation_id not in email_index.find(connection, encryption, email):
        return False
    blank(connection, ids)
    return True


def blank(connection: Connection, ids: Collection[UUID]) -> None:
    """Blanks confirmations that are locked."""
    if not ids:
        return
    for table, columns in SEALED.items():
        connection.execute(update(table).where(id_in(table).in_(ids)).values(dict.fromkeys(columns)))
    connection.execute(delete(FurtherEmail).where(FurtherEmail.confirmation_id.in_(ids)))
    of_them = OutboxEvent.confirmation_id.in_(ids), OutboxEvent.type.in_(BOOKING_EVENTS)
    for event in connection.execute(select(OutboxEvent.id, OutboxEvent.payload).where(*of_them)).all():
        payload = without_links(event.payload)
        if payload != event.payload:
            connection.execute(update(OutboxEvent).where(OutboxEvent.id == event.id).values(payload=payload))
    connection.execute(update(Confirmation).where(Confirmation.id.in_(ids)).values(email_hash=None, purged_at=now()))

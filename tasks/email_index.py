"""E-mails that a confirmation is found by, as keyed hashes: its policyholder's on the row, any others beside it.

Others are those of the insured, and of the policyholder as XONE returned it, where they differ. Nearly every job has
one e-mail only, so that finding it costs no statement of its own.
"""

import json
from collections.abc import Collection
from uuid import UUID

from sqlalchemy import Connection, func, select, union

from models.tables import Confirmation, FurtherEmail
from worker.storage.database import DIALECTS, Writes, insert_if_absent
from worker.storage.encryption import Encryption


def of_request(encryption: Encryption, body: bytes) -> list[bytes]:
    """The hashes of a request body's e-mails, each once, the policyholder's first."""
    request = json.loads(body)
    insured = [one for quote in request["quotes"] for one in quote.get("insured") or []]
    people = [request["policyholder"], *insured]
    return list(dict.fromkeys(found for person in people for found in of_person(encryption, person.get("email"))))


def of_person(encryption: Encryption, email: str | None) -> list[bytes]:
    """The hash of a person's e-mail; none where there is no e-mail."""
    return [encryption.email_hash(email)] if email and email.strip() else []


def note(connection: Connection | Writes, confirmation_id: UUID, hashes: Collection[bytes]) -> None:
    """Lets a confirmation be found by further hashes. No statement where there are none."""
    if hashes:
        rows = [{"confirmation_id": confirmation_id, "email_hash": one} for one in hashes]
        connection.execute(_NOTE[connection.dialect.name], rows)


def find(connection: Connection, encryption: Encryption, email: str) -> list[UUID]:
    """The confirmations of a person, whichever of DATA_KEYS was the first when they were stored."""
    hashes = encryption.email_hashes(email)
    return list(
        connection.execute(
            union(
                select(Confirmation.id).where(Confirmation.email_hash.in_(hashes)),
                select(FurtherEmail.confirmation_id).where(FurtherEmail.email_hash.in_(hashes)),
            )
        ).scalars()
    )


def count_unsearched(connection: Connection) -> int:
    """Confirmations that were stored before there were hashes: ``rekey`` makes them. Reads every row."""
    has_none = Confirmation.sealed_body.is_not(None), Confirmation.email_hash.is_(None)
    return connection.execute(select(func.count()).select_from(Confirmation).where(*has_none)).scalar_one()


_NOTE = {
    dialect: insert_if_absent(dialect, FurtherEmail.__table__, "confirmation_id", "email_hash") for dialect in DIALECTS
}

"""E-mails that find a confirmation, as keyed hashes.

The hash of the policyholder's e-mail is a column of the confirmation. The table ``further_emails`` holds other ones: of
the insured, and of the policyholder as XONE returned it. Most jobs have one e-mail only and cost no further statement.
"""

import json
from collections.abc import Collection
from uuid import UUID

from sqlalchemy import Connection, func, select, union

from models.tables import Confirmation, FurtherEmail
from worker.storage.database import DIALECTS, StatementBatch, insert_if_absent
from worker.storage.encryption import Encryption


def of_request(encryption: Encryption, body: bytes) -> list[bytes]:
    """The hashes of the e-mails in a request body, without repeats, the policyholder's first."""
    request = json.loads(body)
    insured = [person for quote in request["quotes"] for person in quote.get("insured") or []]
    people = [request["policyholder"], *insured]
    return list(dict.fromkeys(digest for person in people for digest in of_person(encryption, person.get("email"))))


def of_person(encryption: Encryption, email: str | None) -> list[bytes]:
    """The hash of an e-mail, as a list; an empty list if there is no e-mail."""
    return [encryption.email_hash(email)] if email and email.strip() else []


def add(batch: StatementBatch, confirmation_id: UUID, hashes: Collection[bytes]) -> None:
    """Adds further hashes that find a confirmation. Hashes that are there already stay."""
    if hashes:
        rows = ({"confirmation_id": confirmation_id, "email_hash": digest} for digest in hashes)
        batch.add(_ADD[batch.dialect.name], *rows)


def find(connection: Connection, encryption: Encryption, email: str) -> list[UUID]:
    """The ids of a person's confirmations, whichever of DATA_KEYS was the first when they were stored."""
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
    """The number of confirmations that were stored before hashes existed. ``rekey`` adds them. Reads every row."""
    unsearched = Confirmation.sealed_body.is_not(None), Confirmation.email_hash.is_(None)
    return connection.execute(select(func.count()).select_from(Confirmation).where(*unsearched)).scalar_one()


_ADD = {
    dialect: insert_if_absent(dialect, FurtherEmail.__table__, "confirmation_id", "email_hash") for dialect in DIALECTS
}

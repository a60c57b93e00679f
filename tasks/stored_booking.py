"""A booking as it is stored: in clear what has a known form, encrypted what is personal or a secret.

A booking that changes at XONE replaces what is stored. What that was is kept as an EarlierBooking.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from models import booking as xone
from models.exact_json import write_exact
from models.tables import Booking, EarlierBooking, Policy, Policyholder
from tasks import email_index
from worker.storage.database import StatementBatch, now
from worker.storage.encryption import Encryption

_SECRETS = ("security_token", "account_url", "fnol_link", "sign_up_url")  # each is encrypted by itself


def store_booking(batch: StatementBatch, encryption: Encryption, row: Row[Any], booking: xone.Booking) -> None:
    """Stores a booking with its policies and policyholder. Encrypts personal data and secrets.

    row: the confirmation, of ``lock_for_decision``.
    """
    leftovers = booking.leftovers()
    values = {**_booking_row(encryption, row.id, booking, leftovers), "partner_id": row.partner_id}
    batch.add(_INSERT_BOOKING, {"confirmation_id": row.id, **values})
    _store_policyholder(batch, encryption, row, booking)
    _store_policies(batch, row.id, booking)


def is_stored(connection: Connection, confirmation_id: UUID) -> bool:
    """Whether a booking of the confirmation is stored."""
    return connection.execute(select(Booking.id).where(Booking.confirmation_id == confirmation_id)).first() is not None


def replace_booking(
    connection: Connection,
    batch: StatementBatch,
    encryption: Encryption,
    row: Row[Any],
    booking: xone.Booking,
    stays_blank: bool = False,
) -> xone.Booking:
    """Replaces a stored booking, and keeps what it was. Returns it as it is stored now.

    row: the confirmation, of ``lock_for_decision``. What the new booking leaves out stays as it is: a list of bookings
    may say less than an answer to confirm. stays_blank: nothing personal is stored, for a confirmation that was purged.
    Raises DecryptionError.
    """
    batch.flush()  # what is deleted below goes before what is added
    before = _stored(connection, encryption, row.id)
    content = None if stays_blank else encryption.encrypt(row.id, f"booking {before.number}", before.content)
    batch.add(
        _INSERT_EARLIER,
        {"row_id": row.id, "number": before.number, "status": before.booking.status, "sealed_booking": content},
    )
    given = booking.model_fields_set
    merged = before.booking.model_copy(update={name: getattr(booking, name) for name in given})
    kept = {path: value for path, value in before.leftovers.items() if re.split(r"[.\[]", path)[0] not in given}
    leftovers = {**kept, **booking.leftovers()}
    if stays_blank:
        merged = merged.model_copy(update={**dict.fromkeys(_SECRETS), "coi": None, "policyholder": None})
        leftovers = {}
    batch.add(_REPLACE_BOOKING, {"row_id": row.id, **_booking_row(encryption, row.id, merged, leftovers)})
    if "policies" in given:
        batch.add(_DELETE_POLICIES, {"row_id": row.id})
        _store_policies(batch, row.id, merged)
    if "policyholder" in given and merged.policyholder is not None:
        batch.add(_DELETE_POLICYHOLDER, {"row_id": row.id})
        _store_policyholder(batch, encryption, row, merged)
    return merged


class _Stored:
    """A booking as it is stored. number: of the EarlierBooking that it becomes; content: all of it, as JSON."""

    def __init__(self, number: int, content: dict[str, Any], leftovers: dict[str, Any]) -> None:
        self.number = number
        self.booking = xone.Booking.model_validate(content)
        self.leftovers = leftovers
        self.content = write_exact({**content, "rest": leftovers}).encode()


def _stored(connection: Connection, encryption: Encryption, confirmation_id: UUID) -> _Stored:
    content = stored_in_clear(connection, [confirmation_id])[confirmation_id]
    row = connection.execute(select(Booking.__table__).where(Booking.confirmation_id == confirmation_id)).one()
    holder = connection.execute(
        select(Policyholder.__table__).where(Policyholder.confirmation_id == confirmation_id)
    ).one_or_none()

    def decrypt(column: str, sealed: bytes | None) -> str | None:
        return encryption.decrypt(confirmation_id, column, sealed).decode() if sealed is not None else None

    content |= {name: decrypt(name, row._mapping[f"sealed_{name}"]) for name in _SECRETS}
    coi = {"url": decrypt("coi_url", row.sealed_coi_url), "pdf": decrypt("coi_pdf", row.sealed_coi_pdf)}
    content["coi"] = coi if any(coi.values()) else None
    if holder is not None:
        person = json.loads(decrypt("person", holder.sealed_person) or "{}")
        content["policyholder"] = {
            "id": holder.id,
            "created_at": holder.created_at,
            "updated_at": holder.updated_at,
            **person,
        }
    number = connection.execute(
        select(func.coalesce(func.max(EarlierBooking.number), 0) + 1).where(
            EarlierBooking.confirmation_id == confirmation_id
        )
    ).scalar_one()
    return _Stored(number, content, json.loads(decrypt("rest", row.sealed_rest) or "{}"))


def stored_in_clear(connection: Connection, ids: Collection[UUID]) -> dict[UUID, dict[str, Any]]:
    """What is stored of bookings in clear, in the form of an answer, by confirmation."""

    def rows(table: type[Booking | Policy | Policyholder], *order: Any) -> Any:
        return connection.execute(
            select(table.__table__).where(table.confirmation_id.in_(ids)).order_by(*order)
        ).mappings()

    policies = defaultdict[UUID, list[dict[str, Any]]](list)
    for row in rows(Policy, Policy.position):
        policies[row["confirmation_id"]].append({name: row[name] for name in xone.Policy.model_fields})
    holders = {row["confirmation_id"]: {"id": row["id"]} for row in rows(Policyholder)}
    return {
        row["confirmation_id"]: {
            **{name: value for name, value in row.items() if name in xone.Booking.model_fields},
            "quote": {"uuid": row["quote_uuid"]},
            "policies": policies.get(row["confirmation_id"], []),
            "policyholder": holders.get(row["confirmation_id"]),
        }
        for row in rows(Booking)
    }


def _booking_row(
    encryption: Encryption, confirmation_id: UUID, booking: xone.Booking, leftovers: dict[str, Any]
) -> dict[str, Any]:
    def encrypt(column: str, text: str | None) -> bytes | None:
        return encryption.encrypt_text(confirmation_id, column, text)

    return {
        **booking_values(booking),
        **{f"sealed_{name}": encrypt(name, getattr(booking, name)) for name in _SECRETS},
        "sealed_coi_url": encrypt("coi_url", booking.coi.url if booking.coi else None),
        "sealed_coi_pdf": encrypt("coi_pdf", booking.coi.pdf if booking.coi else None),
        "sealed_rest": encrypt("rest", write_exact(leftovers) if leftovers else None),
    }


def _store_policyholder(batch: StatementBatch, encryption: Encryption, row: Row[Any], booking: xone.Booking) -> None:
    holder = booking.policyholder
    if holder is None:
        return
    person = _values(holder, xone.Person.model_fields)
    batch.add(
        _INSERT_POLICYHOLDER,
        {
            "confirmation_id": row.id,
            "id": holder.id,
            "created_at": holder.created_at,
            "updated_at": holder.updated_at,
            "sealed_person": encryption.encrypt_text(row.id, "person", write_exact(person)),
        },
    )
    returned = email_index.of_person(encryption, holder.email)
    email_index.add(batch, row.id, [digest for digest in returned if digest != row.email_hash])


def _store_policies(batch: StatementBatch, confirmation_id: UUID, booking: xone.Booking) -> None:
    if booking.policies:
        batch.add(
            _INSERT_POLICY,
            *(
                {"confirmation_id": confirmation_id, "position": position, **policy_values(policy)}
                for position, policy in enumerate(booking.policies)
            ),
        )


def booking_values(booking: xone.Booking) -> dict[str, Any]:
    """The columns of a booking that are stored in clear."""
    return {**_values(booking, _BOOKING_COLUMNS), "quote_uuid": booking.quote.uuid if booking.quote else None}


def policy_values(policy: xone.Policy) -> dict[str, Any]:
    """The columns of a policy."""
    values = _values(policy, xone.Policy.model_fields)
    return {**values, **{name: _known(values[name]) for name in ("policy_content", "extra_fields")}}


def _known(received: xone.Received | None) -> dict[str, Any] | None:
    """The known fields that came, as JSON. The others are among the leftovers."""
    if received is None:
        return None
    return _values(received, sorted(received.model_fields_set & set(type(received).model_fields)))


def _values(received: xone.Received, names: Iterable[str]) -> dict[str, Any]:
    """Fields by name. A value that did not fit its field is among the leftovers instead."""
    return {name: getattr(received, name) for name in names}


_BOOKING_COLUMNS = set(xone.Booking.model_fields) & set(Booking.__table__.columns.keys())


# Built once: to build a statement costs more than to execute it.
_INSERT_BOOKING = insert(Booking.__table__).values(recorded_at=now())
_INSERT_POLICYHOLDER = insert(Policyholder.__table__)
_INSERT_POLICY = insert(Policy.__table__)
_INSERT_EARLIER = insert(EarlierBooking.__table__).values(confirmation_id=bindparam("row_id"), changed_at=now())
_of_row: Any = bindparam("row_id")
_REPLACE_BOOKING = update(Booking.__table__).where(Booking.__table__.c.confirmation_id == _of_row)
_DELETE_POLICIES = delete(Policy.__table__).where(Policy.__table__.c.confirmation_id == _of_row)
_DELETE_POLICYHOLDER = delete(Policyholder.__table__).where(Policyholder.__table__.c.confirmation_id == _of_row)

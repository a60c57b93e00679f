"""Encrypting all stored values with the first of DATA_KEYS again, while workers run.

Confirmations are processed in the order of their ids, in steps. Each step is a short transaction that locks its
confirmations. Every writer of an encrypted value locks its confirmation too, so no write is lost. A confirmation that
is locked is left for the end. A value that the first key opens is left as it is, so rekeying can be interrupted and run
again.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, Table, and_, bindparam, delete, func, or_, select, update
from sqlalchemy.orm import aliased

from models.exact_json import write_exact
from models.job import quote_ids
from models.same import as_uuid
from models.tables import Attempt, Booking, Confirmation, EarlierBooking, FurtherEmail
from tasks import email_index
from tasks.privacy.clear_columns import remove_misfits
from tasks.privacy.sealed_columns import SEALED, id_in, place_of
from worker.errors import DecryptionError
from worker.outages import may_blame_item
from worker.storage.database import StatementBatch, locked
from worker.storage.encryption import Encryption

STEP = 100  # confirmations in one transaction
MAX_STEP_BYTES = 16 * 1024 * 1024  # of their kept answers and earlier bookings


@dataclass
class Rekeyed:
    """What was done: how many confirmations and encrypted values were looked at, and what happened to them."""

    confirmations: int = 0
    values: int = 0
    resealed: int = 0
    indexed: int = 0  # confirmations whose hashes of e-mails have changed
    unreadable: list[tuple[UUID, str]] = field(default_factory=list)  # confirmation, and the value's place_of or why

    def __add__(self, other: "Rekeyed") -> "Rekeyed":
        return Rekeyed(
            self.confirmations + other.confirmations,
            self.values + other.values,
            self.resealed + other.resealed,
            self.indexed + other.indexed,
            self.unreadable + other.unreadable,
        )


def count(connection: Connection) -> int:
    """How many confirmations are stored."""
    return connection.execute(select(func.count()).select_from(Confirmation)).scalar_one()


def rekey(engine: Engine, encryption: Encryption, step: int = STEP) -> Iterator[Rekeyed]:
    """Encrypts everything again, and yields what each step has done. No transaction is open between steps.

    step: confirmations in a step.
    """
    after, in_use = UUID(int=0), list[UUID]()
    while True:
        with engine.connect() as connection:
            page = select(Confirmation.id, _KEPT_BYTES).where(Confirmation.id > after).order_by(Confirmation.id)
            rows = connection.execute(page.limit(step)).all()
        kept = accumulate(size for _, size in rows)
        ids = [id_ for (id_, _), size in zip(rows, kept, strict=True) if size <= MAX_STEP_BYTES or id_ == rows[0][0]]
        if not ids:
            break
        done, free = _rekey_halving(engine, encryption, ids, skip_locked=True)
        yield done
        after = ids[-1]
        in_use += [id_ for id_ in ids if id_ not in free]
    for id_ in in_use:  # one by one: a transaction that holds no other lock can wait without a deadlock
        yield _rekey_halving(engine, encryption, [id_], skip_locked=False)[0]


def _bytes_in(column: Any) -> Any:
    is_theirs = column.table.c.confirmation_id == Confirmation.id
    return select(func.coalesce(func.sum(func.length(column)), 0)).where(is_theirs).scalar_subquery()


_KEPT_BYTES = _bytes_in(Attempt.__table__.c.sealed_answer) + _bytes_in(EarlierBooking.__table__.c.sealed_booking)


def _rekey_halving(
    engine: Engine, encryption: Encryption, ids: Sequence[UUID], skip_locked: bool
) -> tuple[Rekeyed, set[UUID]]:
    """Encrypts confirmations again, in one transaction. Returns what was done, and which of them were not in use.

    Where one of them fails, halves them until it is found: it counts as unreadable and is left as it is.
    """
    try:
        with engine.begin() as connection:
            free = set(connection.execute(_locked_ids(ids, skip_locked)).scalars())
            return _rekey(connection, encryption, free), free
    except Exception as error:
        if not may_blame_item(error):
            raise
        if len(ids) == 1:
            return Rekeyed(confirmations=1, unreadable=[(ids[0], type(error).__name__)]), set(ids)
    middle = len(ids) // 2
    first, free_first = _rekey_halving(engine, encryption, ids[:middle], skip_locked)
    second, free_second = _rekey_halving(engine, encryption, ids[middle:], skip_locked)
    return first + second, free_first | free_second


def _locked_ids(ids: Sequence[UUID], skip_locked: bool = False) -> Any:
    return locked(select(Confirmation.id).where(Confirmation.id.in_(ids)), skip_locked)


def _rekey(connection: Connection, encryption: Encryption, ids: set[UUID]) -> Rekeyed:
    """Encrypts all values of confirmations again. A value that no key opens is reported and left as it is."""
    done = Rekeyed(confirmations=len(ids))
    if not ids:
        return done
    decrypted: dict[tuple[UUID, str], bytes] = {}
    for table, columns in SEALED.items():
        changed = []
        keys = list(table.primary_key.columns)
        is_sealed = or_(*(column.is_not(None) for column in columns))
        rows = connection.execute(select(*keys, id_in(table), *columns).where(id_in(table).in_(ids), is_sealed))
        for row in rows:
            id_ = row._mapping[id_in(table)]
            values = {column: row._mapping[column] for column in columns}
            for column in [column for column in columns if values[column] is not None]:
                place, sealed = place_of(column, row), bytes(values[column])
                done.values += 1
                try:
                    content = decrypted[id_, place] = encryption.decrypt(id_, place, sealed)
                except DecryptionError:
                    done.unreadable.append((id_, place))
                    continue
                if not encryption.is_current(sealed):
                    values[column] = encryption.encrypt(id_, place, content)
                    done.resealed += 1
            if any(values[column] is not row._mapping[column] for column in columns):
                changed.append(
                    {f"of_{key.name}": row._mapping[key] for key in keys}
                    | {f"new_{column.name}": value for column, value in values.items()}
                )
        _write(connection, table, changed)
    readable = ids - {id_ for id_, _ in done.unreadable}
    done.indexed = _index(connection, encryption, readable, decrypted)
    _complete(connection, ids, decrypted)
    _seal_misfits(connection, encryption, readable, decrypted)
    return done


def _seal_misfits(
    connection: Connection, encryption: Encryption, ids: set[UUID], decrypted: dict[tuple[UUID, str], bytes]
) -> None:
    """Encrypts what an earlier version stored in clear."""
    for id_, misfits in remove_misfits(connection, ids).items():
        rest = {**json.loads(decrypted.get((id_, "rest"), b"{}")), **misfits}
        sealed = encryption.encrypt_text(id_, "rest", write_exact(rest))
        connection.execute(update(Booking).where(Booking.confirmation_id == id_).values(sealed_rest=sealed))


def _complete(connection: Connection, ids: set[UUID], decrypted: dict[tuple[UUID, str], bytes]) -> None:
    """Fills the columns of migration 0005 that an earlier version has left empty, but for duplicates."""
    other, holder = aliased(Confirmation), aliased(Booking)
    incomplete = select(Confirmation.id, Confirmation.partner_id, Confirmation.offer_id).where(
        Confirmation.id.in_(ids), or_(Confirmation.offer_uuid.is_(None), Confirmation.quote_ids.is_(None))
    )
    for id_, partner, offer in connection.execute(incomplete).all():
        is_row, uuid, body = Confirmation.id == id_, as_uuid(offer), decrypted.get((id_, "body"))
        if uuid is not None:
            is_taken = select(other.id).where(other.partner_id == partner, other.offer_uuid == uuid).exists()
            connection.execute(update(Confirmation).where(is_row, ~is_taken).values(offer_uuid=uuid))
        if body is not None:
            connection.execute(update(Confirmation).where(is_row).values(quote_ids=json.dumps(quote_ids(body))))
    of_nobody = (
        select(Booking.confirmation_id, Booking.id, Confirmation.partner_id)
        .join(Confirmation, Confirmation.id == Booking.confirmation_id)
        .where(Booking.confirmation_id.in_(ids), Booking.partner_id.is_(None))
    )
    for id_, booking, partner in connection.execute(of_nobody).all():
        is_taken = select(holder.id).where(holder.partner_id == partner, holder.id == booking).exists()
        is_row = Booking.confirmation_id == id_
        connection.execute(update(Booking).where(is_row, ~is_taken).values(partner_id=partner))


def _write(connection: Connection, table: Table, changed: list[dict[str, Any]]) -> None:
    if changed:
        is_row = and_(*(key == bindparam(f"of_{key.name}") for key in table.primary_key.columns))
        values: dict[Any, Any] = {column: bindparam(f"new_{column.name}") for column in SEALED[table]}
        connection.execute(update(table).where(is_row).values(values), changed)


def _index(
    connection: Connection, encryption: Encryption, ids: set[UUID], decrypted: dict[tuple[UUID, str], bytes]
) -> int:
    """Stores the hashes of e-mails under the first key. Returns how many confirmations had other ones, or none."""
    stored: dict[UUID, list[bytes | None]] = {
        row.id: [row.email_hash]
        for row in connection.execute(select(Confirmation.id, Confirmation.email_hash).where(Confirmation.id.in_(ids)))
    }
    further = select(FurtherEmail.__table__).where(FurtherEmail.confirmation_id.in_(ids))
    for row in connection.execute(further):
        stored[row.confirmation_id].append(row.email_hash)
    number, batch = 0, StatementBatch(connection)
    for id_, hashes in stored.items():
        sent, returned = decrypted.get((id_, "body")), decrypted.get((id_, "person"))
        of_job = email_index.of_request(encryption, sent) if sent is not None else []
        of_holder = email_index.of_person(encryption, json.loads(returned).get("email")) if returned is not None else []
        first = of_job[0] if of_job else None
        others = {*of_job, *of_holder} - {first}
        if [first, others] != [hashes[0], set(hashes[1:])]:
            connection.execute(update(Confirmation).where(Confirmation.id == id_).values(email_hash=first))
            connection.execute(delete(FurtherEmail).where(FurtherEmail.confirmation_id == id_))
            email_index.add(batch, id_, others)
            number += 1
    batch.flush()
    return number

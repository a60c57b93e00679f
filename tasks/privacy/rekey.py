"""What is stored, sealed with the first of DATA_KEYS again, while workers go on.

In steps by the order of ids, each a short transaction that holds its confirmations: whoever writes a sealed value holds
its confirmation, so nothing is written over. One that is in use is left for the end. A value that is under the first
key is left as it is: who is interrupted and comes again does nothing twice.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, Table, and_, bindparam, delete, func, or_, select, update

from models.tables import Confirmation, FurtherEmail
from tasks import email_index
from tasks.privacy.sealed_columns import SEALED, id_in, place_of
from worker.errors import DecryptionError
from worker.storage.database import StatementBatch, locked
from worker.storage.encryption import Encryption

STEP = 100  # confirmations in one transaction


@dataclass
class Rekeyed:
    """What was done: confirmations and sealed values that were looked at, and what came of them."""

    confirmations: int = 0
    values: int = 0
    resealed: int = 0
    indexed: int = 0  # confirmations whose hashes of e-mails were made anew
    unreadable: list[tuple[UUID, str]] = field(default_factory=list)  # confirmation, and name of the value

    def __add__(self, other: "Rekeyed") -> "Rekeyed":
        return Rekeyed(
            self.confirmations + other.confirmations,
            self.values + other.values,
            self.resealed + other.resealed,
            self.indexed + other.indexed,
            self.unreadable + other.unreadable,
        )


def count(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(Confirmation)).scalar_one()


def rekey(engine: Engine, encryption: Encryption, step: int = STEP) -> Iterator[Rekeyed]:
    """Does all that is stored, and gives what each step has done. No transaction is open between two of them."""
    after, in_use = UUID(int=0), list[UUID]()
    while True:
        with engine.begin() as connection:
            page = select(Confirmation.id).where(Confirmation.id > after).order_by(Confirmation.id).limit(step)
            ids = connection.execute(page).scalars().all()
            free = set(connection.execute(_held(ids, skip_locked=True)).scalars())
            done = _rekey(connection, encryption, free)
        if not ids:
            break
        yield done
        after = ids[-1]
        in_use += [one for one in ids if one not in free]
    for one in in_use:  # one by one: who holds nothing else can wait for it
        with engine.begin() as connection:
            done = _rekey(connection, encryption, set(connection.execute(_held([one])).scalars()))
        yield done


def _held(ids: Sequence[UUID], skip_locked: bool = False) -> Any:
    return locked(select(Confirmation.id).where(Confirmation.id.in_(ids)), skip_locked)


def _rekey(connection: Connection, encryption: Encryption, ids: set[UUID]) -> Rekeyed:
    """All values of these confirmations. What no key opens is told, and left as it is."""
    done = Rekeyed(confirmations=len(ids))
    if not ids:
        return done
    opened: dict[tuple[UUID, str], bytes] = {}
    for table, columns in SEALED.items():
        changed = []
        keys = list(table.primary_key.columns)
        is_sealed = or_(*(column.is_not(None) for column in columns))
        rows = connection.execute(select(*keys, id_in(table), *columns).where(id_in(table).in_(ids), is_sealed))
        for row in rows:
            its_id = row._mapping[id_in(table)]
            values = {column: row._mapping[column] for column in columns}
            for column in [column for column in columns if values[column] is not None]:
                place, sealed = place_of(column, row), bytes(values[column])
                done.values += 1
                try:
                    content = opened[its_id, place] = encryption.decrypt(its_id, place, sealed)
                except DecryptionError:
                    done.unreadable.append((its_id, place))
                    continue
                if not encryption.is_current(sealed):
                    values[column] = encryption.encrypt(its_id, place, content)
                    done.resealed += 1
            if any(values[column] is not row._mapping[column] for column in columns):
                changed.append(
                    {f"of_{key.name}": row._mapping[key] for key in keys}
                    | {f"new_{column.name}": value for column, value in values.items()}
                )
        _write(connection, table, changed)
    done.indexed = _index(connection, encryption, ids - {one for one, _ in done.unreadable}, opened)
    return done


def _write(connection: Connection, table: Table, changed: list[dict[str, Any]]) -> None:
    if changed:
        its_row = and_(*(key == bindparam(f"of_{key.name}") for key in table.primary_key.columns))
        values: dict[Any, Any] = {column: bindparam(f"new_{column.name}") for column in SEALED[table]}
        connection.execute(update(table).where(its_row).values(values), changed)


def _index(
    connection: Connection, encryption: Encryption, ids: set[UUID], opened: dict[tuple[UUID, str], bytes]
) -> int:
    """The hashes of e-mails under the first key, also where there were none yet. How many confirmations had others."""
    stand: dict[UUID, list[bytes | None]] = {
        row.id: [row.email_hash]
        for row in connection.execute(select(Confirmation.id, Confirmation.email_hash).where(Confirmation.id.in_(ids)))
    }
    further = select(FurtherEmail.__table__).where(FurtherEmail.confirmation_id.in_(ids))
    for row in connection.execute(further):
        stand[row.confirmation_id].append(row.email_hash)
    number, batch = 0, StatementBatch(connection)
    for its_id, hashes in stand.items():
        sent, returned = opened.get((its_id, "body")), opened.get((its_id, "person"))
        of_job = email_index.of_request(encryption, sent) if sent is not None else []
        of_holder = email_index.of_person(encryption, json.loads(returned).get("email")) if returned is not None else []
        first = of_job[0] if of_job else None
        others = {*of_job, *of_holder} - {first}
        if [first, others] != [hashes[0], set(hashes[1:])]:
            connection.execute(update(Confirmation).where(Confirmation.id == its_id).values(email_hash=first))
            connection.execute(delete(FurtherEmail).where(FurtherEmail.confirmation_id == its_id))
            email_index.add(batch, its_id, others)
            number += 1
    batch.flush()
    return number

"""Inserts rows into the database."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Engine, insert

from models.states import BatchState, State
from models.tables import Confirmation
from tests.support.system import job
from worker.storage import database
from worker.storage.database import now, now_plus
from worker.storage.encryption import Encryption


def insert_confirmation(engine: Engine, **values: Any) -> UUID:
    """Inserts a confirmation that has these values, and is confirmed otherwise. Returns its id."""
    id_ = values.get("id", uuid4())
    defaults: dict[str, Any] = {
        "id": id_,
        "partner_id": "P-100",
        "offer_id": str(id_),
        "echo": {},
        "idempotency_key": uuid4(),
        "state": State.CONFIRMED,
        "queued_at": now(),
        "created_at": now(),
        "updated_at": now(),
    }
    with engine.begin() as connection:
        connection.execute(insert(Confirmation).values(**{**defaults, **values}))
    return UUID(str(id_))


def fail(url: str, keys: str, offers: Iterable[str], code: str = "http-422", age: float = 0.0, **values: Any) -> None:
    """Makes confirmations that failed ``age`` seconds ago."""
    encryption, engine = Encryption(keys.split(",")), database.connect(url)
    body = json.dumps({name: job("any")[name] for name in ("quotes", "policyholder")}).encode()
    rows = []
    for offer in offers:
        id_ = uuid4()
        rows.append(
            {
                "id": id_,
                "partner_id": "P-100",
                "offer_id": offer,
                "echo": {},
                "idempotency_key": uuid4(),
                "sealed_body": encryption.encrypt(id_, "body", body),
                "state": State.FAILED,
                "attempts": 0,
                "error_code": code,
                "error_detail": f"it was {code}",
                **values,
            }
        )
    with engine.begin() as connection:
        times = {"queued_at": now(), "created_at": now(), "updated_at": now_plus(-age)}
        connection.execute(insert(Confirmation).values(**times), rows)
    engine.dispose()


def batch_row(state: BatchState, total: int) -> dict[str, Any]:
    then = datetime.now(UTC)
    common = {"by": "me", "include_needs_review": False, "fed_until": then, "created_at": then}
    return {"state": state, "total": total, **common}

"""The Scheduler serves every partner that has something due, however much another has."""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, insert, select

from models.tables import Confirmation
from worker.runtime import Runtime
from worker.services.scheduler import _TAKE_LIVE, _TAKE_OF_BATCHES, _find_partners, _take_due
from worker.storage.database import now, now_plus

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def make_due(connection: Connection, partner: str, number: int, seconds: float, batch_id: int | None = None) -> None:
    """Confirmations of a partner that are due for so many seconds."""
    values = {"echo": {}, "state": "retrying", "attempts": 1, "attempts_used": 1, "crashes": 0, "read_backs": 0,
              "answer_unknown": False, "sequence": 0, "partner_id": partner, "batch_id": batch_id}  # fmt: skip
    times = {"queued_at": now(), "created_at": now(), "updated_at": now(), "due_at": now_plus(-seconds)}
    rows = [
        {**values, "id": uuid4(), "idempotency_key": uuid4(), "offer_id": f"{partner}-{batch_id}-{at}"}
        for at in range(number)
    ]
    connection.execute(insert(Confirmation).values(**times), rows)


def taken(connection: Connection, ids: Sequence[UUID]) -> Counter[str]:
    query = select(Confirmation.partner_id).where(Confirmation.id.in_(ids))
    return Counter(connection.execute(query).scalars())


@pytest.mark.parametrize(("batch_id", "statement"), [(None, _TAKE_LIVE), (1, _TAKE_OF_BATCHES)])
def test_five_of_one_partner_do_not_wait_behind_thousands_of_another(
    runtime: Runtime, batch_id: int | None, statement: object
) -> None:
    with runtime.engine.begin() as connection:
        make_due(connection, "big", 12_000, 600.0, batch_id)
        make_due(connection, "small", 5, 1.0, batch_id)
        make_due(connection, "other", 1, 0.5, batch_id)
        make_due(connection, "paused", 5, 700.0, batch_id)
        make_due(connection, "later", 5, -600.0, batch_id)
    with runtime.engine.begin() as connection:
        partners = _find_partners(connection, LONG_AGO)
        partners.remove("paused")
        started = time.monotonic()
        first = _take_due(connection, statement, 100, LONG_AGO, partners)
        took = time.monotonic() - started
        assert taken(connection, first) == {"big": 94, "small": 5, "other": 1}
        assert taken(connection, _take_due(connection, statement, 100, LONG_AGO, partners)) == {"big": 100}
    assert took < 5.0


def test_of_many_partners_each_gets_its_turn(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        for number in range(40):
            make_due(connection, f"P-{number}", 5, 600.0 - number)
        make_due(connection, "big", 500, 900.0)
    with runtime.engine.begin() as connection:
        partners = _find_partners(connection, LONG_AGO)
        assert taken(connection, _take_due(connection, _TAKE_LIVE, 41, LONG_AGO, partners)) == {
            "big": 1, **{f"P-{number}": 1 for number in range(40)}
        }  # fmt: skip


def test_nothing_due_is_nothing_taken(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        assert _take_due(connection, _TAKE_LIVE, 10, LONG_AGO, _find_partners(connection, LONG_AGO)) == []

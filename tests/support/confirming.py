"""Accepts and confirms jobs in this process, and reads rows of the database."""

import json
from typing import Any

from sqlalchemy import Row, select

from tasks import confirm
from tasks.accept import Delivery
from tasks.lease import Lease
from tests.support.system import job
from worker.runtime import Runtime


def body_of(offer_id: str, **changes: Any) -> bytes:
    return json.dumps(job(offer_id, **changes)).encode()


def accepted(runtime: Runtime, offer_id: str = "offer-1", **changes: Any) -> Lease:
    lease = confirm.accept_job(body_of(offer_id, **changes), Delivery(), runtime)
    assert lease is not None
    return lease


def run(runtime: Runtime, offer_id: str = "offer-1", **changes: Any) -> None:
    confirm.attempt(accepted(runtime, offer_id, **changes), runtime)


def rows(runtime: Runtime, table: Any) -> list[Row[Any]]:
    with runtime.engine.connect() as connection:
        return list(connection.execute(select(table.__table__).order_by(*table.__table__.primary_key)))


def only(runtime: Runtime, table: Any) -> Row[Any]:
    (row,) = rows(runtime, table)
    return row

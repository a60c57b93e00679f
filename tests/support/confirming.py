"""A job accepted and confirmed in this process, and what the database then holds."""

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


def accepted(process: Runtime, offer_id: str = "offer-1", **changes: Any) -> Lease:
    lease = confirm.accept_job(body_of(offer_id, **changes), Delivery(), process)
    assert lease is not None
    return lease


def run(process: Runtime, offer_id: str = "offer-1", **changes: Any) -> None:
    confirm.attempt(accepted(process, offer_id, **changes), process)


def rows(process: Runtime, table: Any) -> list[Row[Any]]:
    with process.engine.connect() as connection:
        return list(connection.execute(select(table.__table__).order_by(*table.__table__.primary_key)))


def only(process: Runtime, table: Any) -> Row[Any]:
    (row,) = rows(process, table)
    return row

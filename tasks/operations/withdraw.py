"""Withdrawing an offer: its order was cancelled, so what is not booked yet is not tried any more.

What is surely not booked ends at once, as failed with the code ``withdrawn``. Where XONE may have booked, workers only
read the list of bookings from now on: see tasks/confirm.py. Where a worker has a lease, what comes of its call decides:
see tasks/record.py. What is booked stays.

An offer whose job has not come yet gets a row that holds no content, and no event. The first job that comes for it,
with whatever content, fills the row and ends as withdrawn, with an event. A later one with other content revives it, as
it does any failed confirmation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, case, select, update
from uuid_utils.compat import uuid4, uuid7

from models.same import as_uuid
from models.states import WAITING, State
from models.tables import Booking, Confirmation, is_offer
from tasks.operations.audit import audit
from tasks.operations.batches import skip_everywhere
from tasks.order_end import end_order, is_surely_unbooked
from tasks.record import lock_for_decision
from worker.errors import WITHDRAWN
from worker.storage.database import insert_if_absent, now

AWAITS_JOB = "withdrawn before its job came"


class Result(StrEnum):
    """What has become of an offer that was withdrawn.

    withdrawn     it has ended as failed
    calling       a worker has it, and may be calling XONE: what comes of that decides
    settling      XONE may have booked: the list of bookings decides
    needs_review  whether XONE has booked can't be established without a person
    booked        it was booked before, and stays so
    """

    WITHDRAWN = "withdrawn"
    CALLING = "calling"
    SETTLING = "settling"
    NEEDS_REVIEW = "needs_review"
    BOOKED = "booked"


@dataclass(frozen=True)
class Withdrawal:
    """An offer that was withdrawn, as JSON shows it. state: of its confirmation; booking_id: None if there is none."""

    partner_id: str
    offer_id: str
    result: Result
    state: State
    booking_id: str | None


def withdraw(connection: Connection, partner_id: str, offer_id: str, by: str, reason: str) -> UUID:
    """Withdraws an offer. Returns the id of its confirmation. Repeating it is harmless.

    by: ``user@host``; reason: for the audit.
    """
    confirmation_id = _find(connection, partner_id, offer_id) or _keep(connection, partner_id, offer_id)
    skip_everywhere(connection, confirmation_id)
    query = lock_for_decision().add_columns(is_surely_unbooked().label("is_unbooked"))
    row = connection.execute(query.where(Confirmation.id == confirmation_id)).one()
    _withdraw(connection, row)
    facts = {"partner": row.partner_id, "offer": row.offer_id, "state": row.state}
    audit(connection, "withdraw", by, reason, 1, **facts)
    return confirmation_id


def _withdraw(connection: Connection, row: Row[Any]) -> None:
    is_this = update(Confirmation).where(Confirmation.id == row.id)
    is_withdrawn = is_this.values(withdrawn_at=now())
    match State(row.state):
        case State.FAILED if row.error_code == WITHDRAWN:
            pass
        case State.FAILED:
            connection.execute(is_withdrawn)
            end_order(connection, [row], WITHDRAWN)
            connection.execute(is_this.values(purged_at=row.purged_at))  # nothing personal has come
        case State.QUEUED | State.RETRYING if row.is_unbooked:
            connection.execute(is_withdrawn)
            end_order(connection, [row], WITHDRAWN)
        case State.QUEUED | State.RETRYING if row.withdrawn_at is None:  # else the list is given its time
            connection.execute(is_withdrawn.values(due_at=now(), dispatched_until=None, read_backs=0))
        case State.NEEDS_REVIEW:
            connection.execute(is_withdrawn.values(_TO_LOOK_AGAIN))
        case State.CONFIRMING:
            connection.execute(is_withdrawn)
        case _:
            pass  # booked, or looked for already


def results(connection: Connection, confirmation_ids: Sequence[UUID]) -> dict[UUID, Withdrawal]:
    """What has become of confirmations so far, by their ids. Leaves out those that are deleted by now."""
    query = (
        select(Confirmation.__table__, Booking.id.label("booking_id"))
        .outerjoin(Booking, Booking.confirmation_id == Confirmation.id)
        .where(Confirmation.id.in_(confirmation_ids))
    )
    return {
        row.id: Withdrawal(row.partner_id, row.offer_id, _result(State(row.state)), State(row.state), row.booking_id)
        for row in connection.execute(query)
    }


def _result(state: State) -> Result:
    if state in WAITING:
        return Result.SETTLING
    return _RESULTS.get(state, Result.BOOKED)


def _find(connection: Connection, partner_id: str, offer_id: str) -> UUID | None:
    found: UUID | None = connection.execute(
        select(Confirmation.id)
        .where(Confirmation.partner_id == partner_id, is_offer(offer_id))
        .order_by(case((Confirmation.offer_id == offer_id, 0), else_=1), Confirmation.created_at)
        .limit(1)
    ).scalar()
    return found


def _keep(connection: Connection, partner_id: str, offer_id: str) -> UUID:
    """Stores that an offer without a job is withdrawn, unless its job comes at this moment."""
    row = {
        "id": uuid7(),
        "partner_id": partner_id,
        "offer_id": offer_id,
        "offer_uuid": as_uuid(offer_id),
        "echo": {},
        "idempotency_key": uuid4(),
        "state": State.FAILED,
        "error_code": WITHDRAWN,
        "error_detail": AWAITS_JOB,
    }
    at = {name: now() for name in ("withdrawn_at", "queued_at", "created_at", "updated_at")}
    connection.execute(insert_if_absent(connection.dialect.name, Confirmation.__table__).values(**row, **at))
    found = _find(connection, partner_id, offer_id)
    assert found is not None
    return found


_RESULTS = {
    State.FAILED: Result.WITHDRAWN,
    State.CONFIRMING: Result.CALLING,
    State.NEEDS_REVIEW: Result.NEEDS_REVIEW,
}
_TO_LOOK_AGAIN = {
    "state": State.QUEUED,
    "due_at": now(),
    "answer_unknown": True,
    "attempts_used": 0,
    "read_backs": 0,
    "crashes": 0,
    "queued_at": now(),
    "updated_at": now(),
}

"""An order that ends before its offer is booked: its confirm_by passes, or a person withdraws it.

A confirmation that no worker has leased, and that XONE has surely not booked, ends at once, whether calls are suspended
or not. For any other, whoever holds the next lease finds out (tasks/confirm.py), and only the list of bookings is read.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, func, not_

from models.states import WAITING, Outcome, State
from models.tables import Confirmation
from tasks.decide import Decision
from tasks.halving import in_halves
from tasks.record import apply_decision, lock_for_decision
from worker.errors import EXPIRED, WITHDRAWN, OrderEnded
from worker.storage.database import StatementBatch, in_literally, locked, now_once

MAX_EXPIRED = 200  # confirmations in one transaction


def is_surely_unbooked() -> ColumnElement[bool]:
    """A condition that no worker has leased a confirmation, and that XONE has not booked it."""
    return and_(
        in_literally(Confirmation.state, WAITING),
        not_(Confirmation.answer_unknown),
        func.coalesce(Confirmation.error_code, "") != "already-booked",
    )


def end_order(connection: Connection, rows: Sequence[Row[Any]], code: str) -> None:
    """Ends confirmations as failed. rows: of ``lock_for_decision``; code: of ORDER_ENDED."""
    decision = Decision(State.FAILED, Outcome.NOT_BOOKED, error=OrderEnded(code), uses_attempt=False)
    batch = StatementBatch(connection)
    for row in rows:
        apply_decision(batch, row, decision, row.attempts, with_links=False)
    batch.flush()


def end_withdrawn(connection: Connection, confirmation_id: UUID) -> None:
    """Ends a confirmation that was withdrawn while a worker had leased it, and has just been put back."""
    query = lock_for_decision().where(Confirmation.id == confirmation_id, is_surely_unbooked())
    end_order(connection, connection.execute(query).all(), WITHDRAWN)


def expire(connection: Connection, failed: dict[UUID, Exception], limit: int = MAX_EXPIRED) -> int:
    """Ends confirmations whose confirm_by has passed, the oldest first. Returns their number. Skips locked ones.

    failed: those that could not be ended before, which are left out; those that can't be ended now are added.
    """
    query = _EXPIRED.where(Confirmation.id.not_in(list(failed))) if failed else _EXPIRED
    rows = connection.execute(query, {"limit": limit}).all()
    return in_halves(connection, rows, lambda part: end_order(connection, part, EXPIRED), failed)


# Built once: building a statement costs more than executing it.
_EXPIRED = locked(
    lock_for_decision()
    .where(Confirmation.confirm_by.is_not(None), Confirmation.confirm_by <= now_once(), is_surely_unbooked())
    .order_by(Confirmation.confirm_by)
    .limit(bindparam("limit")),
    skip_locked=True,
    of=Confirmation.__table__,
)

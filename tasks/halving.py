"""Work on many confirmations of which one may be at fault: the others are not held up by it."""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row

from worker.outages import may_blame_item


def in_halves(
    connection: Connection,
    rows: Sequence[Row[Any]],
    work: Callable[[Sequence[Row[Any]]], None],
    failed: dict[UUID, Exception],
) -> int:
    """Does ``work`` for confirmations, in a savepoint. Where one of them fails, halves them until it is found.

    rows: with the confirmation's ``id``. failed: gets those that failed. Returns for how many it was done.
    """
    if not rows:
        return 0
    try:
        with connection.begin_nested():
            work(rows)
    except Exception as error:
        if not may_blame_item(error):
            raise
        if len(rows) == 1:
            failed[rows[0].id] = error
            return 0
        middle = len(rows) // 2
        return sum(in_halves(connection, half, work, failed) for half in (rows[:middle], rows[middle:]))
    return len(rows)

"""How far ahead the times of a confirmation can be. What is further ahead than that is not believed.

The database's clock may be set back, or a row may be changed by hand: without this, all would wait until the clock has
caught up.
"""

from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, or_, select, update

from models.states import State
from models.tables import Confirmation
from worker.storage.database import locked, now, now_once, now_plus, seconds_since

DISPATCH_LEASE = 30.0  # seconds after which a resume message without effect is sent again
MAX_LEASE = 900.0  # seconds: that of the largest XONE_TIMEOUT
MAX_DEFECT_DELAY = 21600.0  # seconds that a confirmation which can't be leased waits at most
SLACK = 1.0  # seconds by which two readings of one clock may differ
MAX_CLAMPED = 1000  # rows in one statement


def is_dispatched(row: Any = Confirmation) -> ColumnElement[bool]:
    """Whether a message that resumes a confirmation is under way. A mark further ahead than it can be is none.

    row: the confirmations, or an alias of them.
    """
    return and_(row.dispatched_until > now_once(), row.dispatched_until <= now_once(DISPATCH_LEASE + SLACK))


def clamp_times(connection: Connection, max_delay: float) -> int:
    """Brings due times back that are further ahead than they can be. Returns how many.

    The clock may have been set back: rows then were written at times still to come, and keep their distance to these.
    A lease never becomes shorter than it was given out for. max_delay: seconds that a retry waits at most.
    """
    parameters = {"max_delay": max(max_delay, MAX_LEASE, MAX_DEFECT_DELAY), "limit": MAX_CLAMPED}
    return len(connection.execute(_CLAMP, parameters).all())


# Built once: to build a statement costs more than to execute it.
_row = Confirmation.__table__.c
_ahead = seconds_since(_row.updated_at) < -SLACK
_distance = seconds_since(_row.updated_at) - seconds_since(_row.due_at)  # from the last change until it was to be due
_is_too_far = -seconds_since(_row.due_at) > bindparam("max_delay") + SLACK
_to_clamp = locked(
    select(_row.id).where(_row.due_at > now_once(), or_(_ahead, _is_too_far)).limit(bindparam("limit")),
    skip_locked=True,
).cte("to_clamp")
_CLAMP = (
    update(Confirmation.__table__)
    .where(_row.id.in_(select(_to_clamp.c.id)))
    .values(
        due_at=now_plus(
            case(
                (and_(_ahead, _distance > 0, _distance <= bindparam("max_delay")), _distance),
                (_row.state == State.CONFIRMING, MAX_LEASE),
                else_=0.0,
            )
        ),
        dispatched_until=None,
        updated_at=now(),
    )
    .returning(_row.id)
)

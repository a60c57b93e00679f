"""So many a second over all workers together: calls (XONE_RATE_LIMIT), or steps of a duty.

Turns are given out by a row of the database. Each moves the row's ``next_at`` on by 1/rate seconds; who took it goes at
the moment that it stood at. Turns further away than HORIZON are not given out: who asks for one comes again later, and
the confirmation of a call is put back.
"""

from sqlalchemy import Connection, update

from models.tables import RateLimit
from worker.storage.database import insert_if_absent, later_of, now, now_plus, seconds_since

MAX_WAIT = 5.0  # seconds


def reserve_slot(connection: Connection, rate: float, name: str = "xone") -> float | None:
    """Seconds to wait for the turn that was taken, or None where all within the horizon are. rate: a second."""
    step = 1.0 / rate
    take = (
        update(RateLimit)
        .where(RateLimit.name == name, RateLimit.next_at <= now_plus(MAX_WAIT))
        .values(next_at=later_of(RateLimit.next_at, step))
        .returning(seconds_since(RateLimit.next_at))
    )
    since_next = connection.execute(take).scalar_one_or_none()
    if since_next is None:
        connection.execute(
            insert_if_absent(connection.dialect.name, RateLimit, "name").values(name=name, next_at=now())
        )
        since_next = connection.execute(take).scalar_one_or_none()
    return None if since_next is None else max(-float(since_next) - step, 0.0)

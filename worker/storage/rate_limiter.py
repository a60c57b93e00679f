"""A rate limit over all workers together: for calls to XONE (XONE_RATE_LIMIT), or steps of a background service.

This is the Generic Cell Rate Algorithm (GCRA) of ITU-T Recommendation I.371, in its virtual scheduling form and without
bursts. ``next_at`` of the row is the theoretical arrival time: a slot is at this time, or now if that is later, and
moves it on by 1/rate seconds. Slots further away than MAX_WAIT are not given out: the caller tries again later, and the
confirmation of a call is put back. So ``next_at`` is never further ahead than that and one step. If it is, the clock
was set back (or the rate was raised), and the limit begins anew.
"""

from sqlalchemy import Connection, case, or_, update

from models.tables import RateLimit
from worker.storage.database import insert_if_absent, later_of, now, now_plus, seconds_since

MAX_WAIT = 5.0  # seconds to the furthest slot that is given out
SLACK = 1.0  # seconds


def reserve_slot(connection: Connection, rate: float, name: str = "xone", max_wait: float = MAX_WAIT) -> float | None:
    """Reserves a slot and returns the seconds to wait for it; None if all slots within ``max_wait`` are taken.

    rate: slots a second. name: of the limit, at most 32 characters; limits with different names are independent.
    max_wait: at most MAX_WAIT; who waits for less gets behind all others.
    """
    step = 1.0 / rate
    is_impossible = RateLimit.next_at > now_plus(MAX_WAIT + step + SLACK)
    reserve = (
        update(RateLimit)
        .where(RateLimit.name == name, or_(RateLimit.next_at <= now_plus(max_wait), is_impossible))
        .values(next_at=case((is_impossible, now_plus(step)), else_=later_of(RateLimit.next_at, step)))
        .returning(seconds_since(RateLimit.next_at))
    )
    since_next = connection.execute(reserve).scalar_one_or_none()
    if since_next is None:
        connection.execute(
            insert_if_absent(connection.dialect.name, RateLimit, "name").values(name=name, next_at=now())
        )
        since_next = connection.execute(reserve).scalar_one_or_none()
    return None if since_next is None else max(-float(since_next) - step, 0.0)

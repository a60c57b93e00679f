"""The Scheduler: sends what is due back to the workers. Safe in every replica; several may run side by side."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import ColumnElement, Connection, Select, bindparam, func, or_, select, update

from models.tables import Confirmation
from tasks.operations import batches
from worker.messaging.publisher import Message, Publisher
from worker.messaging.topology import RESUME, confirm_offer
from worker.observability import tracing
from worker.observability.sentry import CheckIns
from worker.runtime import Runtime
from worker.services.service import Service
from worker.storage.database import locked, now, now_plus
from worker.storage.pause_cache import ALL

log = structlog.get_logger(__name__)

LOOK_AT = 10_000  # of the confirmations that have been due for longest
IDLE, FEEDING = 0.5, 0.02  # seconds between turns
LATE = 0.003  # seconds that a turn may come late
DISPATCH_LEASE = 30.0  # seconds after which a resume message that nobody acted on is sent again


class Scheduler(Service):
    """Due are: retries whose time has come, and confirmations whose lease ran out because their worker died."""

    name = "scheduler"
    interval = IDLE

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime
        self._publisher = Publisher(runtime.broker_settings.url)
        self._most_in_flight = 2 * runtime.worker_settings.WORKER_CONCURRENCY
        self._most_of_batches = max(runtime.worker_settings.WORKER_CONCURRENCY // 2, 1)  # so that live jobs find room
        self._of_batches = float(self._most_of_batches)  # may be under way now
        self._check_ins = CheckIns(runtime.sentry_settings.SENTRY_CRON_MONITOR)

    def run_once(self) -> bool:
        """Dispatches what is due, and feeds batches in behind it. Nothing while calls to XONE pause."""
        self.interval = IDLE
        circuit_breaker = self._runtime.xone.circuit_breaker
        if circuit_breaker.wait() > 0:
            return False
        self._publisher.ensure_connection()  # a broker that is away leaves nothing marked as dispatched
        with self._runtime.engine.begin() as connection:
            paused = sorted(self._runtime.pauses.partners(connection))
            if ALL in paused:
                return False
            free = (1 if circuit_breaker.is_half_open else self._most_in_flight) - _dispatched(connection)
            due = _take_due(connection, _TAKE_LIVE, free, paused)
            of_batches = batches.under_way(connection)
            room = self._room() - of_batches.at_work
            retries = _take_due(connection, _TAKE_OF_BATCHES, min(free - len(due), room), paused)
            to_feed = [] if circuit_breaker.is_half_open else batches.running(connection)
        fed = self._feed(to_feed, min(room - len(retries), batches.MAX_OPEN - of_batches.open), paused)
        if due or retries or fed:
            sent = self._send([*due, *retries, *fed])
            log.debug("resumed", count=len(sent), of_batches=len(retries) + len(fed))
        return False

    def _room(self) -> int:
        """How many confirmations of batches may be under way: fewer while turns come late, so that live jobs do not."""
        wanted = self._of_batches * 0.9 if self.lag > LATE else self._of_batches + 0.05
        self._of_batches = min(max(wanted, 1.0), self._most_of_batches)
        return int(self._of_batches)

    def _send(self, dispatched: list[UUID]) -> set[UUID]:
        """Those that the broker has. The others are due again at once, and not only when their marks run out."""
        sent: set[UUID] = set()
        try:
            headers = self._traced(dispatched) if tracing.is_on() else {}
            sent = self._publisher.publish(
                Message(key, str(key).encode(), confirm_offer.name, RESUME, "text/plain", headers=headers.get(key, {}))
                for key in dispatched
            )
        finally:
            unsent = [key for key in dispatched if key not in sent]
            if unsent:
                with self._runtime.engine.begin() as connection:
                    connection.execute(
                        update(Confirmation).where(Confirmation.id.in_(unsent)).values(dispatched_until=None)
                    )
        return sent

    def _traced(self, dispatched: list[UUID]) -> dict[UUID, dict[str, Any]]:
        """The headers that let each go on in its trace."""
        query = select(Confirmation.id, Confirmation.traceparent).where(Confirmation.id.in_(dispatched))
        with self._runtime.engine.connect() as connection:
            return {key: {"traceparent": traceparent} for key, traceparent in connection.execute(query) if traceparent}

    def _feed(self, to_feed: list[int], room: int, paused: list[str]) -> list[UUID]:
        """The next items of the batches, the oldest first. Comes again soon where there is likely more."""
        fed: list[UUID] = []
        for batch_id in to_feed:
            if room > len(fed):
                with self._runtime.engine.begin() as connection:
                    fed += batches.feed(connection, batch_id, room - len(fed), paused, DISPATCH_LEASE)
        if fed or (to_feed and room <= 0):
            self.interval = FEEDING
        return fed

    def on_success(self) -> None:
        super().on_success()
        self._check_ins.on_success()

    def close(self) -> None:
        self._publisher.close()


def _dispatched(connection: Connection) -> int:
    """How many resume messages are on their way."""
    return connection.execute(_DISPATCHED).scalar_one()


def _take_due(connection: Connection, statement: Any, most: int, paused: Sequence[str]) -> list[UUID]:
    """Marks what is due as dispatched. statement: by _take, of which confirmations; paused: partners."""
    if most <= 0:
        return []
    return list(connection.execute(statement, {"most": most, "paused": paused}).scalars())


def _take(which: ColumnElement[bool]) -> Any:
    """Marks what has been due for longest, in turn over the partners: none waits for another's many."""
    is_due = (
        which,
        Confirmation.due_at <= now(),
        or_(Confirmation.dispatched_until.is_(None), Confirmation.dispatched_until <= now()),
        Confirmation.partner_id.not_in(bindparam("paused")),
    )
    chosen = Confirmation.id.in_(_in_turn(is_due).limit(bindparam("most")))
    free = locked(select(Confirmation.id).where(chosen, *is_due), skip_locked=True)
    return (
        update(Confirmation.__table__)
        .where(Confirmation.id.in_(select(free.cte("free").c.id)))
        .values(dispatched_until=now_plus(DISPATCH_LEASE))
        .returning(Confirmation.id)
    )


def _in_turn(is_due: tuple[ColumnElement[bool], ...]) -> Select[tuple[UUID]]:
    """The ids of what has been due for longest: the first of each partner, then the second of each, and so on."""
    oldest = (
        select(Confirmation.id, Confirmation.partner_id, Confirmation.due_at)
        .where(*is_due)
        .order_by(Confirmation.due_at)
        .limit(LOOK_AT)
        .subquery()
    )
    turn = func.row_number().over(partition_by=oldest.c.partner_id, order_by=oldest.c.due_at)
    ranked = select(oldest.c.id, oldest.c.due_at, turn.label("turn")).subquery()
    return select(ranked.c.id).order_by(ranked.c.turn, ranked.c.due_at)


# Built once: to build a statement costs more than to execute it.
_DISPATCHED = select(func.count()).select_from(Confirmation).where(Confirmation.dispatched_until > now())
_TAKE_LIVE, _TAKE_OF_BATCHES = _take(Confirmation.batch_id.is_(None)), _take(Confirmation.batch_id.is_not(None))

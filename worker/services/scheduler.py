"""The Scheduler: dispatches due confirmations to the workers. Several schedulers may run side by side."""

import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Executable,
    Select,
    and_,
    bindparam,
    func,
    not_,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import aliased

from models.tables import Confirmation
from models.types import Time
from tasks.due_times import DISPATCH_LEASE, MAX_CLAMPED, clamp_times, is_dispatched
from tasks.operations import batches
from worker.backoff import exponential
from worker.messaging.publisher import Message, NotTaken, Publisher
from worker.messaging.topology import RESUME, confirm_offer
from worker.observability import metrics, tracing
from worker.observability.sentry import CheckIns, report
from worker.outages import may_blame_item
from worker.runtime import Runtime
from worker.services.service import Service
from worker.storage.database import locked, now, now_once, now_plus, text_rows
from worker.storage.low_water_mark import ADVANCE_EVERY, LowWaterMark
from worker.storage.pause_cache import ALL
from worker.xone.answers import MAX_RETRY_AFTER

log = structlog.get_logger(__name__)

MAX_RANKED = 10_000  # confirmations, those of each partner that are due for longest, among which partners take turns
IDLE, FEEDING = 0.5, 0.02  # seconds between runs
MAX_LAG = 0.003  # seconds; a run that begins later shows an overloaded process
CLAMP_EVERY = 15.0  # seconds
LOOK_FOR_OLD_EVERY = 10.0  # seconds
INITIAL_BATCH_BACKOFF, MAX_BATCH_BACKOFF = 1.0, 300.0  # seconds until a batch that could not be fed is tried again


class _Failure(NamedTuple):
    """A batch that could not be fed. number: of failures in a row; retry_at: as of time.monotonic()."""

    number: int
    retry_at: float


class Scheduler(Service):
    """Dispatches retries that are due, confirmations whose worker died (their lease has expired), and items of batches.

    To dispatch is to publish a resume message, and to mark the confirmation for DISPATCH_LEASE.
    """

    name = "scheduler"
    starts_work = True
    interval = IDLE

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime
        self._publisher = Publisher(runtime.broker_settings.url, declares=True)
        self._max_in_flight = 2 * runtime.worker_settings.WORKER_CONCURRENCY
        self._max_batch_items = max(runtime.worker_settings.WORKER_CONCURRENCY // 2, 1)  # the rest is for live jobs
        self._allowed_batch_items = float(self._max_batch_items)  # in flight now; adapts to the load
        self._clamped_at = self._looked_for_old_at = float("-inf")
        self._mark = LowWaterMark(_OLDEST_DUE)
        self._paused: list[str] = []  # partners that the mark leaves out
        self._partners: list[str] = []  # all with open confirmations
        self._found_at = float("-inf")  # when they were looked for
        self._failing: dict[int, _Failure] = {}  # batches that could not be fed
        self._check_ins = CheckIns(runtime.sentry_settings.SENTRY_CRON_MONITOR)

    def run_once(self) -> bool:
        """Dispatches due confirmations, then items of batches. While calls are suspended, only what is too old."""
        self.interval = IDLE
        calls = self._runtime.xone.calls
        if calls.wait() > 0:
            self._dispatch_too_old()
            return False
        self._clamp_times()
        self._publisher.ensure_connection()  # before anything is marked as dispatched
        with self._runtime.engine.begin() as connection:
            paused = sorted(self._runtime.pauses.partners(connection))
            if ALL in paused:
                return False
            since = self._due_since(connection, paused)
            free = (1 if calls.is_half_open else self._max_in_flight) - _dispatched(connection)
            partners = [partner for partner in self._known_partners(connection, since) if partner not in paused]
            due = _take_due(connection, _TAKE_LIVE, free, since, partners)
            batch_items = batches.under_way(connection)
            room = self._room() - batch_items.at_work
            retries = _take_due(connection, _TAKE_OF_BATCHES, min(free - len(due), room), since, partners)
            to_feed = [] if calls.is_half_open else batches.running(connection)
        fed: list[UUID] = []
        try:
            self._feed(fed, to_feed, min(room - len(retries), batches.MAX_OPEN - batch_items.open), paused)
        finally:  # what is marked as dispatched is sent, whatever becomes of a batch
            if due or retries or fed:
                sent = self._send([*due, *retries, *fed])
                log.debug("resumed", count=len(sent), of_batches=len(retries) + len(fed))
        return False

    def _dispatch_too_old(self) -> None:
        """Dispatches what is not put back any more, so that it ends though no call may be made."""
        if time.monotonic() - self._looked_for_old_at < LOOK_FOR_OLD_EVERY:
            return
        self._publisher.ensure_connection()
        max_age = self._runtime.retry_settings.RETRY_MAX_AGE
        with self._runtime.engine.begin() as connection:
            paused = sorted(self._runtime.pauses.partners(connection))
            free = self._max_in_flight - _dispatched(connection)
            if ALL in paused or free <= 0:
                return
            due = list(
                connection.execute(_TAKE_TOO_OLD, {"limit": free, "max_age": -max_age, "paused": paused}).scalars()
            )
        if due:
            self._send(due)
        if len(due) < free:
            self._looked_for_old_at = time.monotonic()

    def _due_since(self, connection: Connection, paused: list[str]) -> datetime:
        """When the confirmation that is due for longest was due, or earlier; without those of paused partners."""
        if paused != self._paused:
            self._mark.forget()
            self._paused = paused
        return self._mark.read(connection, paused=paused)

    def _known_partners(self, connection: Connection, since: datetime) -> list[str]:
        """All partners with open confirmations: a look at each costs more than a run that finds nothing due."""
        if time.monotonic() - self._found_at >= ADVANCE_EVERY:
            self._partners = _find_partners(connection, since)
            self._found_at = time.monotonic()
        return self._partners

    def _clamp_times(self) -> None:
        """Corrects due times that are further ahead than they can be: see clamp_times."""
        if time.monotonic() - self._clamped_at < CLAMP_EVERY:
            return
        max_delay = self._runtime.retry_settings.RETRY_MAX_DELAY + MAX_RETRY_AFTER
        with self._runtime.engine.begin() as connection:
            count = clamp_times(connection, max_delay)
        if count:
            log.warning("times_ahead", count=count)
            self._mark.forget()  # they are due now, by a clock that was set back
        if count < MAX_CLAMPED:
            self._clamped_at = time.monotonic()

    def _room(self) -> int:
        """How many confirmations of batches may be in flight. Fewer while runs lag, so that live jobs stay fast.

        Additive increase, multiplicative decrease, as TCP's congestion control.
        """
        wanted = self._allowed_batch_items * 0.9 if self.lag > MAX_LAG else self._allowed_batch_items + 0.05
        self._allowed_batch_items = min(max(wanted, 1.0), self._max_batch_items)
        return int(self._allowed_batch_items)

    def _send(self, dispatched: list[UUID]) -> set[UUID]:
        """Publishes resume messages. Returns those that the broker has; the others lose their mark and stay due.

        Raises NotTaken where the broker refuses some, so that the Scheduler pauses and its part is not well.
        """
        sent: set[UUID] = set()
        try:
            headers = self._trace_headers(dispatched) if tracing.is_on() else {}
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
        if unsent:
            metrics.resumes_refused(len(unsent))
            raise NotTaken(self._publisher.refused[unsent[0]])
        return sent

    def _trace_headers(self, dispatched: list[UUID]) -> dict[UUID, dict[str, Any]]:
        """The headers that continue the trace of each confirmation."""
        query = select(Confirmation.id, Confirmation.traceparent).where(Confirmation.id.in_(dispatched))
        with self._runtime.engine.connect() as connection:
            return {key: {"traceparent": traceparent} for key, traceparent in connection.execute(query) if traceparent}

    def _feed(self, fed: list[UUID], to_feed: list[int], room: int, paused: list[str]) -> None:
        """Adds the next items of batches, the oldest batch first. Shortens the interval where there may be more.

        A batch that can't be fed is reported once and tried again with growing pauses. The others go on.
        """
        for batch_id in to_feed:
            failure = self._failing.get(batch_id)
            if room <= len(fed) or (failure is not None and time.monotonic() < failure.retry_at):
                continue
            try:
                with self._runtime.engine.begin() as connection:
                    fed += batches.feed(connection, batch_id, room - len(fed), paused, DISPATCH_LEASE)
                self._failing.pop(batch_id, None)
            except Exception as error:
                if not may_blame_item(error):
                    raise
                number = failure.number + 1 if failure is not None else 1
                if number == 1:
                    report(error, duty=self.name, batch=batch_id)
                wait = exponential(INITIAL_BATCH_BACKOFF, number - 1, MAX_BATCH_BACKOFF)
                self._failing[batch_id] = _Failure(number, time.monotonic() + wait)
        self._failing = {batch: failure for batch, failure in self._failing.items() if batch in to_feed}
        if fed or (to_feed and room <= 0):
            self.interval = FEEDING

    def on_success(self) -> None:
        super().on_success()
        self._check_ins.on_success()

    def close(self) -> None:
        self._publisher.close()


def _dispatched(connection: Connection) -> int:
    """How many confirmations are marked as dispatched."""
    return connection.execute(_DISPATCHED).scalar_one()


def _take_due(
    connection: Connection, statement: Any, limit: int, since: datetime, partners: Sequence[str]
) -> list[UUID]:
    """Marks what partners have had due since ``since`` as dispatched. statement: made by _take."""
    if limit <= 0 or not partners:
        return []
    last = max(min(limit, MAX_RANKED // len(partners)), 1) - 1  # of those of one partner that are ranked, from 0
    parameters = {"limit": limit, "last": last, "since": since, "partners": json.dumps(partners)}
    return list(connection.execute(statement, parameters).scalars())


def _find_partners(connection: Connection, since: datetime) -> list[str]:
    """Partners with something that is due since ``since``, or will be."""
    found = connection.execute(_FIND_PARTNERS, {"since": since}).scalars()
    return [partner for partner in found if partner is not None]


_SINCE = bindparam("since", type_=Time())


def _take(of_batches: bool) -> Any:
    """A statement that marks due confirmations. Partners take turns, so that none waits behind another's many."""
    chosen = Confirmation.id.in_(_round_robin(of_batches).limit(bindparam("limit")))
    # Once more, since another may have come first. No index serves this form: only what was chosen is looked at.
    still_due = func.coalesce(Confirmation.due_at, now_plus(1.0)) <= now()
    still_free = (chosen, still_due, *_is_free(Confirmation, of_batches))
    free = locked(select(Confirmation.id).where(*still_free), skip_locked=True)
    return (
        update(Confirmation.__table__)
        .where(Confirmation.id.in_(select(free.cte("free").c.id)))
        .values(dispatched_until=now_plus(DISPATCH_LEASE))
        .returning(Confirmation.id)
    )


def _is_free(row: Any, of_batches: bool) -> tuple[ColumnElement[bool], ...]:
    return (
        row.batch_id.is_not(None) if of_batches else row.batch_id.is_(None),
        or_(row.dispatched_until.is_(None), not_(is_dispatched(row))),
    )


def _is_of(partner_id: Any, row: Any, until: Any = None) -> tuple[ColumnElement[bool], ...]:
    """Of a partner, and due from ``since`` on; until: when it was due at the latest.

    The first conditions say it. With them alone the planner often reads the index of times, where all that a paused
    partner has due comes first. The others, which say the same, make the index of both columns look better.
    """
    pair = tuple_(row.partner_id, row.due_at)
    last = () if until is None else (pair <= tuple_(partner_id, until),)
    same = (row.partner_id.between(partner_id, partner_id), pair >= tuple_(partner_id, _SINCE), *last)
    return (row.partner_id == partner_id, row.due_at >= _SINCE, *same)


def _partners() -> CTE:
    """The partners with confirmations that have not ended: one step in an index for each, however many they have.

    The last row is null.
    """
    row = aliased(Confirmation)
    first = select(func.min(row.partner_id).label("partner_id")).where(row.due_at >= _SINCE)
    partners = first.cte("partners", recursive=True)
    following = aliased(Confirmation)
    after = select(func.min(following.partner_id)).where(
        following.due_at >= _SINCE, following.partner_id > partners.c.partner_id
    )
    return partners.union_all(select(after.scalar_subquery()).where(partners.c.partner_id.is_not(None)))


def _round_robin(of_batches: bool) -> Select[tuple[UUID]]:
    """Ids of what is due: the first of each partner, then the second of each, and so on."""
    partners, row, other = text_rows(bindparam("partners")), aliased(Confirmation), aliased(Confirmation)
    last = (  # when the last of this partner that is ranked was due; null if it has fewer
        select(other.due_at)
        .where(*_is_of(partners.c.value, other, now_once()), *_is_free(other, of_batches))
        .order_by(other.partner_id, other.due_at)
        .limit(1)
        .offset(bindparam("last"))
        .correlate(partners)
        .scalar_subquery()
    )
    latest = func.coalesce(last, now()).label("due_at")
    upto = select(partners.c.value.label("partner_id"), latest).cte("upto")
    upto = upto.prefix_with("MATERIALIZED")  # once for each partner, and not for each row
    rank = func.row_number().over(partition_by=row.partner_id, order_by=row.due_at)
    ranked = (
        select(row.id, row.due_at, rank.label("rank"))
        .join(upto, and_(*_is_of(upto.c.partner_id, row, upto.c.due_at)))
        .where(*_is_free(row, of_batches))
        .subquery()
    )
    return select(ranked.c.id).order_by(ranked.c.rank, ranked.c.due_at)


def _oldest_due() -> Executable:
    """For the low-water mark: the first of each partner that is not paused."""
    partners, row = _partners(), aliased(Confirmation)
    first = (
        select(row.due_at)
        .where(*_is_of(partners.c.partner_id, row))
        .order_by(row.partner_id, row.due_at)
        .limit(1)
        .correlate(partners)
        .scalar_subquery()
    )
    is_paused = partners.c.partner_id.in_(bindparam("paused", expanding=True))
    return select(func.min(first), now()).where(not_(is_paused))


# Built once: building a statement costs more than executing it.
_DISPATCHED = select(func.count()).select_from(Confirmation).where(is_dispatched())
_TAKE_LIVE, _TAKE_OF_BATCHES = _take(of_batches=False), _take(of_batches=True)
_not_dispatched = or_(Confirmation.dispatched_until.is_(None), not_(is_dispatched()))
_too_old = (
    select(Confirmation.id)
    .where(
        Confirmation.due_at <= now(),
        Confirmation.queued_at <= now_plus(bindparam("max_age")),
        Confirmation.partner_id.not_in(bindparam("paused")),
        _not_dispatched,
    )
    .order_by(Confirmation.due_at)
    .limit(bindparam("limit"))
)
_TAKE_TOO_OLD = (
    update(Confirmation.__table__)
    .where(Confirmation.id.in_(select(locked(_too_old, skip_locked=True).cte("too_old").c.id)))
    .values(dispatched_until=now_plus(DISPATCH_LEASE))
    .returning(Confirmation.id)
)
_FIND_PARTNERS = select(_partners().c.partner_id)
_OLDEST_DUE = _oldest_due()

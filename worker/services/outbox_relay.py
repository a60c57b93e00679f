"""The outbox relay: publishes the events of the outbox to ``booking-events``. Several relays may run side by side.

Delivery is at least once: an event is marked as published after the broker has confirmed it. The events of one
confirmation are published in the order of their sequence: an event is taken only when all earlier ones are marked.
"""

import logging
import time
from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Row, and_, bindparam, case, or_, select, update
from sqlalchemy.orm import aliased

from models.event import CONTENT_TYPE
from models.tables import Confirmation, OutboxEvent
from worker.backoff import exponential
from worker.messaging.publisher import CONFIRM_TIMEOUT, Message, Publisher
from worker.messaging.topology import booking_events
from worker.observability import metrics
from worker.runtime import Runtime
from worker.services.service import Service
from worker.storage.database import locked, now, now_plus, seconds_since
from worker.storage.low_water_mark import LOOK_BACK_EVERY, LowWaterMark

log = structlog.get_logger(__name__)

BATCH = 200  # events
LEASE = CONFIRM_TIMEOUT + 10.0  # seconds; longer than the confirms of a batch can take
FLUSH_TIMEOUT = 10.0  # seconds at the end of a worker: other workers may write events without end
# Seconds until an event that the broker refused is published again; doubled with each refusal. An election of a queue's
# leader takes half a second.
REFUSED_BACKOFF = 1.0
MAX_REFUSED_BACKOFF = 960.0
MAX_REMEMBERED = 10_000  # events whose refusals are counted
TOLD_AGAIN_AFTER = 60.0  # seconds; refusals for the same reason until then are only counted
SLACK = 1.0  # seconds by which two readings of one clock may differ


class OutboxRelay(Service):
    """A commit of an event in this process wakes it. It polls for the events of other processes."""

    name = "relay"
    interval = 0.5
    min_interval = 0.02

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime
        self._publisher = Publisher(runtime.broker_settings.url, declares=True)
        self._mark = LowWaterMark(_OLDEST)
        self._refusals: dict[UUID, int] = {}  # of events, the oldest first
        self._told: dict[str, float] = {}  # by reason: when its refusals were logged, as of time.monotonic()
        self.wake = runtime.events_waiting

    def run_once(self) -> bool:
        """Publishes one batch. Returns whether the broker took any of it: where it took none, the next one can wait."""
        return self._publish_batch() and bool(self._publisher.confirmed)

    def _publish_batch(self) -> bool:
        """Returns whether there was one. Takes none while the broker can't be reached."""
        self._publisher.ensure_connection()
        events = self._take()
        if not events:
            return False
        try:
            self._publisher.publish(message_of(event) for event in events)
        finally:  # also where the connection broke in the middle: what the broker has is not published again
            self._mark_published(self._publisher.confirmed)
            _log_published(events, self._publisher.confirmed)
            self._set_aside([event for event in events if event.id in self._publisher.refused])
            done = self._publisher.confirmed | self._publisher.refused.keys()
            self._release([event.id for event in events if event.id not in done], 0.0)
            for published in self._publisher.confirmed & self._refusals.keys():
                del self._refusals[published]
        return True

    def _set_aside(self, events: list[Row[Any]]) -> None:
        """Lets events that the broker refused wait, the longer the more often it did, so that others do not wait.

        A queue that is full makes all other queues get the event again with each try.
        """
        by_wait: dict[float, list[UUID]] = {}
        by_reason: dict[str, list[UUID]] = {}
        for event in events:
            number = self._refusals[event.id] = self._refusals.pop(event.id, 0) + 1
            by_wait.setdefault(refused_backoff(number, event.age), []).append(event.id)
            by_reason.setdefault(self._publisher.refused[event.id], []).append(event.id)
        while len(self._refusals) > MAX_REMEMBERED:
            del self._refusals[next(iter(self._refusals))]
        for wait, ids in by_wait.items():
            self._release(ids, wait)
        for reason, ids in by_reason.items():
            metrics.events_refused(len(ids))
            self._tell(reason, ids, min(by_wait))

    def _tell(self, reason: str, ids: list[UUID], wait: float) -> None:
        """Logs a refusal. Others for the same reason follow within seconds, and are not logged for a while."""
        at = time.monotonic()
        self._told = {told: when for told, when in self._told.items() if at - when < TOLD_AGAIN_AFTER}
        if reason not in self._told:
            self._told[reason] = at
            log.warning("events_refused", count=len(ids), tried_again_in_s=wait, reason=reason, event_id=str(ids[0]))

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the thread, then publishes what is left, as flush() does."""
        super().stop(timeout)
        self.flush()

    def flush(self, seconds: float = FLUSH_TIMEOUT) -> None:
        """Publishes what is left. Events that can't be published in time stay for another relay."""
        ends_at = time.monotonic() + seconds
        try:
            while self._publish_batch() and time.monotonic() < ends_at:
                pass
        except Exception as error:
            log.warning("events_left", error=type(error).__name__)
        finally:
            self.close()

    def close(self) -> None:
        self._publisher.close()

    def _take(self) -> Sequence[Row[Any]]:
        with self._runtime.engine.begin() as connection:
            return connection.execute(_TAKE, {"since": self._mark.read(connection)}).all()

    def _mark_published(self, published: Collection[UUID]) -> None:
        if not published:
            return
        with self._runtime.engine.begin() as connection:
            marked = connection.execute(_MARK_PUBLISHED, {"ids": list(published)}).all()
        for event in marked:
            metrics.event_published(event.type, event.seconds)

    def _release(self, events: Sequence[UUID], seconds: float) -> None:
        """Lets these events be taken again after so many seconds."""
        if not events:
            return
        with self._runtime.engine.begin() as connection:
            connection.execute(_RELEASE, {"ids": events, "seconds": seconds})


def refused_backoff(number: int, age: float) -> float:
    """Seconds until an event that the broker refused is published again: 1, 2, 4, 8, …, 960, 960, …

    number: of refusals that this relay has seen. age: of the event, in seconds; it never waits longer than that.
    """
    return min(exponential(REFUSED_BACKOFF, number - 1, MAX_REFUSED_BACKOFF), max(age, REFUSED_BACKOFF))


def _log_published(events: Sequence[Row[Any]], published: Collection[UUID]) -> None:
    for event in events if logging.getLogger(__name__).isEnabledFor(logging.DEBUG) else ():
        if event.id in published:
            log.debug(
                "event_published", event_id=str(event.id), type=event.type, confirmation=str(event.confirmation_id)
            )


def message_of(event: Row[Any]) -> Message:
    """The AMQP message of a row of the outbox. Its key is the event's id."""
    properties = {"message_id": str(event.id), "type": event.type}
    if event.correlation_id:
        properties["correlation_id"] = event.correlation_id
    return Message(
        key=event.id,
        body=event.payload.encode(),
        exchange=booking_events.name,
        routing_key=event.type,
        content_type=CONTENT_TYPE,
        properties=properties,
        headers={"traceparent": event.traceparent} if event.traceparent else {},
    )


# Built once: building a statement costs more than executing it.
_earlier = aliased(OutboxEvent)
_of_earlier = select(_earlier.id).where(
    _earlier.confirmation_id == OutboxEvent.confirmation_id, _earlier.sequence < OutboxEvent.sequence
)
_waits_for_earlier = _of_earlier.where(_earlier.published_at.is_(None)).exists()
# Then the clock was set back. The wait of an event that was refused is never longer than its age: see refused_backoff.
_claimed_for, _age = -seconds_since(OutboxEvent.claimed_until), seconds_since(OutboxEvent.created_at)
_is_claimed_too_far_ahead = and_(
    _claimed_for > LEASE + SLACK, or_(_claimed_for > MAX_REFUSED_BACKOFF + SLACK, _claimed_for > _age + SLACK)
)
_ready = locked(
    select(OutboxEvent.id)
    .where(
        OutboxEvent.published_at.is_(None),
        OutboxEvent.created_at >= bindparam("since"),
        or_(
            OutboxEvent.claimed_until.is_(None),
            OutboxEvent.claimed_until <= now(),
            _is_claimed_too_far_ahead,
        ),
        ~_waits_for_earlier,
    )
    .order_by(OutboxEvent.created_at)
    .limit(BATCH),
    skip_locked=True,
).cte("ready")
# For the low-water mark. Without those that were set aside, and what waits for them.
_oldest = (
    select(OutboxEvent.created_at)
    .where(
        OutboxEvent.published_at.is_(None),
        OutboxEvent.created_at >= bindparam("since"),
        or_(
            OutboxEvent.claimed_until.is_(None),
            OutboxEvent.claimed_until <= now_plus(LOOK_BACK_EVERY),
            _is_claimed_too_far_ahead,
        ),
        ~_waits_for_earlier,
    )
    .order_by(OutboxEvent.created_at)
    .limit(1)
    .scalar_subquery()
)
_OLDEST = select(_oldest, now())
_events = update(OutboxEvent.__table__).where(OutboxEvent.id.in_(bindparam("ids")))
_TAKE = (
    update(OutboxEvent.__table__)
    .where(OutboxEvent.id.in_(select(_ready.c.id)))
    .values(claimed_until=now_plus(LEASE))
    .returning(OutboxEvent.__table__, seconds_since(OutboxEvent.created_at).label("age"))
)
_job_published_at = select(Confirmation.job_published_at).where(Confirmation.id == OutboxEvent.confirmation_id)
_MARK_PUBLISHED = _events.values(published_at=now(), claimed_until=None).returning(
    OutboxEvent.type,
    case((~_of_earlier.exists(), seconds_since(_job_published_at.scalar_subquery()))).label("seconds"),
)
_RELEASE = _events.values(claimed_until=now_plus(bindparam("seconds")))

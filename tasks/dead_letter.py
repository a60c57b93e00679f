"""Moving a job that can't be accepted to the dead letters.

RabbitMQ may refuse a dead letter: a policy limits the queue and it is full, the queue has no leader, or the worker's
user has lost its right to publish. The job then goes back to the end of its own queue, so that jobs behind it are taken
first and no thread waits with it.
"""

import time
from datetime import UTC, datetime
from threading import Lock
from typing import Any

import structlog

from models.job import JobRejected
from tasks.accept import Delivery
from worker.backoff import exponential
from worker.errors import ShuttingDown
from worker.messaging import broker, topology
from worker.messaging.properties import ids_of_message
from worker.messaging.publisher import Message, Publisher
from worker.observability import log_context, metrics
from worker.outages import retry_while_unavailable
from worker.runtime import Runtime

log = structlog.get_logger(__name__)

PUT_BACK = "x-put-back"  # header of a job that went to the end of its queue
INITIAL_BACKOFF, MAX_BACKOFF = 1.0, 30.0  # seconds until another dead letter is tried after one was refused
PUT_BACK_INTERVAL = 0.05  # seconds between jobs that go back a second time: they would circle without end


class NotPutBack(Exception):
    """Neither the dead letters nor the jobs queue take the job."""


def dead_letter(
    body: bytes,
    properties: dict[str, Any],
    delivery: Delivery,
    rejection: JobRejected,
    was_put_back: bool,
    runtime: Runtime,
) -> None:
    """Publishes a dead letter, body unchanged; or the job again, if the dead letter is refused.

    Waits while the broker is unavailable. was_put_back: whether the job has been through its queue before. Raises
    ShuttingDown, and NotPutBack where both are refused: the message should be returned.
    """
    headers = {"traceparent": delivery.traceparent} if delivery.traceparent else {}
    ids, published_at = ids_of_message(properties), delivery.published_at or datetime.now(UTC)
    job = Message(
        "job",
        body,
        topology.confirm_offer.name,
        topology.JOBS,
        properties={**ids, "timestamp": int(published_at.timestamp())},
        headers={**headers, PUT_BACK: True},
    )
    letter = Message(
        "letter",
        body,
        topology.confirm_offer.name,
        topology.DEAD_LETTERS,
        properties=ids,
        headers={
            "x-dead-letter-code": rejection.code,
            "x-dead-letter-detail": rejection.detail,
            "x-dead-letter-at": datetime.now(UTC).isoformat(timespec="seconds"),
            **headers,
        },
    )
    log_context.bind(code=rejection.code)
    if _refusals.may_try():
        is_taken = _publish(letter, runtime)
        _refusals.note(is_taken)
        if is_taken:
            metrics.dead_lettered(rejection.code)
            log.warning("job_rejected", detail=rejection.detail)
            return
    if was_put_back and runtime.shutting_down.wait(_refusals.seconds_to_turn()):
        raise ShuttingDown
    metrics.message_put_back("dead-letter-refused")
    if not _publish(job, runtime):
        raise NotPutBack


def _publish(message: Message, runtime: Runtime) -> bool:
    """Returns whether the broker has the message. Waits only while the broker can't be reached."""

    def publish() -> bool:
        try:
            with Publisher(runtime.broker_settings.url, declares=True) as publisher:
                return bool(publisher.publish([message]))
        except broker.CONNECTION_ERRORS as error:
            if broker.refuses(error) is None and not broker.lacks_queues(error):
                raise
            return False

    return retry_while_unavailable(publish, runtime.shutting_down)


class _Refusals:
    """What this process knows about refused dead letters. After one, another is tried with growing pauses only."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._failures = 0
        self._next_try = 0.0
        self._next_turn = 0.0

    def may_try(self) -> bool:
        """Whether a dead letter may be tried now. While they are refused, one thread tries at a time."""
        with self._lock:
            now = time.monotonic()
            if self._failures and now < self._next_try:
                return False
            self._next_try = now + exponential(INITIAL_BACKOFF, self._failures, MAX_BACKOFF)
            return True

    def note(self, is_taken: bool) -> None:
        with self._lock:
            before, self._failures = self._failures, 0 if is_taken else self._failures + 1
        if is_taken and before:
            log.info("dead_letters_taken", after_refusals=before)
        elif not is_taken and not before:
            log.error("dead_letters_refused", queue=topology.DEAD_LETTERS)

    def seconds_to_turn(self) -> float:
        """Seconds until this thread may put its job back: one after the other."""
        with self._lock:
            now = time.monotonic()
            self._next_turn = max(self._next_turn, now) + PUT_BACK_INTERVAL
            return self._next_turn - now


_refusals = _Refusals()

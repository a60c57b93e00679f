"""The Celery tasks: what happens to a message. Each is acknowledged, rejected or dead-lettered.

A task never raises for a fault of its job. ``confirm_offer`` takes the messages of checkouts, ``resume`` those of the
Scheduler; both end in ``confirm.attempt``.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any
from uuid import UUID

import structlog
from celery import Task, shared_task
from celery.exceptions import Reject

from models.job import JobRejected
from tasks import confirm
from tasks.accept import Delivery
from tasks.dead_letter import NotPutBack, dead_letter
from tasks.lease import Lease
from worker.errors import ShuttingDown
from worker.messaging import topology
from worker.messaging.properties import ids_of_message, valid_text, valid_traceparent
from worker.observability import log_context, tracing
from worker.observability.sentry import report, transaction
from worker.runtime import Runtime, current
from worker.storage import database

log = structlog.get_logger(__name__)

MAX_QUEUE_TIME = timedelta(days=30)  # of a job: an older timestamp was not meant in seconds since 1970
MAX_DELIVERIES = 50  # of one message: more than restarts in an outage can cause
NOT_PUT_BACK_DELAY = 5.0  # seconds

OPTIONS: dict[str, Any] = {
    "acks_late": True,
    "reject_on_worker_lost": True,
    "ignore_result": True,
    "typing": False,
}


def observed(queue: str) -> Callable[[Callable[[Task, bytes], None]], Callable[[Task, bytes], None]]:
    """A decorator of tasks: logs, traces and Sentry then name the message. queue: that messages come from."""

    def decorate(do: Callable[[Task, bytes], None]) -> Callable[[Task, bytes], None]:
        @wraps(do)
        def with_context(self: Task, body: bytes) -> None:
            traceparent = valid_traceparent(self.request.get("traceparent"))
            properties = self.request.get("properties") or {}
            ids = ids_of_message(properties)
            with (
                log_context.for_task(do.__name__, queue, traceparent, ids.get("message_id"), ids.get("correlation_id")),
                transaction(do.__name__),
            ):
                do(self, body)

        return with_context

    return decorate


@shared_task(name="confirm_offer", bind=True, **OPTIONS)
@observed(topology.JOBS)
def confirm_offer(self: Task, body: bytes) -> None:
    """Handles one message of the jobs queue. It is acknowledged once the outcome is stored, or its next attempt is."""
    runtime = current()
    request = self.request
    delivery = Delivery(
        valid_text(request.correlation_id),
        tracing.traceparent(valid_traceparent(request.traceparent)),
        _published_at(request.properties.get("timestamp")),
    )
    if runtime.shutting_down.is_set():
        raise Reject("the worker stops", requeue=True)
    try:
        if request.deliveries >= MAX_DELIVERIES:
            raise JobRejected("poison", f"delivered {request.deliveries} times without coming to an end")
        lease = confirm.accept_job(body, delivery, runtime)
    except ShuttingDown:
        raise Reject("the worker stops", requeue=True) from None
    except JobRejected as rejected:
        _dead_letter(request, body, delivery, rejected, runtime)
    except Exception as error:
        report(error)
        by = (
            "the database refuses it and takes others"
            if database.is_error(error)
            else "this program could not handle it"
        )
        defect = JobRejected("poison", f"{by} ({database.name_of(error)})")
        _dead_letter(request, body, delivery, defect, runtime)
    else:
        try:
            _attempt(lease, runtime)
        except ShuttingDown:  # whether its row still stands is not known
            raise Reject("the worker stops", requeue=True) from None


@shared_task(name="resume", bind=True, **OPTIONS)
@observed(topology.RESUME)
def resume(_self: Task, body: bytes) -> None:
    """Resumes the confirmation whose id is the message's body. Drops a message of any other form."""
    runtime = current()
    try:
        confirmation_id = UUID(body.decode("ascii"))
    except ValueError:
        log.warning("no_confirmation_id", queue=topology.RESUME)
        return
    log_context.bind(confirmation=str(confirmation_id))
    try:
        lease = confirm.lease_due(confirmation_id, runtime)
    except ShuttingDown:
        raise Reject("the worker stops", requeue=True) from None
    except Exception as error:
        if not database.is_error(error):  # else its row stays due: the Scheduler sends it again
            if not runtime.was_reported(confirmation_id):
                report(error)
            confirm.put_off(confirmation_id, runtime)
    else:
        with suppress(ShuttingDown):
            _attempt(lease, runtime)


def _attempt(lease: Lease | None, runtime: Runtime) -> None:
    """Makes an attempt. If it fails here, it is tried again when the lease has expired: its row is stored.

    Raises ShuttingDown if the process stops before that can be seen.
    """
    if lease is None:
        log.info("nothing_to_do")
        return
    log_context.for_lease(lease)
    try:
        confirm.attempt(lease, runtime)
    except ShuttingDown:
        log.warning("attempt_abandoned")
        raise
    except Exception as error:
        report(error)
        confirm.ensure_stored(lease, runtime)


def _dead_letter(request: Any, body: bytes, delivery: Delivery, rejection: JobRejected, runtime: Runtime) -> None:
    try:
        dead_letter(body, request.properties, delivery, rejection, bool(request.get("put_back")), runtime)
    except ShuttingDown:
        raise Reject("the worker stops", requeue=True) from None
    except NotPutBack:
        runtime.shutting_down.wait(NOT_PUT_BACK_DELAY)
        raise Reject("neither the job nor its dead letter is taken", requeue=True) from None


def _published_at(timestamp: Any) -> datetime:
    """When the job was published, by its AMQP ``timestamp`` (seconds since 1970); now if that is no plausible time."""
    now = datetime.now(UTC)
    if isinstance(timestamp, int):
        try:
            given = datetime.fromtimestamp(timestamp, UTC)
        except (ValueError, OverflowError, OSError):
            return now
        if now - MAX_QUEUE_TIME < given < now:
            return given
    return now

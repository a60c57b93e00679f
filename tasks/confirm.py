"""What happens to a confirmation, from top to bottom: accept or lease it, ask XONE, decide, record."""

import logging
import time
from collections.abc import Sequence
from uuid import UUID

import structlog
from sqlalchemy import Connection, select
from uuid_utils.compat import uuid4

from models.job import read_job
from models.states import State
from models.tables import Confirmation
from tasks.accept import Delivery, NewJob, accept, accept_new_batch
from tasks.call_guard import before_call, continue_or_suspend, seconds_until_calls
from tasks.decide import (
    AttemptResult,
    BookingNotFound,
    Decision,
    LookupResult,
    RetryPolicy,
    decide,
    earlier_error,
    may_send,
    must_look_up_after,
    must_look_up_first,
    uses_attempt,
)
from tasks.lease import Lease, LeaseLost, acquire, postpone, release
from tasks.record import RecordedAttempt, record
from worker.errors import Poison, Refused, XoneError
from worker.observability import log_context, metrics, tracing
from worker.runtime import Runtime
from worker.storage.database import seconds_since
from worker.xone.answers import BookingReceived
from worker.xone.circuit_breaker import CallsSuspended

log = structlog.get_logger(__name__)

DEFECT_DELAY, MAX_DEFECT_DELAY = 300.0, 21600.0  # seconds until what could not be leased is tried again
MAX_CRASHES = 5  # workers in a row that died on one confirmation


def accept_job(body: bytes, delivery: Delivery, runtime: Runtime) -> Lease | None:
    """Stores the job's confirmation and returns the lease on it; None if there is nothing to do now.

    Raises JobRejected if the job can't be accepted.
    """
    new = NewJob.of(read_job(body), delivery, runtime.encryption)
    log_context.bind(partner_id=new.job.partner_id, offer_id=new.job.offer_id)
    wait = seconds_until_calls(runtime)
    token = uuid4()

    def store(connection: Connection) -> Lease | None:
        suspended = wait > 0 or runtime.pauses.is_paused(connection, new.job.partner_id)
        lease_seconds = runtime.xone_settings.lease_seconds
        return accept(connection, runtime.encryption, new, token, lease_seconds, queue_for=wait if suspended else None)

    with tracing.transaction("accept job", runtime.engine):
        lease = runtime.commit_in_group(accept_job_batch, new) if not wait else None
        return lease or runtime.commit(store)


def accept_job_batch(runtime: Runtime, jobs: Sequence[NewJob]) -> list[Lease | None]:
    """Leases on jobs that are the first of their offers; None for the others, and for paused partners."""
    token = uuid4()

    def store(connection: Connection) -> dict[UUID, Lease]:
        callable_jobs = [new for new in jobs if not runtime.pauses.is_paused(connection, new.job.partner_id)]
        if not callable_jobs:
            return {}
        return accept_new_batch(connection, callable_jobs, token, runtime.xone_settings.lease_seconds)

    leases = runtime.commit(store)
    return [leases.get(new.id) for new in jobs]


def lease_due(confirmation_id: UUID, runtime: Runtime) -> Lease | None:
    """The lease on a confirmation that is due; None if it is not due, is leased already, or calls are suspended."""
    wait = seconds_until_calls(runtime)
    if wait > 0:
        runtime.commit(lambda connection: postpone(connection, confirmation_id, wait))
        return None
    with tracing.transaction("lease confirmation", runtime.engine):
        return runtime.commit_in_group(lease_due_batch, confirmation_id)


def lease_due_batch(runtime: Runtime, confirmation_ids: Sequence[UUID]) -> list[Lease | None]:
    """As ``lease_due``, for several confirmations, while calls are not suspended."""
    token = uuid4()

    def lease_all(connection: Connection) -> dict[UUID, Lease]:
        lease_seconds = runtime.xone_settings.lease_seconds
        leases = acquire(connection, runtime.encryption, confirmation_ids, token, lease_seconds)
        for lease in list(leases.values()):
            if runtime.pauses.is_paused(connection, lease.partner_id):
                release(connection, lease, 0.0)
                del leases[lease.id]
        return leases

    leases = runtime.commit(lease_all)
    return [leases.pop(confirmation_id, None) for confirmation_id in confirmation_ids]


def attempt(lease: Lease, runtime: Runtime) -> None:
    """Makes one attempt for a leased confirmation: asks XONE with no transaction open, and records the outcome."""
    started = time.monotonic()
    retry_policy = RetryPolicy.of(runtime.retry_settings, runtime.xone_settings)
    try:
        result = ask(lease, retry_policy, runtime)
    except LeaseLost:
        log.warning("lease_lost")
        return
    except CallsSuspended as suspended:
        put_back(lease, suspended.wait, runtime)
        return
    decision = decide(result, lease.history, retry_policy, runtime.dice())
    duration = time.monotonic() - started
    with tracing.transaction("record attempt", runtime.engine):
        state = runtime.commit_in_group(record_batch, RecordedAttempt(lease, decision, duration))
    runtime.events_waiting.set()
    metrics.attempt_ended(decision.outcome, decision.error.code if decision.error else None, state)
    _log_outcome(decision, state, duration)


def record_batch(runtime: Runtime, attempts: Sequence[RecordedAttempt]) -> list[State | None]:
    """Records attempts in one transaction. Returns what ``record`` returns."""
    return runtime.commit(lambda connection: record(connection, runtime.encryption, attempts, runtime.event_links))


def ask(lease: Lease, retry_policy: RetryPolicy, runtime: Runtime) -> AttemptResult:
    """Asks XONE to confirm, and returns what came of it.

    Reads the partner's list of bookings first if a booking may exist already, and afterwards if only the list can
    explain the answer. Raises LeaseLost, and CallsSuspended if no call may be made now.
    """
    if lease.crashes >= MAX_CRASHES:
        return Poison("poison", f"{lease.crashes} workers in a row did not come back from this confirmation")
    if must_look_up_first(lease.history):
        lookup = look_up_booking(lease, runtime)
        if isinstance(lookup, BookingReceived):
            return lookup
        if not may_send(lease.history, retry_policy):
            return BookingNotFound(lookup, earlier_error(lease.history))
    try:
        return runtime.xone.confirm(
            lease.partner_id, lease.offer_id, lease.body, lease.idempotency_key, lambda: before_call(lease, runtime)
        )
    except XoneError as error:
        if not must_look_up_after(error, lease.history, retry_policy):
            return error
        try:
            lookup = look_up_booking(lease, runtime)
        except CallsSuspended:
            lookup = LookupResult.SUSPENDED
        return lookup if isinstance(lookup, BookingReceived) else BookingNotFound(lookup, error)


def look_up_booking(lease: Lease, runtime: Runtime) -> BookingReceived | LookupResult:
    """The booking in the partner's list of bookings, or why it was not seen. Raises CallsSuspended and LeaseLost."""
    if not runtime.xone.can_list_bookings:
        return LookupResult.IMPOSSIBLE
    try:
        booking = runtime.xone.find_booking(
            lease.partner_id,
            lease.offer_id,
            lease.quote_ids,
            before_call=lambda: before_call(lease, runtime),
            while_waiting=lambda: continue_or_suspend(lease, runtime),
        )
    except Refused:
        return LookupResult.IMPOSSIBLE
    except XoneError as error:
        if uses_attempt(error):
            return LookupResult.UNAVAILABLE
        raise CallsSuspended(runtime.xone.calls.wait() or error.retry_after or 1.0) from None
    return BookingReceived(booking, 200) if booking is not None else LookupResult.NOT_LISTED


def put_back(lease: Lease, wait: float, runtime: Runtime) -> None:
    """Releases a lease without a call: the confirmation is due again in ``wait`` seconds, and uses up no attempt."""
    delay = wait + runtime.dice() if wait > 0 else 0.0
    runtime.in_transaction("put back", lambda connection: release(connection, lease, delay))
    log.debug("call_held", wait_s=round(wait, 1))


def put_off(confirmation_id: UUID, runtime: Runtime) -> None:
    """Delays a confirmation that can't be leased, such as one that DATA_KEYS do not decrypt, so it blocks no other.

    The delay grows with the time since the confirmation changed: 5, 5, 10, 20 minutes and so on, at most 6 hours.
    """

    def put_off_in(connection: Connection) -> None:
        unchanged = connection.execute(
            select(seconds_since(Confirmation.updated_at)).where(Confirmation.id == confirmation_id)
        ).scalar_one_or_none()
        postpone(connection, confirmation_id, min(max(unchanged or 0.0, DEFECT_DELAY), MAX_DEFECT_DELAY))

    runtime.commit(put_off_in)
    metrics.put_off()


def _log_outcome(decision: Decision, state: State | None, duration: float) -> None:
    log_context.bind(
        outcome=decision.outcome.value,
        code=decision.error.code if decision.error else None,
        state=state.value if state else "late",
    )
    log.log(
        logging.WARNING if decision.state in (State.FAILED, State.NEEDS_REVIEW) else logging.INFO,
        "attempt_ended",
        delay_s=round(decision.delay, 1) if decision.delay is not None else None,
        took_ms=round(duration * 1000),
    )

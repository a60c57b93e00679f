"""The way of a confirmation, top to bottom: accept or claim, ask XONE, decide, record."""

import logging
import time
from collections.abc import Sequence
from uuid import UUID

import structlog
from uuid_utils.compat import uuid4

from models.job import read_job
from models.states import State
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
from worker.outages import retry_while_unavailable
from worker.runtime import Runtime
from worker.xone.answers import BookingReceived
from worker.xone.circuit_breaker import CallsSuspended

log = structlog.get_logger(__name__)

DEFECT_PAUSE = 300.0  # seconds until what could not be claimed is tried again
MAX_CRASHES = 5  # workers in a row that died on one confirmation


def accept_job(body: bytes, delivery: Delivery, runtime: Runtime) -> Lease | None:
    """The claim on the confirmation of a job that stands now in the database; None where nothing is to be done now.

    Raises JobRejected where the job can't be accepted.
    """
    new = NewJob.of(read_job(body), delivery, runtime.encryption)
    log_context.bind(partner_id=new.job.partner_id, offer_id=new.job.offer_id)
    wait = seconds_until_calls(runtime)
    token = uuid4()

    def store() -> Lease | None:
        with runtime.engine.begin() as connection:
            is_held = wait > 0 or runtime.pauses.is_paused(connection, new.job.partner_id)
            return accept(
                connection,
                runtime.encryption,
                new,
                token,
                runtime.xone_settings.lease_seconds,
                wait if is_held else None,
            )

    with tracing.transaction("accept job", runtime.engine):
        lease = runtime.commit_in_group(accept_job_batch, new) if not wait else None
        return lease or retry_while_unavailable(store, runtime.shutting_down)


def accept_job_batch(runtime: Runtime, jobs: Sequence[NewJob]) -> list[Lease | None]:
    """The claims on jobs that are the first of their offers; None where something stands already, or calls pause."""
    token = uuid4()

    def store() -> dict[UUID, Lease]:
        with runtime.engine.begin() as connection:
            to_call = [new for new in jobs if not runtime.pauses.is_paused(connection, new.job.partner_id)]
            return accept_new_batch(connection, to_call, token, runtime.xone_settings.lease_seconds) if to_call else {}

    leases = retry_while_unavailable(store, runtime.shutting_down)
    return [leases.get(new.id) for new in jobs]


def lease_due(confirmation_id: UUID, runtime: Runtime) -> Lease | None:
    """The claim on a confirmation that is due; None where it is not, or another worker was quicker, or calls pause."""
    wait = seconds_until_calls(runtime)
    if not wait:
        with tracing.transaction("claim confirmation", runtime.engine):
            return runtime.commit_in_group(lease_due_batch, confirmation_id)

    def put_off() -> None:
        with runtime.engine.begin() as connection:
            postpone(connection, confirmation_id, wait)

    return retry_while_unavailable(put_off, runtime.shutting_down)


def lease_due_batch(runtime: Runtime, these: Sequence[UUID]) -> list[Lease | None]:
    """As ``claim_due``, for several, while this process may call XONE."""
    token = uuid4()

    def take() -> dict[UUID, Lease]:
        with runtime.engine.begin() as connection:
            leases = acquire(connection, runtime.encryption, these, token, runtime.xone_settings.lease_seconds)
            for lease in list(leases.values()):
                if runtime.pauses.is_paused(connection, lease.partner_id):
                    release(connection, lease, 0.0)
                    del leases[lease.id]
            return leases

    leases = retry_while_unavailable(take, runtime.shutting_down)
    return [leases.pop(one, None) for one in these]


def attempt(lease: Lease, runtime: Runtime) -> None:
    """One attempt of a claimed confirmation: XONE is asked with no transaction open, and the outcome recorded."""
    started = time.monotonic()
    retry_policy = RetryPolicy.of(runtime.retry_settings, runtime.xone_settings)
    try:
        answer = ask(lease, retry_policy, runtime)
    except LeaseLost:
        log.warning("lease_lost")
        return
    except CallsSuspended as pause:
        put_back(lease, pause.wait, runtime)
        return
    decision = decide(answer, lease.history, retry_policy, runtime.dice())
    duration = time.monotonic() - started
    with tracing.transaction("record attempt", runtime.engine):
        state = runtime.commit_in_group(record_batch, RecordedAttempt(lease, decision, duration))
    runtime.events_waiting.set()
    metrics.attempt_ended(decision.outcome, decision.error.code if decision.error else None, state)
    _tell(decision, state, duration)


def record_batch(runtime: Runtime, made: Sequence[RecordedAttempt]) -> list[State | None]:
    """Records what came of attempts; the states, as ``record`` tells them."""

    def store() -> list[State | None]:
        with runtime.engine.begin() as connection:
            return record(connection, runtime.encryption, made, runtime.event_links)

    return retry_while_unavailable(store, runtime.shutting_down)


def ask(lease: Lease, retry_policy: RetryPolicy, runtime: Runtime) -> AttemptResult:
    """XONE's answer to this confirmation. Raises LeaseLost where the claim is no longer ours, Held where calls pause.

    Where a booking may exist already, the partner's list of bookings is read before anything is sent again; and after
    an answer that only the list can explain.
    """
    if lease.crashes >= MAX_CRASHES:
        return Poison("poison", f"{lease.crashes} workers in a row did not come back from this confirmation")
    if must_look_up_first(lease.history):
        seen = look_up_booking(lease, runtime)
        if isinstance(seen, BookingReceived):
            return seen
        if not may_send(lease.history, retry_policy):
            return BookingNotFound(seen, earlier_error(lease.history))
    try:
        return runtime.xone.confirm(
            lease.partner_id, lease.offer_id, lease.body, lease.idempotency_key, lambda: before_call(lease, runtime)
        )
    except XoneError as error:
        if not must_look_up_after(error, lease.history, retry_policy):
            return error
        try:
            seen = look_up_booking(lease, runtime)
        except CallsSuspended:
            seen = LookupResult.SUSPENDED
        return seen if isinstance(seen, BookingReceived) else BookingNotFound(seen, error)


def look_up_booking(lease: Lease, runtime: Runtime) -> BookingReceived | LookupResult:
    """The booking, from the list of the partner's bookings, or why it is not seen there. Raises Held and LeaseLost."""
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
        raise CallsSuspended(runtime.xone.circuit_breaker.wait() or error.retry_after or 1.0) from None
    return BookingReceived(booking, 200) if booking is not None else LookupResult.NOT_LISTED


def put_back(lease: Lease, wait: float, runtime: Runtime) -> None:
    """No call was made and none may be now: the confirmation waits, and no attempt is used up."""

    def give() -> None:
        with runtime.engine.begin() as connection:
            release(connection, lease, wait + runtime.dice() if wait > 0 else 0.0)

    with tracing.transaction("put back", runtime.engine):
        retry_while_unavailable(give, runtime.shutting_down)
    log.debug("call_held", wait_s=round(wait, 1))


def put_off(confirmation_id: UUID, runtime: Runtime) -> None:
    """It can't be claimed, such as with DATA_KEYS that do not open it: it waits, and keeps no other one waiting."""

    def wait() -> None:
        with runtime.engine.begin() as connection:
            postpone(connection, confirmation_id, DEFECT_PAUSE)

    retry_while_unavailable(wait, runtime.shutting_down)


def _tell(decision: Decision, state: State | None, duration: float) -> None:
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

"""What happens to a confirmation, from top to bottom: accept or lease it, ask XONE, decide, record."""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from uuid import UUID

import structlog
from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from uuid_utils.compat import uuid4

from models.job import read_job
from models.states import State
from models.tables import Confirmation
from tasks.accept import Delivery, NewJob, accept, accept_new_batch, newest_id, restore, try_sample
from tasks.booking_owner import may_be_anothers, without_anothers_booking
from tasks.call_guard import before_call, continue_or_suspend, keep_lease, seconds_until_calls
from tasks.decide import (
    AttemptResult,
    BookingNotFound,
    Decision,
    LookupResult,
    RetryPolicy,
    decide,
    earlier_error,
    look_again_after,
    may_send,
    must_look_up_after,
    must_look_up_first,
    uses_attempt,
)
from tasks.due_times import MAX_DEFECT_DELAY
from tasks.lease import Lease, LeaseLost, acquire, exists, postpone, release
from tasks.record import Gone, OwnerUnknown, Recorded, RecordedAttempt, keep_answer, record
from worker.errors import NotSent, Oversized, Poison, Refused, ShuttingDown, XoneError
from worker.observability import log_context, metrics, tracing
from worker.outages import Suspicion, retry_while_unavailable, unavailable_dependency, unreachable_dependency
from worker.runtime import Runtime
from worker.storage import database
from worker.storage.database import seconds_since
from worker.xone.answers import BookingReceived
from worker.xone.circuit_breaker import CallsSuspended

log = structlog.get_logger(__name__)

DEFECT_DELAY = 300.0  # seconds until a confirmation that could not be leased is tried again; grows with each try
MAX_TRIES = 6  # to lease a confirmation that the database refuses: 3 s
SAMPLE_AFTER = 5.0  # seconds for which a job is refused and no other comes, until a sample is tried
MAX_EMAILS_IN_GROUP = (
    10  # of a job; one with more has a transaction of its own, so that others do not wait for its rows
)
RECORD_GRACE = 5.0  # seconds for which a process that stops still tries to record an answer
MAX_CRASHES = 5  # workers in a row that died on one confirmation


class LookupSuspended(CallsSuspended):
    """The list of bookings can't be read now, though confirm calls may pass."""


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
        try:
            is_small = len(new.email_hashes) <= MAX_EMAILS_IN_GROUP
            lease = runtime.commit_in_group(accept_job_batch, new) if is_small and not wait else None
            return lease or runtime.commit_group(store)
        except SQLAlchemyError as error:
            if not database.is_error(error):
                raise
        alone = partial(runtime.commit_once, store)
        return retry_while_unavailable(alone, runtime.shutting_down, Suspicion(_OtherJobs(runtime).succeed).waits_for)


class _OtherJobs:
    """Shows whether the database takes jobs, while it refuses one."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._newest: UUID | None = None

    def succeed(self, seconds: float) -> bool:
        """Whether any worker has stored another job since the last call. seconds: for how long this one is refused.

        Ids grow with time; they are compared with one another, as clocks differ. If there is no other job, or all of
        them are refused, a sample is tried in the end.
        """
        with self._runtime.engine.connect() as connection:
            before, self._newest = self._newest, newest_id(connection)
        if before is not None and self._newest is not None and self._newest > before:
            return True
        if seconds < SAMPLE_AFTER:
            return False
        with self._runtime.engine.connect() as connection:
            try_sample(connection, self._runtime.encryption)
            connection.rollback()
        return True


def accept_job_batch(runtime: Runtime, jobs: Sequence[NewJob]) -> list[Lease | None]:
    """Leases on jobs that are the first of their offers; None for the others, and for paused partners."""
    token = uuid4()

    def store(connection: Connection) -> dict[UUID, Lease]:
        callable_jobs = [new for new in jobs if not runtime.pauses.is_paused(connection, new.job.partner_id)]
        if not callable_jobs:
            return {}
        return accept_new_batch(connection, callable_jobs, token, runtime.xone_settings.lease_seconds)

    leases = runtime.commit_group(store)
    return [leases.get(new.id) for new in jobs]


def lease_due(confirmation_id: UUID, runtime: Runtime) -> Lease | None:
    """The lease on a confirmation that is due; None if it is not due, is leased already, or calls are suspended.

    Calls that are suspended don't keep back what is too old to be put back: its attempt ends it.
    Waits while the database is away. If it refuses this confirmation, raises its error after MAX_TRIES: the row stays
    due, and is dispatched again.
    """
    wait = seconds_until_calls(runtime)
    max_age = runtime.retry_settings.RETRY_MAX_AGE
    if wait > 0 and runtime.commit(lambda connection: postpone(connection, confirmation_id, wait, max_age)):
        return None
    tries = count(1)

    def waits_for(error: Exception) -> str | None:
        return unreachable_dependency(error) or (unavailable_dependency(error) if next(tries) < MAX_TRIES else None)

    with tracing.transaction("lease confirmation", runtime.engine):
        try:
            return runtime.commit_in_group(lease_due_batch, confirmation_id)
        except SQLAlchemyError as error:
            if not database.is_error(error):
                raise
        (lease,) = retry_while_unavailable(
            partial(lease_due_batch, runtime, [confirmation_id]), runtime.shutting_down, waits_for
        )
        return lease


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

    leases = runtime.commit_group(lease_all)
    return [leases.pop(confirmation_id, None) for confirmation_id in confirmation_ids]


def attempt(lease: Lease, runtime: Runtime) -> None:
    """Makes one attempt for a leased confirmation: asks XONE with no transaction open, and records the outcome."""
    try:
        _attempt(lease, runtime)
    except LeaseLost:
        if ensure_stored(lease, runtime):
            log.warning("lease_lost")


def ensure_stored(lease: Lease, runtime: Runtime) -> bool:
    """Whether the confirmation is stored still. Otherwise stores it again: its message may be the last trace of it."""

    def ensure(connection: Connection) -> bool:
        if exists(connection, lease):
            return True
        restore(connection, runtime.encryption, lease, runtime.xone_settings.lease_seconds)
        return False

    was_stored = runtime.in_transaction("restore confirmation", ensure)
    if not was_stored:
        log.warning("confirmation_restored")
    return was_stored


def _attempt(lease: Lease, runtime: Runtime) -> None:
    started = time.monotonic()
    retry_policy = RetryPolicy.of(runtime.retry_settings, runtime.xone_settings)
    result = ask_or_put_back(lease, retry_policy, runtime)
    if result is None:
        return
    decision = decide(result, lease.history, retry_policy, runtime.dice())
    duration = time.monotonic() - started
    with tracing.transaction("record attempt", runtime.engine):
        state = record_answer(RecordedAttempt(lease, decision, duration), runtime)
    if isinstance(state, Gone):
        ensure_stored(lease, runtime)
        state = record_answer(RecordedAttempt(lease, decision, duration), runtime)
    if isinstance(state, Gone):  # its offer has another confirmation now, which finds the booking
        return
    runtime.events_waiting.set()
    metrics.attempt_ended(decision.outcome, decision.error.code if decision.error else None, state)
    _log_outcome(decision, state, duration)


def record_answer(attempt: RecordedAttempt, runtime: Runtime) -> Recorded:
    """Records an attempt, and tries until it stands: an answer that XONE has given is not dropped.

    Keeps the lease meanwhile, so that no other worker asks XONE again. If the process stops, tries for RECORD_GRACE and
    raises ShuttingDown. Then, and at a defect, at least the attempt keeps the answer, if the database takes that.
    """

    def alone() -> Recorded:
        keep_lease(attempt.lease, runtime)
        return _record_unless_anothers(attempt, runtime)

    try:
        try:
            return runtime.commit_in_group(record_batch, attempt)
        except (ShuttingDown, SQLAlchemyError) as error:
            if isinstance(error, SQLAlchemyError) and not database.is_error(error):
                raise
        return retry_while_unavailable(alone, runtime.shutting_down, grace=RECORD_GRACE)
    except Exception:
        with suppress(SQLAlchemyError):
            runtime.commit_once(lambda connection: keep_answer(connection, runtime.encryption, attempt))
        raise


def record_batch(runtime: Runtime, attempts: Sequence[RecordedAttempt]) -> list[Recorded]:
    """Records attempts in one transaction. Returns what ``record`` returns."""
    try:
        return runtime.commit_group(
            lambda connection: record(connection, runtime.encryption, attempts, runtime.event_links)
        )
    except (IntegrityError, OwnerUnknown):
        return [_record_unless_anothers(attempt, runtime) for attempt in attempts]


def _record_unless_anothers(attempt: RecordedAttempt, runtime: Runtime) -> Recorded:
    """Records an attempt. If its booking is stored for another confirmation, a person decides whose it is."""

    def store(connection: Connection) -> list[Recorded]:
        checked = without_anothers_booking(connection, attempt)
        return record(connection, runtime.encryption, [checked], runtime.event_links, owners_are_known=True)

    for _ in range(2):  # the other confirmation may be recorded at this moment
        with suppress(IntegrityError):
            return runtime.commit_once(store)[0]
    return runtime.commit_once(store)[0]


def ask_or_put_back(lease: Lease, retry_policy: RetryPolicy, runtime: Runtime) -> AttemptResult | None:
    """As ``ask``; but puts the confirmation back if no call may be made now, and returns None.

    Every way back counts against RETRY_MAX_AGE. What is too old ends, unless only this process stops.
    """
    try:
        return ask(lease, retry_policy, runtime)
    except Oversized as oversized:  # in the list of bookings
        return oversized
    except CallsSuspended as suspended:
        if lease.history.age >= retry_policy.max_age and not runtime.shutting_down.is_set():
            return _not_put_back(lease, runtime)
        put_back(lease, suspended.wait, runtime)
        return None


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
            if lookup is LookupResult.UNAVAILABLE:
                raise LookupSuspended(look_again_after(lease.history, retry_policy))
            return BookingNotFound(lookup, earlier_error(lease.history))
    try:
        return runtime.xone.confirm(
            lease.partner_id,
            lease.offer_id,
            lease.body,
            lease.idempotency_key,
            before_call=lambda: before_call(lease, runtime),
            before_send=lambda: continue_or_suspend(lease, runtime),
        )
    except XoneError as error:
        if not must_look_up_after(error, lease.history, retry_policy):
            return error
        try:
            lookup = look_up_booking(lease, runtime)
        except LookupSuspended:
            lookup = LookupResult.UNAVAILABLE
        except CallsSuspended:
            lookup = LookupResult.SUSPENDED
        return lookup if isinstance(lookup, BookingReceived) else BookingNotFound(lookup, error)


def look_up_booking(lease: Lease, runtime: Runtime) -> BookingReceived | LookupResult:
    """The booking in the partner's list of bookings, or why it was not seen.

    Raises LeaseLost, and CallsSuspended: as LookupSuspended if that is for what XONE has said to a look-up.
    """
    calls, partner_id = runtime.xone.calls, lease.partner_id
    if not runtime.xone.can_list_bookings:
        return LookupResult.IMPOSSIBLE
    try:
        booking = runtime.xone.find_booking(
            partner_id,
            lease.offer_id,
            lease.quote_ids,
            before_call=lambda: before_call(lease, runtime),
            before_send=lambda: continue_or_suspend(lease, runtime),
            while_waiting=lambda: continue_or_suspend(lease, runtime),
            may_be_anothers=lambda booking_id: runtime.commit(
                lambda connection: may_be_anothers(connection, runtime.encryption, lease, booking_id)
            ),
        )
    except Refused:
        return LookupResult.IMPOSSIBLE
    except Oversized:
        raise
    except XoneError as error:
        if uses_attempt(error):
            return LookupResult.UNAVAILABLE
        raise LookupSuspended(calls.wait_for_lookup(partner_id) or error.retry_after or 1.0) from None
    except CallsSuspended as suspended:
        if calls.wait() > 0 or calls.wait_for_lookup(partner_id) == 0:
            raise
        if calls.lookup_throttle.wait() == 0:  # another look-up has failed just before
            return LookupResult.UNAVAILABLE
        raise LookupSuspended(suspended.wait) from None
    return BookingReceived(booking, 200) if booking is not None else LookupResult.NOT_LISTED


def _not_put_back(lease: Lease, runtime: Runtime) -> AttemptResult:
    """The result for a confirmation that is too old to be put back once more. No call was made for it."""
    if must_look_up_first(lease.history):
        return BookingNotFound(LookupResult.UNAVAILABLE, earlier_error(lease.history))
    code = runtime.xone.calls.reason or "connect"
    status = int(code[5:]) if code.startswith("http-") else None
    return NotSent(code, f"no call could be made within RETRY_MAX_AGE; at last: {code}", status)


def put_back(lease: Lease, wait: float, runtime: Runtime) -> None:
    """Releases a lease without a call: the confirmation is due again in ``wait`` seconds, and uses up no attempt.

    Raises LeaseLost.
    """
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

"""What must hold before a call to XONE: a slot under the rate limit, and a lease that outlasts the call.

The lease is ensured twice: before a connection is looked for, and when it stands, before anything is sent. So is, for
a confirm call, that the order has not ended: it was not withdrawn, and its confirm_by has not passed by the database's
clock. The statement that gives or renews the lease says both.
"""

import time
from contextlib import suppress

from sqlalchemy.exc import SQLAlchemyError

from tasks.lease import CallUnwanted, Lease, LeaseLost, renew
from worker.runtime import Runtime
from worker.storage.rate_limiter import MAX_WAIT, reserve_slot
from worker.xone.circuit_breaker import CallsSuspended

SLOW_RENEWAL_DELAY = 1.0  # seconds until a call is tried again whose lease could not be renewed in time


def before_call(lease: Lease, runtime: Runtime) -> None:
    """Waits for a slot under the rate limit and ensures that the lease outlasts a call.

    Raises CallsSuspended if no slot is near or the process stops, and LeaseLost.
    """
    rate = runtime.xone_settings.XONE_RATE_LIMIT
    if rate is not None and not runtime.shutting_down.is_set():
        wait_for_slot(runtime, rate)
    continue_or_suspend(lease, runtime)


def continue_or_suspend(lease: Lease, runtime: Runtime) -> None:
    """Raises CallsSuspended if this process stops; otherwise ensures that the lease outlasts a call."""
    if runtime.shutting_down.is_set():
        raise CallsSuspended(0.0)
    ensure_lease(lease, runtime)


def before_confirm(lease: Lease, runtime: Runtime) -> None:
    """As ``before_call``, for a confirm call: raises CallUnwanted too."""
    before_call(lease, runtime)
    ensure_wanted(lease, runtime)


def before_confirm_is_sent(lease: Lease, runtime: Runtime) -> None:
    """As ``continue_or_suspend``, for a confirm call: raises CallUnwanted too."""
    continue_or_suspend(lease, runtime)
    ensure_wanted(lease, runtime)


def ensure_wanted(lease: Lease, runtime: Runtime) -> None:
    """Raises CallUnwanted if the order has ended. Asks the database only where confirm_by is near or has passed."""
    if lease.order_ended is None and time.monotonic() >= lease.call_until:
        renew_lease(lease, runtime)
    if lease.order_ended is not None:
        raise CallUnwanted


def wait_for_slot(runtime: Runtime, rate: float) -> None:
    """Waits for a slot under XONE_RATE_LIMIT. Raises CallsSuspended if none is near.

    rate: calls a second, over all workers.
    """
    wait = runtime.in_transaction("reserve slot", lambda connection: reserve_slot(connection, rate))
    if wait is None:
        raise CallsSuspended(MAX_WAIT * (1.0 + runtime.dice()))
    if wait > 0 and runtime.shutting_down.wait(wait):
        raise CallsSuspended(0.0)


def ensure_lease(lease: Lease, runtime: Runtime) -> None:
    """Renews the lease if too little of it is left for a call.

    Raises LeaseLost, and CallsSuspended if the database took so long that too little of the new lease is left.
    """
    if not _outlasts_a_call(lease, runtime):
        renew_lease(lease, runtime)


def renew_lease(lease: Lease, runtime: Runtime) -> None:
    """Renews the lease. Raises as ``ensure_lease`` does."""
    asked_at = time.monotonic()
    lease_seconds = runtime.xone_settings.lease_seconds
    runtime.in_transaction("renew lease", lambda connection: renew(connection, lease, lease_seconds))
    lease.leased_at = asked_at
    if time.monotonic() - asked_at >= lease_seconds - runtime.xone_settings.XONE_TIMEOUT:
        raise CallsSuspended(SLOW_RENEWAL_DELAY)


def keep_lease(lease: Lease, runtime: Runtime) -> None:
    """As ``ensure_lease``, once, if the database takes it and the lease is still there."""
    if _outlasts_a_call(lease, runtime):
        return
    asked_at = time.monotonic()
    with suppress(LeaseLost, SQLAlchemyError):
        runtime.commit_once(lambda connection: renew(connection, lease, runtime.xone_settings.lease_seconds))
        lease.leased_at = asked_at


def _outlasts_a_call(lease: Lease, runtime: Runtime) -> bool:
    settings = runtime.xone_settings
    return time.monotonic() - lease.leased_at < (settings.lease_seconds - settings.XONE_TIMEOUT) / 2


def seconds_until_calls(runtime: Runtime) -> float:
    """Seconds until this process may call XONE; 0 if it may now. Jittered by up to a second, to spread the calls."""
    wait = runtime.xone.calls.wait()
    return wait + runtime.dice() if wait > 0 else 0.0

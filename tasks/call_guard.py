"""What must hold before a call to XONE: a slot under the rate limit, and a lease that outlasts the call."""

import time

from tasks.lease import Lease, renew
from worker.observability import tracing
from worker.outages import retry_while_unavailable
from worker.runtime import Runtime
from worker.storage.rate_limiter import MAX_WAIT, reserve_slot
from worker.xone.circuit_breaker import CallsSuspended


def before_call(lease: Lease, runtime: Runtime) -> None:
    """Before each call: a turn under the rate limit, and a lease that outlasts the call. Raises Held and LeaseLost."""
    if runtime.xone_settings.XONE_RATE_LIMIT is not None and not runtime.shutting_down.is_set():
        wait_for_slot(runtime, runtime.xone_settings.XONE_RATE_LIMIT)
    continue_or_suspend(lease, runtime)


def continue_or_suspend(lease: Lease, runtime: Runtime) -> None:
    """Raises Held where this process stops; else sees to it that the lease outlasts a call, or raises LeaseLost."""
    if runtime.shutting_down.is_set():
        raise CallsSuspended(0.0)
    ensure_lease(lease, runtime)


def wait_for_slot(runtime: Runtime, rate: float) -> None:
    """Waits for a turn under XONE_RATE_LIMIT. Raises Held where none is near."""

    def take() -> float | None:
        with runtime.engine.begin() as connection:
            return reserve_slot(connection, rate)

    with tracing.transaction("take turn", runtime.engine):
        wait = retry_while_unavailable(take, runtime.shutting_down)
    if wait is None:
        raise CallsSuspended(MAX_WAIT * (1.0 + runtime.dice()))
    if wait > 0 and runtime.shutting_down.wait(wait):
        raise CallsSuspended(0.0)


def ensure_lease(lease: Lease, runtime: Runtime) -> None:
    """The lease must outlast a call: renews it where too little is left. Raises LeaseLost."""
    settings = runtime.xone_settings
    spare = (settings.lease_seconds - settings.XONE_TIMEOUT) / 2
    if time.monotonic() - lease.leased_at < spare:
        return
    asked_at = time.monotonic()

    def extend() -> None:
        with runtime.engine.begin() as connection:
            renew(connection, lease, settings.lease_seconds)

    with tracing.transaction("renew lease", runtime.engine):
        retry_while_unavailable(extend, runtime.shutting_down)
    lease.leased_at = asked_at


def seconds_until_calls(runtime: Runtime) -> float:
    """Seconds until XONE may be called by this process; 0 where it may now. Spread, so that not all come at once."""
    wait = runtime.xone.circuit_breaker.wait()
    return wait + runtime.dice() if wait > 0 else 0.0

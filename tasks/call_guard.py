"""What must hold before a call to XONE: a slot under the rate limit, and a lease that outlasts the call."""

import time

from tasks.lease import Lease, renew
from worker.observability import tracing
from worker.outages import patiently
from worker.runtime import Process
from worker.storage.rate_limiter import HORIZON, take_turn
from worker.xone.circuit_breaker import CallsSuspended


def before_call(lease: Lease, process: Process) -> None:
    """Before each call: a turn under the rate limit, and a lease that outlasts the call. Raises Held and LeaseLost."""
    if process.xone_settings.XONE_RATE_LIMIT is not None and not process.stopping.is_set():
        wait_for_turn(process, process.xone_settings.XONE_RATE_LIMIT)
    go_on(lease, process)


def go_on(lease: Lease, process: Process) -> None:
    """Raises Held where this process stops; else sees to it that the lease outlasts a call, or raises LeaseLost."""
    if process.stopping.is_set():
        raise CallsSuspended(0.0)
    ensure_lease(lease, process)


def wait_for_turn(process: Process, rate: float) -> None:
    """Waits for a turn under XONE_RATE_LIMIT. Raises Held where none is near."""

    def take() -> float | None:
        with process.engine.begin() as connection:
            return take_turn(connection, rate)

    with tracing.transaction("take turn", process.engine):
        wait = patiently(take, process.stopping)
    if wait is None:
        raise CallsSuspended(HORIZON * (1.0 + process.dice()))
    if wait > 0 and process.stopping.wait(wait):
        raise CallsSuspended(0.0)


def ensure_lease(lease: Lease, process: Process) -> None:
    """The lease must outlast a call: renews it where too little is left. Raises LeaseLost."""
    settings = process.xone_settings
    spare = (settings.lease_seconds - settings.XONE_TIMEOUT) / 2
    if time.monotonic() - lease.leased_at < spare:
        return
    asked_at = time.monotonic()

    def extend() -> None:
        with process.engine.begin() as connection:
            renew(connection, lease, settings.lease_seconds)

    with tracing.transaction("renew lease", process.engine):
        patiently(extend, process.stopping)
    lease.leased_at = asked_at


def until_calls(process: Process) -> float:
    """Seconds until XONE may be called by this process; 0 where it may now. Spread, so that not all come at once."""
    wait = process.xone.circuit_breaker.wait()
    return wait + process.dice() if wait > 0 else 0.0

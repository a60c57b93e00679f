"""Whether a call to XONE may be made now: circuit breaker and throttle, as one, for one process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from worker.errors import XoneError
from worker.xone.circuit_breaker import CallsSuspended, CircuitBreaker, is_outage
from worker.xone.throttle import Throttle, is_throttling


class CallControl:
    """``with calls.guard():`` stands around each call. Threads share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: monotonic seconds."""
        self.circuit_breaker = CircuitBreaker(clock)
        self.throttle = Throttle(clock)
        self.lookup_throttle = Throttle(clock)  # of the list of bookings: its 429 does not stop confirm calls

    @property
    def is_half_open(self) -> bool:
        """Whether only one call at a time may pass."""
        return self.circuit_breaker.is_half_open

    def wait(self) -> float:
        """Seconds until a call may pass; 0 if one may now."""
        return max(self.circuit_breaker.wait(), self.throttle.wait())

    def wait_for_lookup(self) -> float:
        """Seconds until the list of bookings may be read; 0 if it may now."""
        return max(self.wait(), self.lookup_throttle.wait())

    @contextmanager
    def guard(self, proves: bool = True) -> Iterator[None]:
        """Lets one call pass, and learns from what it raises. Raises CallsSuspended if none may pass.

        proves: as in CircuitBreaker.guard. A call that does not prove anything has a throttle of its own.
        """
        throttle = self.throttle if proves else self.lookup_throttle
        wait = max(self.throttle.wait(), throttle.wait())
        if wait > 0:
            raise CallsSuspended(max(wait, self.circuit_breaker.wait()))
        try:
            with self.circuit_breaker.guard(proves):
                yield
        except XoneError as error:
            if is_throttling(error):
                throttle.throttle(error.retry_after)
            elif not is_outage(error):
                throttle.reset()
            raise
        else:
            throttle.reset()

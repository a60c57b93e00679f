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

    @property
    def is_half_open(self) -> bool:
        """Whether only one call at a time may pass."""
        return self.circuit_breaker.is_half_open

    def wait(self) -> float:
        """Seconds until a call may pass; 0 if one may now."""
        return max(self.circuit_breaker.wait(), self.throttle.wait())

    @contextmanager
    def guard(self, proves: bool = True) -> Iterator[None]:
        """Lets one call pass, and learns from what it raises. Raises CallsSuspended if none may pass.

        proves: as in CircuitBreaker.guard.
        """
        wait = self.throttle.wait()
        if wait > 0:
            raise CallsSuspended(max(wait, self.circuit_breaker.wait()))
        try:
            with self.circuit_breaker.guard(proves):
                yield
        except XoneError as error:
            if is_throttling(error):
                self.throttle.throttle(error.retry_after)
            elif proves and not is_outage(error):
                self.throttle.reset()
            raise
        else:
            if proves:
                self.throttle.reset()

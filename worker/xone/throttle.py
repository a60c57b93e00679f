"""Throttling: after a 429, no call passes for as long as XONE asks (its ``Retry-After``).

Without ``Retry-After`` the wait is 1, 2, 4, … 60 seconds while 429s go on. A 429 is pressure and no failure: it does
not count for the circuit breaker.
"""

import time
from collections.abc import Callable
from threading import Lock

from models.call_stop import CallStop
from worker.backoff import exponential
from worker.errors import Busy, XoneError
from worker.observability import metrics

INITIAL_THROTTLE, MAX_THROTTLE = 1.0, 60.0  # seconds after a 429 without Retry-After


class Throttle:
    """The wait that XONE asks of this process. Threads share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._in_a_row = 0  # 429s since the last call that was answered otherwise
        self._since = 0.0  # of the clock: the first of them
        self._until = 0.0  # of the clock

    def wait(self) -> float:
        """Seconds until a call may pass; 0 if one may now."""
        return max(self._until - self._clock(), 0.0)

    def stop(self) -> CallStop | None:
        """What is known of the wait; None while calls pass."""
        if (wait := self.wait()) == 0:
            return None
        return CallStop("http-429", self._clock() - self._since, ends_in=wait)

    def throttle(self, retry_after: float | None) -> None:
        """XONE answered 429. retry_after: seconds that it asks for, if it does."""
        metrics.slowed_down()
        with self._lock:
            if retry_after is None and self.wait() > 0:
                return  # to a call that was under way: it says nothing new
            seconds = retry_after or exponential(INITIAL_THROTTLE, self._in_a_row, MAX_THROTTLE)
            if self._in_a_row == 0 and self.wait() == 0:
                self._since = self._clock()
            self._until = max(self._until, self._clock() + seconds)
            self._in_a_row += 1

    def reset(self) -> None:
        """A call was answered: the next 429 is the first again. A wait that was asked for goes on."""
        self._in_a_row = 0


def is_throttling(error: XoneError | None) -> bool:
    """Whether an error is a 429."""
    return isinstance(error, Busy) and error.http_status == 429

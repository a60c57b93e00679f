"""The gate before XONE, one for a process: a circuit breaker, and the pauses that XONE asks for.

closed    calls pass. RUN failures in a row that say "XONE is down", or one that says "wrong credentials", open it.
open      no call passes. Those who wanted to call put their confirmation back; no attempt is used up.
half-open after a pause one call passes as a probe. An answer closes the gate; none makes the next pause longer:
          1, 2, 4, 5, 5, … seconds. Where the list of bookings fails, one more call may pass, for XONE may confirm
          though its list is broken.

A 429 lets nothing pass for as long as it asks; without Retry-After for 1, 2, 4, … 60 seconds while 429s go on.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import structlog

from worker.errors import BadCredentials, Busy, NotSent, Unknown, XoneError
from worker.observability import metrics
from worker.observability.sentry import report

log = structlog.get_logger(__name__)

FAILURE_THRESHOLD = 5  # failures
FIRST_PROBE_DELAY, MAX_PROBE_DELAY = 1.0, 5.0  # seconds between probes
FIRST_THROTTLE, MAX_THROTTLE = 1.0, 60.0  # seconds after a 429 that names none
DOWN_CODES = frozenset({"timeout", "connection-lost", "bad-answer"})  # the last: a page for all, such as of maintenance


class CallsSuspended(Exception):
    """No call may be made now; ``wait``: seconds until it is worth trying again."""

    def __init__(self, wait: float) -> None:
        super().__init__(f"no call for {wait:.1f} s")
        self.wait = wait


class CircuitBreaker:
    """Threads share it. ``with gate.passing():`` around each call; it learns from what the call raises."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._failures = 0  # in a row
        self._open_reason: str | None = None  # code of the error that opened it
        self._probe_delay = FIRST_PROBE_DELAY
        self._probe_at = 0.0
        self._probe_in_flight = False
        self._list_failed = False  # as the last probe
        self._next_throttle = FIRST_THROTTLE
        self._throttled_until = 0.0

    @property
    def open_reason(self) -> str | None:
        """The code of the error that keeps calls from passing, or None."""
        return self._open_reason

    @property
    def is_half_open(self) -> bool:
        """Whether only one call at a time may pass."""
        return self._open_reason is not None

    def wait(self) -> float:
        """Seconds until a call may pass; 0 where one may now."""
        with self._lock:
            return self._wait()

    @contextmanager
    def guard(self, proves: bool = True) -> Iterator[None]:
        """Lets one call pass, and learns from how it ends. Raises Held where none may.

        proves: whether it shows that XONE confirms again, or does not; the list of bookings shows neither.
        """
        is_probe = self._enter()
        try:
            yield
        except XoneError as error:
            self._record(error, is_probe, proves)
            raise
        except BaseException:  # no call was made
            with self._lock:
                self._probe_in_flight = self._probe_in_flight and not is_probe
            raise
        else:
            self._record(None, is_probe, proves)

    def _wait(self) -> float:
        now = self._clock()
        slow = self._throttled_until - now
        if self._open_reason is None:
            return max(slow, 0.0)
        until_probe = FIRST_PROBE_DELAY if self._probe_in_flight else self._probe_at - now
        return max(slow, until_probe, 0.0)

    def _enter(self) -> bool:
        """Whether the call that passes is a probe."""
        with self._lock:
            wait = self._wait()
            if wait > 0:
                raise CallsSuspended(wait)
            self._probe_in_flight = self._open_reason is not None
            return self._probe_in_flight

    def _record(self, error: XoneError | None, is_probe: bool, proves: bool) -> None:
        with self._lock:
            self._probe_in_flight = self._probe_in_flight and not is_probe
            if isinstance(error, Busy) and error.http_status == 429:
                self._throttle(error)
            elif error is not None and (isinstance(error, BadCredentials) or _is_down(error)):
                self._record_failure(error, is_probe, proves or isinstance(error, BadCredentials | NotSent))
            elif proves:
                self._close()

    def _throttle(self, error: Busy) -> None:
        metrics.slowed_down()
        self._throttled_until = max(self._throttled_until, self._clock() + (error.retry_after or self._next_throttle))
        self._next_throttle = min(self._next_throttle * 2, MAX_THROTTLE)

    def _record_failure(self, error: XoneError, is_probe: bool, proves: bool) -> None:
        self._failures += 1
        if self._open_reason is not None:
            if is_probe and not proves and not self._list_failed:
                self._list_failed = True
            elif is_probe:
                self._list_failed = False
                self._probe_delay = min(self._probe_delay * 2, MAX_PROBE_DELAY)
                self._probe_at = self._clock() + self._probe_delay
        elif self._failures >= FAILURE_THRESHOLD or isinstance(error, BadCredentials):
            self._open_reason = error.code
            self._probe_delay = FIRST_PROBE_DELAY
            self._probe_at = self._clock() + self._probe_delay
            metrics.circuit_breaker_opened(error.code)
            log.warning("calls_pause", code=error.code, detail=error.detail)
            if isinstance(error, BadCredentials):
                report(error, code=error.code)

    def _close(self) -> None:
        if self._open_reason is not None:
            metrics.circuit_breaker_closed()
            log.info("calls_go_on", after_code=self._open_reason, failures=self._failures)
        self._failures = 0
        self._open_reason = None
        self._list_failed = False
        self._next_throttle = FIRST_THROTTLE


def _is_down(error: XoneError) -> bool:
    """Whether an error says that XONE is down, and not only that it has trouble with one offer."""
    if isinstance(error, NotSent):
        return True
    if isinstance(error, Busy):
        return error.http_status == 503
    by_status = error.http_status is not None and error.http_status >= 500
    return isinstance(error, Unknown) and (error.code in DOWN_CODES or by_status)

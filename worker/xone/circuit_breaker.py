"""The circuit breaker of one process: stops calls while XONE is down or refuses the credentials.

closed     Calls pass. FAILURE_THRESHOLD failures in a row that show an outage open it, and so does one refusal of the
           credentials.
open       No call passes. A confirmation that needed one is put back, and uses up no attempt.
half-open  After a delay one call passes as a probe. If XONE answers it, the breaker closes; if not, the next delay is
           longer: 1, 2, 4, 5, 5, … seconds.

Each partner's list of bookings has one of its own, since XONE may confirm though a list fails.

Source of the pattern: Michael Nygard, "Release It!", 2007.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import structlog

from models.call_stop import CallStop
from worker.backoff import exponential
from worker.errors import BadCredentials, Busy, NotSent, NotXone, Refused, Unknown, XoneError
from worker.observability import metrics
from worker.observability.sentry import report
from worker.xone.throttle import is_throttling

log = structlog.get_logger(__name__)

FAILURE_THRESHOLD = 5  # failures in a row
INITIAL_PROBE_DELAY, MAX_PROBE_DELAY = 1.0, 5.0  # seconds
OUTAGE_CODES = frozenset({"timeout", "connection-lost"})


class CallsSuspended(Exception):
    """No call may be made now. ``wait``: seconds until it is worth trying again."""

    def __init__(self, wait: float) -> None:
        super().__init__(f"no call for {wait:.1f} s")
        self.wait = wait


class CircuitBreaker:
    """``with circuit_breaker.guard():`` stands around each call. Threads share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: monotonic seconds."""
        self._clock = clock
        self._lock = Lock()
        self._failures = 0  # in a row
        self._opened_by: XoneError | None = None
        self._opened_at = 0.0  # of the clock
        self._failed_probes = 0
        self._probe_at = 0.0  # of the clock
        self._probe_in_flight = False

    @property
    def opened_by(self) -> XoneError | None:
        """The error that keeps calls from passing, or None."""
        return self._opened_by

    @property
    def open_reason(self) -> str | None:
        """The code of the error that keeps calls from passing, or None."""
        return self._opened_by.code if self._opened_by is not None else None

    def stop(self) -> CallStop | None:
        """What is known of its being open; None while calls pass."""
        with self._lock:
            if self._opened_by is None:
                return None
            return CallStop(self._opened_by.code, self._clock() - self._opened_at, probe_every=self._probe_delay())

    @property
    def is_half_open(self) -> bool:
        """Whether only one call at a time may pass."""
        return self._opened_by is not None

    def wait(self) -> float:
        """Seconds until a call may pass; 0 if one may now."""
        with self._lock:
            return self._wait()

    @contextmanager
    def guard(self, proves: bool = True) -> Iterator[None]:
        """Lets one call pass, and learns from what it raises. Raises CallsSuspended if none may pass.

        proves: whether the call shows that XONE confirms, or does not. The list of bookings shows neither. Its failures
        open nothing, unless XONE can't be reached at all or gives no token.
        """
        is_probe = self._enter()
        try:
            yield
        except XoneError as error:
            self._record(error, is_probe, proves)
            raise
        except GeneratorExit:  # who reads an answer has enough of it
            self._record(None, is_probe, proves)
            raise
        except BaseException:  # no call was made
            with self._lock:
                self._release_probe(is_probe)
            raise
        else:
            self._record(None, is_probe, proves)

    def _wait(self) -> float:
        if self._opened_by is None:
            return 0.0
        if self._probe_in_flight:
            return INITIAL_PROBE_DELAY
        return max(self._probe_at - self._clock(), 0.0)

    def _enter(self) -> bool:
        """Lets a call pass; whether it is a probe."""
        with self._lock:
            wait = self._wait()
            if wait > 0:
                raise CallsSuspended(wait)
            self._probe_in_flight = self._opened_by is not None
            return self._probe_in_flight

    def _release_probe(self, is_probe: bool) -> None:
        self._probe_in_flight = self._probe_in_flight and not is_probe

    def _record(self, error: XoneError | None, is_probe: bool, proves: bool) -> None:
        with self._lock:
            self._release_probe(is_probe)
            if error is not None and self._is_failure(error):
                if proves or isinstance(error, BadCredentials | NotSent):
                    self._record_failure(error, is_probe)
            elif proves and not is_throttling(error):
                self._close()

    def _record_failure(self, error: XoneError, is_probe: bool) -> None:
        self._failures += 1
        if is_probe:
            self._failed_probes += 1
            self._schedule_probe()
        elif self._opened_by is None and (self._failures >= self.threshold or isinstance(error, BadCredentials)):
            self._opened_by, self._opened_at = error, self._clock()
            self._failed_probes = 0
            self._schedule_probe()
            self._on_open(error)

    def _schedule_probe(self) -> None:
        self._probe_at = self._clock() + self._probe_delay()

    def _probe_delay(self) -> float:
        return exponential(INITIAL_PROBE_DELAY, self._failed_probes, self.max_probe_delay)

    def _close(self) -> None:
        if self._opened_by is not None:
            self._on_close(self._opened_by, self._failures)
        self._failures = 0
        self._opened_by = None

    # What differs for a list of bookings:
    threshold = FAILURE_THRESHOLD
    max_probe_delay = MAX_PROBE_DELAY

    def _is_failure(self, error: XoneError) -> bool:
        return is_outage(error)

    def _on_open(self, error: XoneError) -> None:
        metrics.circuit_breaker_opened(error.code)
        log.warning("calls_pause", code=error.code, detail=error.detail)
        if isinstance(error, BadCredentials):
            report(error, code=error.code)

    def _on_close(self, error: XoneError, failures: int) -> None:
        metrics.circuit_breaker_closed()
        log.info("calls_go_on", after_code=error.code, failures=failures)


class ListBreaker(CircuitBreaker):
    """The circuit breaker of a partner's list of bookings. One failure opens it, for each may cost a XONE_TIMEOUT."""

    threshold = 1
    max_probe_delay = 60.0

    def _is_failure(self, error: XoneError) -> bool:
        # What a 401 of a list means, the next confirm call shows.
        return not (isinstance(error, Refused) or is_throttling(error) or error.http_status == 401)

    def _on_open(self, error: XoneError) -> None:
        log.warning("lookups_pause", code=error.code, detail=error.detail)

    def _on_close(self, error: XoneError, failures: int) -> None:
        log.info("lookups_go_on", after_code=error.code, failures=failures)


def is_outage(error: XoneError) -> bool:
    """Whether an error shows that XONE is down or refuses the credentials, and is not about one offer or a 429."""
    if isinstance(error, NotSent | BadCredentials):
        return True
    if isinstance(error, Busy):
        return error.http_status not in (423, 429)
    has_server_error = error.http_status is not None and error.http_status >= 500
    is_unknown = isinstance(error, Unknown) and (error.code in OUTAGE_CODES or has_server_error)
    return is_unknown or isinstance(error, NotXone)

"""A duty that a worker does again and again beside its tasks, in a thread of its own: Scheduler and Relay."""

import time
from threading import Event, Thread

import structlog

from worker.backoff import exponential
from worker.observability.sentry import report
from worker.outages import unavailable_dependency

log = structlog.get_logger(__name__)

INITIAL_BACKOFF = 0.5  # seconds
MAX_BACKOFF = 15.0


class Service:
    """Calls ``turn`` until stopped. A turn that fails is tried again with growing pauses, and told once."""

    name = "loop"
    interval = 1.0  # seconds between turns that found nothing to do
    min_interval = (
        0.0  # seconds from the beginning of a turn to that of the next, at least: more gathers for it meanwhile
    )

    def __init__(self) -> None:
        self.wake = Event()
        self._stopping = Event()
        self._failures = 0  # in a row
        self.succeeded_at = 0.0  # time.time() of the last turn that did not fail
        self.ran_at = time.time()  # of the last turn, failed or not; before the first, of the start
        self.waits_for: str | None = None  # what the last turn failed for, where that is away
        self.lag = 0.0  # seconds that the last turn came late, since this process or the machine had too much to do
        self._thread = Thread(target=self._run, name=self.name, daemon=True)

    def run_once(self) -> bool:
        """One round of the duty; whether there is likely more to do at once."""
        raise NotImplementedError

    def on_success(self) -> None:
        """Called after each turn that did not fail."""
        self.succeeded_at = self.ran_at = time.time()
        self.waits_for = None

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the thread after the turn that it is in. timeout: seconds to wait for that."""
        self._stopping.set()
        self.wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self.close()

    def close(self) -> None:
        """Gives back what the turns held open."""

    def _run(self) -> None:
        pause, began = 0.0, float("-inf")
        while not self._stopping.is_set():
            ends_at = time.monotonic() + pause
            self.wake.wait(pause)
            self.lag = time.monotonic() - ends_at
            if self._stopping.wait(max(began + self.min_interval - time.monotonic(), 0.0)):
                return
            self.wake.clear()
            began = time.monotonic()
            pause = self._run_guarded()

    def _run_guarded(self) -> float:
        """Seconds until the next turn."""
        try:
            more = self.run_once()
        except Exception as error:
            self.ran_at, self.waits_for = time.time(), unavailable_dependency(error)
            if not self._failures:
                self._log_failure(error)
            self._failures += 1
            return exponential(INITIAL_BACKOFF, self._failures, MAX_BACKOFF)
        if self._failures:
            log.info("duty_goes_on", duty=self.name, after_failures=self._failures)
        self._failures = 0
        self.on_success()
        return 0.0 if more else self.interval

    def _log_failure(self, error: Exception) -> None:
        away = unavailable_dependency(error)
        if away is not None:
            log.warning("duty_waits", duty=self.name, waits_for=away, error=type(error).__name__)
        else:
            report(error, duty=self.name)

"""A background service: work that a worker repeats beside its tasks, in a thread of its own."""

import time
from threading import Event, Thread

import structlog

from worker.backoff import exponential
from worker.observability.sentry import report
from worker.outages import reason, unavailable_dependency
from worker.storage import database

log = structlog.get_logger(__name__)

INITIAL_BACKOFF = 0.5  # seconds
MAX_BACKOFF = 15.0


class Service:
    """Calls ``run_once`` until stopped. After an error it backs off; a row of errors is logged once."""

    name = "service"
    starts_work = False  # such a service stops when a warm shutdown begins, the others after the last task
    interval = 1.0  # seconds from the end of a run that left nothing to do to the next
    min_interval = 0.0  # seconds from the beginning of a run to that of the next, so that more work gathers

    def __init__(self) -> None:
        self.wake = Event()  # set: the next run comes at once
        self._stopping = Event()
        self._failures = 0  # in a row
        self.succeeded_at = 0.0  # time.time() of the last run without an error; 0.0 before the first
        self.ran_at = time.time()  # of the last run, with an error or not; before the first, of the start
        self.waits_for: str | None = None  # the unavailable dependency that made the last run fail
        self.lag = 0.0  # seconds by which the last run began late, because the process or the machine is overloaded
        self._thread = Thread(target=self._run, name=self.name, daemon=True)

    def run_once(self) -> bool:
        """Does a part of the work. Returns whether there is probably more to do at once."""
        raise NotImplementedError

    def on_success(self) -> None:
        """Called after each run without an error."""
        self.succeeded_at = self.ran_at = time.time()
        self.waits_for = None

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the thread after the current run, for which it waits ``timeout`` seconds, and closes the service."""
        self._stopping.set()
        self.wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self.close()

    def close(self) -> None:
        """Closes the connections that runs have opened."""

    def _run(self) -> None:
        wait, began = 0.0, float("-inf")
        while not self._stopping.is_set():
            ends_at = time.monotonic() + wait
            self.wake.wait(wait)
            self.lag = time.monotonic() - ends_at
            if self._stopping.wait(max(began + self.min_interval - time.monotonic(), 0.0)):
                return
            self.wake.clear()
            began = time.monotonic()
            wait = self._run_guarded()

    def _run_guarded(self) -> float:
        """Runs once. Returns the seconds until the next run."""
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
        if self.waits_for is not None:
            name, why = database.name_of(error), reason(error)
            log.warning("duty_waits", duty=self.name, waits_for=self.waits_for, error=name, reason=why)
        else:
            report(error, duty=self.name)

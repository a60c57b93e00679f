"""The metrics that a worker counts for Prometheus. Each event is counted by one function, called at one place.

Counting starts with ``begin``, which a worker with METRICS_PORT calls; until then each function costs one comparison.
The values of labels come from fixed lists, never from a partner, an offer or a text. Metrics of the backlog are read
from the database instead (worker.services.backlog_metrics). docs/metrics.md lists all of them.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, disable_created_metrics, values
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from models.event import BOOKING_EVENTS, EventType
from models.job import DEAD_LETTER_CODES
from models.states import ENDED, ERROR_CODES, Outcome, State

CALLS = ("confirm", "bookings", "token")
NO_ERROR = "none"
CODES = frozenset({*ERROR_CODES, *(f"http-{status.value}" for status in HTTPStatus)})
PUT_BACK_REASONS = ("defect", "dead-letter-refused")
OTHER = "other"  # an HTTP status that is not registered

CALL_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 300)  # seconds
JOB_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, 14400, 86400)
GROUP_BUCKETS = (1, 2, 5, 10, 20, 50)


class Instruments:
    """The metrics of one process."""

    def __init__(self, folder: Path | None) -> None:
        """folder: where processes that share their metrics keep the values in files; None for a single process."""
        self.folder = folder
        if folder is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # read by prometheus-client
        # prometheus-client chooses the class at import, which is too early. A new one, as a fork may copy a held lock.
        values.ValueClass = values.MultiProcessValue() if folder is not None else values.MutexValue
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"confirm_offer_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str, *labels: str) -> Gauge:  # the sum over live processes
            return Gauge(f"confirm_offer_{name}", meaning, labels, registry=registry, multiprocess_mode="livesum")

        self.jobs = counter("jobs", "Confirmations that ended, by the state they ended in", "outcome")
        self.attempts = counter("attempts", "Attempts that ended", "outcome", "code")
        self.dead_letters = counter("dead_letters", "Jobs that workers turned into dead letters", "code")
        self.token_refreshes = counter("token_refreshes", "Requests for a token", "result")
        self.circuit_breaker_openings = counter(
            "circuit_breaker_openings", "Times that calls to XONE were stopped, by the error", "code"
        )
        self.slowdowns = counter("slowdowns", "Answers of XONE that throttled the calls for a while (429)")
        self.bookings_changed = counter("bookings_changed", "Changes of bookings that a look at XONE showed", "type")
        self.lists_read = counter("lists_read", "Readings of lists of bookings to follow up pending ones", "result")
        self.events_published = counter("events_published", "Events that the broker has confirmed", "type")
        self.events_refused = counter("events_refused", "Events that the broker refused, counted at each try")
        self.resumes_refused = counter(
            "resumes_refused", "Resume messages that the broker refused, counted at each try"
        )
        self.messages_put_back = counter(
            "messages_put_back", "Messages that went back to their queue because they could not be handled", "reason"
        )
        self.put_off = counter("put_off", "Confirmations that could not be read, such as without their key")
        self.calls_in_flight = gauge("calls_in_flight", "Calls to XONE under way", "call")
        self.circuit_breaker_open = gauge(
            "circuit_breaker_open", "Processes whose calls to XONE are stopped by their circuit breaker"
        )
        self.call_duration = Histogram(
            "confirm_offer_call_duration_seconds", "Calls to XONE", ["call"], buckets=CALL_BUCKETS, registry=registry
        )
        self.job_to_event = Histogram(
            "confirm_offer_job_to_event_seconds",
            "From the publishing of a job to the broker's confirm of the first event of its confirmation",
            ["type"],
            buckets=JOB_BUCKETS,
            registry=registry,
        )
        self.group_size = Histogram(
            "confirm_offer_group_size", "Items stored in one transaction", buckets=GROUP_BUCKETS, registry=registry
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Creates the series with 0: Prometheus' increase() misses the first count of a new series."""
        for state in ENDED:
            self.jobs.labels(state)
        self.attempts.labels(Outcome.BOOKED, NO_ERROR)
        for code in DEAD_LETTER_CODES:
            self.dead_letters.labels(code)
        for reason in PUT_BACK_REASONS:
            self.messages_put_back.labels(reason)
        for result in ("ok", "failed"):
            self.token_refreshes.labels(result)
        self.circuit_breaker_openings.labels("credentials")
        for event_type in BOOKING_EVENTS:
            self.bookings_changed.labels(event_type)
        for result in ("ok", "failed"):
            self.lists_read.labels(result)
        for event_type in EventType:
            self.events_published.labels(event_type)
            self.job_to_event.labels(event_type)
        for call in CALLS:
            self.calls_in_flight.labels(call)
            self.call_duration.labels(call)

    def collector(self) -> Collector:
        """Collects the values; for several processes their sums, without the gauges of dead ones."""
        return self.registry if self.folder is None else _FilesCollector(self.folder)


class _FilesCollector(Collector):
    """Merges the files of several processes. Processes start and die, and other scrapes remove files, meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        files = []
        for path in self._folder.glob("*.db"):
            if path.name.startswith("gauge_live") and not is_alive(int(path.stem.rpartition("_")[2])):
                path.unlink(missing_ok=True)
                continue
            with suppress(FileNotFoundError):
                if path.stat().st_size:  # empty while its process creates it
                    files.append(str(path))
        yield from MultiProcessCollector.merge(files)


_instruments: Instruments | None = None


def begin(shared_folder: Path | None = None) -> Instruments:
    """Starts to count, in this process and those that it forks.

    shared_folder: for a pool of processes; a folder for their files is created in it, and those of killed workers are
    removed. Raises OSError where it can't be written to.
    """
    global _instruments
    folder = None
    if shared_folder is not None:
        for path in (shared_folder.parent, shared_folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for abandoned in shared_folder.glob("worker-*"):
            pid = abandoned.name.removeprefix("worker-")
            if pid.isdecimal() and not is_alive(int(pid)):
                shutil.rmtree(abandoned, ignore_errors=True)
        folder = shared_folder / f"worker-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
    _instruments = Instruments(folder)
    return _instruments


def end() -> None:
    """Stops counting, and removes the files of this worker."""
    global _instruments
    if _instruments is not None and _instruments.folder is not None:
        shutil.rmtree(_instruments.folder, ignore_errors=True)
    _instruments = None


def _begin_in_child() -> None:
    global _instruments
    if _instruments is not None:
        _instruments = Instruments(_instruments.folder)


os.register_at_fork(after_in_child=_begin_in_child)


def is_alive(pid: int) -> bool:
    """Whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def attempt_ended(outcome: Outcome, code: str | None, state: State | None) -> None:
    """code: of the error, if any; state: of the confirmation now, None where the attempt came too late to count."""
    if _instruments is not None:
        _instruments.attempts.labels(outcome, NO_ERROR if code is None else _known(code)).inc()
        if state in ENDED:
            _instruments.jobs.labels(state).inc()


def booking_changed(event_type: EventType) -> None:
    """A look at XONE showed that a booking has changed. event_type: one of BOOKING_EVENTS."""
    if _instruments is not None:
        _instruments.bookings_changed.labels(event_type).inc()


def list_read(result: str) -> None:
    """A partner's list of bookings was read, to follow up pending ones. result: "ok" or "failed"."""
    if _instruments is not None:
        _instruments.lists_read.labels(result).inc()


def stored_together(count: int) -> None:
    """count: jobs, leases or outcomes stored in one transaction."""
    if _instruments is not None:
        _instruments.group_size.observe(count)


@contextmanager
def calling(call: str) -> Iterator[None]:
    """Measures a call to XONE. call: one of CALLS."""
    if _instruments is None:
        yield
        return
    in_flight, duration = _instruments.calls_in_flight.labels(call), _instruments.call_duration.labels(call)
    in_flight.inc()
    started = time.monotonic()
    try:
        yield
    finally:
        duration.observe(time.monotonic() - started)
        in_flight.dec()


def token_refreshed(result: str) -> None:
    """result: "ok" or "failed"."""
    if _instruments is not None:
        _instruments.token_refreshes.labels(result).inc()


def circuit_breaker_opened(code: str) -> None:
    """code: of the error that stopped the calls to XONE."""
    if _instruments is not None:
        _instruments.circuit_breaker_openings.labels(_known(code)).inc()
        _instruments.circuit_breaker_open.set(1)


def circuit_breaker_closed() -> None:
    """Calls to XONE are possible again."""
    if _instruments is not None:
        _instruments.circuit_breaker_open.set(0)


def slowed_down() -> None:
    """XONE answered 429."""
    if _instruments is not None:
        _instruments.slowdowns.inc()


def dead_lettered(code: str) -> None:
    """A job has become a dead letter. code: x-dead-letter-code."""
    if _instruments is not None:
        _instruments.dead_letters.labels(code).inc()


def event_published(event_type: str, seconds: float | None) -> None:
    """The broker has confirmed an event. seconds: since its job was published; for a first event only."""
    if _instruments is not None:
        _instruments.events_published.labels(event_type).inc()
        if seconds is not None:
            _instruments.job_to_event.labels(event_type).observe(max(seconds, 0.0))


def events_refused(count: int) -> None:
    """The broker refused events; they are published again later."""
    if _instruments is not None:
        _instruments.events_refused.inc(count)


def resumes_refused(count: int) -> None:
    """The broker refused resume messages; their confirmations stay due."""
    if _instruments is not None:
        _instruments.resumes_refused.inc(count)


def message_put_back(reason: str) -> None:
    """A message went back to its queue. reason: one of PUT_BACK_REASONS."""
    if _instruments is not None:
        _instruments.messages_put_back.labels(reason).inc()


def put_off() -> None:
    """A confirmation could not be leased, because of a defect or a missing key; it is tried again later."""
    if _instruments is not None:
        _instruments.put_off.inc()


def _known(code: str) -> str:
    return code if code in CODES else OTHER

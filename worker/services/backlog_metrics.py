"""Metrics of the backlog: open confirmations, events and batches, read from the database when Prometheus asks.

The queries use indexes of open rows and count a bounded number of them. They run in a thread and on a connection of
their own: a slow database holds up neither the worker nor, for longer than TIMEOUT, the scrape.
"""

import time
from collections.abc import Iterator
from threading import Lock, Thread
from typing import Any, NamedTuple

import structlog
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Connection, Engine, func, select

from models.states import BatchState, State
from models.tables import Batch, BatchItem, Confirmation, OutboxEvent, Pause, is_pending
from worker.storage.database import in_literally, limit_statement_time, oldest_transaction, seconds_since
from worker.storage.pause_cache import ALL

log = structlog.get_logger(__name__)

MAX_ROWS = 100_000  # of a kind, counted at most
MAX_BATCHES = 20  # the oldest
TIMEOUT = 2.0  # seconds that a scrape waits for the database
MIN_AGE = 2.0  # seconds: a younger reading is served again
MAX_AGE = 30.0  # seconds: an older reading is not served

GAUGES = {
    "confirmations": (
        f"Confirmations that are open, pending at XONE, or wait for a review (at most {MAX_ROWS})",
        ["state"],
    ),
    "oldest_confirmation_seconds": (
        "How long the oldest of them has been open or pending, or has waited for a review",
        ["state"],
    ),
    "overdue_seconds": ("How long ago the most overdue confirmation was due", []),
    "outbox_events": (f"Events that are not published yet (at most {MAX_ROWS})", []),
    "outbox_lag_seconds": ("How long the oldest of them has waited", []),
    "batch_items": (f"Items of batches that have not ended (the oldest {MAX_BATCHES})", ["batch", "progress"]),
    "oldest_transaction_seconds": ("How long the oldest transaction has been open that another session has", []),
    "pauses": ("Pauses that a person has set, for all partners or for single ones", ["scope"]),
}
# By gauge, then by the values of its labels. None: there is no row to measure.
Backlog = dict[str, dict[tuple[str, ...], float | None]]


def read_backlog(connection: Connection) -> Backlog:
    """The current values of GAUGES."""
    open_rows: dict[str, Any] = {row.state: row for row in connection.execute(_OPEN)}
    states = {state.value: open_rows.get(state, _NO_ROWS) for state in (State.QUEUED, State.CONFIRMING, State.RETRYING)}
    states[State.PENDING.value] = connection.execute(_PENDING).one()
    states[State.NEEDS_REVIEW.value] = connection.execute(_IN_REVIEW).one()
    outbox = connection.execute(_UNPUBLISHED).one()
    paused = connection.execute(select(Pause.partner_id)).scalars().all()
    of_all_partners = paused.count(ALL)
    transaction = oldest_transaction(connection)
    return {
        "confirmations": {(state,): row.number for state, row in states.items()},
        "oldest_confirmation_seconds": {(state,): row.oldest for state, row in states.items()},
        "overdue_seconds": {(): max((row.overdue for row in open_rows.values()), default=None)},
        "outbox_events": {(): outbox.number},
        "outbox_lag_seconds": {(): outbox.oldest},
        "batch_items": _batch_progress(connection),
        "oldest_transaction_seconds": {(): transaction.seconds if transaction else 0.0},
        "pauses": {("all",): of_all_partners, ("partner",): len(paused) - of_all_partners},
    }


def _batch_progress(connection: Connection) -> dict[tuple[str, ...], float | None]:
    progress: dict[tuple[str, ...], float | None] = {}
    for batch in connection.execute(_OPEN_BATCHES):
        of_batch = _ITEMS.where(BatchItem.batch_id == batch.id)
        waiting = connection.execute(of_batch.where(BatchItem.fed_at.is_(None))).scalar_one()
        is_running = BatchItem.fed_at.is_not(None), BatchItem.ended_at.is_(None)
        running = connection.execute(of_batch.where(*is_running)).scalar_one()
        ended = batch.total - waiting - running
        progress |= {(str(batch.id), "waiting"): waiting, (str(batch.id), "running"): running}
        progress |= {(str(batch.id), "ended"): ended}
    return progress


class _NoRows(NamedTuple):
    number: int = 0
    oldest: float | None = None
    overdue: float | None = None


_NO_ROWS = _NoRows()
_due_first = (
    select(Confirmation.state, Confirmation.queued_at, Confirmation.due_at)
    .where(Confirmation.due_at.is_not(None))
    .order_by(Confirmation.due_at)
    .limit(MAX_ROWS)
    .subquery()
)
_OPEN = select(
    _due_first.c.state,
    func.count().label("number"),
    seconds_since(func.min(_due_first.c.queued_at)).label("oldest"),
    seconds_since(func.min(_due_first.c.due_at)).label("overdue"),
).group_by(_due_first.c.state)
_IN_REVIEW = select(
    func.count().label("number"), seconds_since(func.min(Confirmation.updated_at)).label("oldest")
).where(in_literally(Confirmation.state, [State.NEEDS_REVIEW]))
_oldest_pending = select(Confirmation.updated_at).where(is_pending()).limit(MAX_ROWS).subquery()
_PENDING = select(
    func.count().label("number"), seconds_since(func.min(_oldest_pending.c.updated_at)).label("oldest")
).select_from(_oldest_pending)
_oldest_events = (
    select(OutboxEvent.created_at)
    .where(OutboxEvent.published_at.is_(None))
    .order_by(OutboxEvent.created_at)
    .limit(MAX_ROWS)
    .subquery()
)
_UNPUBLISHED = select(
    func.count().label("number"), seconds_since(func.min(_oldest_events.c.created_at)).label("oldest")
).select_from(_oldest_events)
_OPEN_BATCHES = (
    select(Batch.id, Batch.total)
    .where(in_literally(Batch.state, [BatchState.RUNNING, BatchState.PAUSED]))
    .order_by(Batch.id)
    .limit(MAX_BATCHES)
)
_ITEMS = select(func.count()).select_from(BatchItem)


class Reading(NamedTuple):
    """at: time.monotonic() of the reading; took: seconds."""

    at: float
    took: float
    backlog: Backlog


class BacklogCollector(Collector):
    """Reads the backlog at most every MIN_AGE, and serves a reading until MAX_AGE; then its gauges are absent."""

    def __init__(self, engine: Engine) -> None:
        """engine: a separate one, so that a slow reading takes no connection from the tasks."""
        self._engine = engine
        self._lock = Lock()
        self._thread: Thread | None = None
        self._reading: Reading | None = None
        self._failed = False

    def collect(self) -> Iterator[GaugeMetricFamily]:
        reading = self._latest()
        failed = self._failed or not self._is_younger(reading, MIN_AGE + TIMEOUT)
        yield GaugeMetricFamily(
            "confirm_offer_database_scrape_failed", "1 if the database could not be read now", value=int(failed)
        )
        if reading is None:
            return
        yield GaugeMetricFamily(
            "confirm_offer_database_scrape_duration_seconds", "How long the last reading took", value=reading.took
        )
        for name, (meaning, labels) in GAUGES.items():
            gauge = GaugeMetricFamily(f"confirm_offer_{name}", meaning, labels=labels)
            for values, value in reading.backlog[name].items():
                gauge.add_metric(values, max(value or 0.0, 0.0))
            yield gauge

    def _latest(self) -> Reading | None:
        """Waits up to TIMEOUT for a reading. A thread that takes longer goes on; only the next reading waits for it."""
        with self._lock:
            is_reading = self._thread is not None and self._thread.is_alive()
            if not is_reading and not self._is_younger(self._reading, MIN_AGE):
                self._thread = Thread(target=self._read, name="scrape", daemon=True)
                self._thread.start()
            thread = self._thread
        if thread is not None:
            thread.join(TIMEOUT)
        return self._reading if self._is_younger(self._reading, MAX_AGE) else None

    @staticmethod
    def _is_younger(reading: Reading | None, seconds: float) -> bool:
        return reading is not None and time.monotonic() - reading.at < seconds

    def _read(self) -> None:
        started = time.monotonic()
        try:
            with self._engine.begin() as connection:
                limit_statement_time(connection, TIMEOUT)
                backlog = read_backlog(connection)
        except Exception as error:
            if not self._failed:
                log.warning("scrape_without_database", error=type(error).__name__)
            self._failed = True
        else:
            self._reading = Reading(time.monotonic(), time.monotonic() - started, backlog)
            self._failed = False

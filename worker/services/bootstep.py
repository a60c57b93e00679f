"""The step of Celery's worker that starts and stops the background services."""

import sys
from importlib.metadata import version
from typing import Any

import structlog
from celery import bootsteps
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.thread import TaskPool as ThreadPool

from worker import gevent_support
from worker.errors import SettingsError
from worker.observability import logs, metrics, tracing
from worker.runtime import LIMITS, current
from worker.services import health_file
from worker.services.cpu_affinity import CpuAffinity, is_supported, read_core_ticks
from worker.services.deletion import Deletion
from worker.services.follow_ups import FollowUps
from worker.services.health import Health
from worker.services.metrics_server import MetricsServer, WorkerMetrics
from worker.services.outbox_relay import OutboxRelay
from worker.services.retention import Retention
from worker.services.scheduler import Scheduler
from worker.services.service import Service
from worker.settings import DatabaseSettings, read
from worker.storage import database

log = structlog.get_logger(__name__)


class BackgroundServices(bootsteps.StartStopStep):  # type: ignore[misc]
    """What a worker runs beside its tasks, in threads.

    It starts after the pool, so that prefork forks without these threads. ``parent`` is Celery's WorkController.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._runtime = current()
        self._check_database()
        work = self._work_services()
        self.health = Health(self._runtime, work, consumes="tasks" in self._runtime.worker_settings.parts)
        self._is_pinned = self._stays_on_one_core(parent)
        affinity = [CpuAffinity(self._runtime.dice, read_core_ticks)] if self._is_pinned else []
        # They start and stop in this order.
        self._services: list[Service] = [*affinity, *work, self.health, *self._start_metrics(parent)]
        parent.background_services = self  # for the consumer, and for the end of the worker

    def _check_database(self) -> None:
        """Ends the program with one line if the database can't do what is needed. One that is away is waited for."""
        engine = database.connect(read(DatabaseSettings).url, connections=1, limits=LIMITS)
        try:
            if (reason := database.unusable(engine)) is not None:
                sys.stderr.write(f"confirm-offer: DATABASE_URL: {reason}\n")  # Celery would add a traceback to an error
                raise SystemExit(2)
        finally:
            engine.dispose()

    def _work_services(self) -> list[Service]:
        """Those that move confirmations and events on, as WORKER_PARTS says."""
        parts = self._runtime.worker_settings.parts
        services: list[Service] = []
        if "scheduler" in parts:
            services.append(Scheduler(self._runtime))
            retention = self._runtime.retention_settings
            if (days := retention.RETENTION_DAYS) is not None:
                services.append(Retention(self._runtime, days))
            deletion_days = retention.DELETE_AFTER_DAYS, retention.DELETE_EVENTS_AFTER_DAYS
            if deletion_days != (None, None):
                services.append(Deletion(self._runtime, *deletion_days))
            follow_up = self._runtime.follow_up_settings
            if follow_up.FOLLOW_UP_INTERVAL is not None and self._runtime.xone_settings.XONE_BOOKINGS_PATH:
                services.append(FollowUps(self._runtime, follow_up.FOLLOW_UP_INTERVAL, follow_up.FOLLOW_UP_MAX_AGE))
        if "relay" in parts:
            services.append(OutboxRelay(self._runtime))
        return services

    def _stays_on_one_core(self, parent: Any) -> bool:
        is_wanted = self._runtime.worker_settings.WORKER_ONE_CORE == "on"
        return is_wanted and issubclass(parent.pool_cls, ThreadPool) and is_supported()

    def _start_metrics(self, parent: Any) -> list[Service]:
        """Begins to count, before the pool forks. Returns the server of the metrics; none without METRICS_PORT."""
        port = self._runtime.worker_settings.METRICS_PORT
        if port is None:
            return []
        folder = self._runtime.worker_settings.PROMETHEUS_MULTIPROC_DIR
        forks = issubclass(parent.pool_cls, PreforkPool)
        try:
            instruments = metrics.begin(health_file.own_directory(folder) / "metrics" if forks else None)
        except OSError as error:
            place = folder or health_file.directory()
            reason = error.strerror or error
            raise SettingsError(f"PROMETHEUS_MULTIPROC_DIR: {place} can't be written to ({reason})") from None
        engine = database.connect(read(DatabaseSettings).url, connections=1, limits=LIMITS)
        return [MetricsServer(port, WorkerMetrics(instruments, engine, self.health.last_successes))]

    def start(self, parent: Any) -> None:
        logs.show_stacks_on_sigusr1()
        worker = self._runtime.worker_settings
        log.info(
            "worker_started",
            version=version("confirm-offer"),
            pool="gevent" if gevent_support.is_active() else worker.WORKER_POOL,
            concurrency=worker.WORKER_CONCURRENCY,
            one_core=self._is_pinned,
            parts=sorted(worker.parts),
            tracing=tracing.is_on(),
            sentry=self._runtime.sentry_settings.dsn is not None,
        )
        for service in self._services:
            service.start()

    def stop(self, parent: Any) -> None:
        """A warm shutdown: no new work is dispatched. The Relay runs on until the last task has ended."""
        self._start_no_work()
        parent.consumer.drain()

    def terminate(self, parent: Any) -> None:
        self._start_no_work()

    def _start_no_work(self) -> None:
        self.health.is_stopping = True
        for service in self._services:
            if service.starts_work:
                service.stop()

    def end(self) -> None:
        """The last task has ended. The Relay publishes its event before it stops."""
        for service in self._services:
            if not service.starts_work:
                service.stop()
        metrics.end()

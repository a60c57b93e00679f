"""The step of Celery's worker that starts the background services and stops them."""

from importlib.metadata import version
from typing import Any

import structlog
from celery import bootsteps
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.thread import TaskPool as ThreadPool

from worker import gevent_support
from worker.errors import SettingsError
from worker.observability import metrics, tracing
from worker.runtime import current
from worker.services import health_file
from worker.services.cpu_affinity import CpuAffinity, is_supported, read_core_ticks
from worker.services.health import Health
from worker.services.metrics_server import MetricsServer, WorkerMetrics
from worker.services.outbox_relay import OutboxRelay
from worker.services.retention import Retention
from worker.services.scheduler import Scheduler
from worker.settings import DatabaseSettings, read
from worker.storage import database

log = structlog.get_logger(__name__)


class BackgroundServices(bootsteps.StartStopStep):  # type: ignore[misc]
    """What this worker does beside its tasks, in threads: Scheduler, Retention, Relay, and what looks after itself.

    Started after the pool, so that prefork forks without them.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._runtime = current()
        parts = self._runtime.worker_settings.parts
        self._scheduler = Scheduler(self._runtime) if "scheduler" in parts else None
        days = self._runtime.retention_days if self._scheduler is not None else None
        self._retention = Retention(self._runtime, days) if days is not None else None
        self._relay = OutboxRelay(self._runtime) if "relay" in parts else None
        services = [service for service in (self._scheduler, self._retention, self._relay) if service is not None]
        self.health = Health(self._runtime, services, consumes="tasks" in parts)
        self._scrapes = self._start_metrics(parent)
        stays = (
            self._runtime.worker_settings.WORKER_ONE_CORE == "on"
            and issubclass(parent.pool_cls, ThreadPool)
            and is_supported()
        )
        self._one_core = CpuAffinity(self._runtime.dice, read_core_ticks) if stays else None
        parent.background_services = self  # for the consumer, and for _flush

    def _start_metrics(self, parent: Any) -> MetricsServer | None:
        """What is asked for metrics, where METRICS_PORT is set. Counting begins before the pool forks."""
        port = self._runtime.worker_settings.METRICS_PORT
        if port is None:
            return None
        folder = self._runtime.worker_settings.PROMETHEUS_MULTIPROC_DIR or health_file.directory() / "metrics"
        forks = issubclass(parent.pool_cls, PreforkPool)
        try:
            instruments = metrics.begin(several_in=folder if forks else None)
        except OSError as error:
            raise SettingsError(f"PROMETHEUS_MULTIPROC_DIR: {folder} can't be written to ({error.strerror})") from None
        engine = database.connect(read(DatabaseSettings).url, connections=1)
        return MetricsServer(port, WorkerMetrics(instruments, engine, self.health.notes))

    def start(self, parent: Any) -> None:
        worker = self._runtime.worker_settings
        log.info(
            "worker_started",
            version=version("confirm-offer"),
            pool="gevent" if gevent_support.is_active() else worker.WORKER_POOL,
            concurrency=worker.WORKER_CONCURRENCY,
            one_core=self._one_core is not None,
            parts=sorted(worker.parts),
            tracing=tracing.is_on(),
            sentry=self._runtime.sentry_settings.dsn is not None,
        )
        for service in (self._one_core, self._scheduler, self._retention, self._relay, self.health, self._scrapes):
            if service is not None:
                service.start()

    def stop(self, parent: Any) -> None:
        """A warm shutdown begins: nothing new is dispatched; the Relay goes on until the last task has ended."""
        self.health.is_stopping = True
        for service in (self._scheduler, self._retention):
            if service is not None:
                service.stop()

    def terminate(self, parent: Any) -> None:
        self.stop(parent)

    def end(self) -> None:
        """The last task has ended: its event is published."""
        if self._relay is not None:
            self._relay.flush()
        for service in (self._one_core, self.health, self._scrapes):
            if service is not None:
                service.stop()
        metrics.end()

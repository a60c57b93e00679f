"""The Celery application: ``celery -A worker worker`` and ``confirm-offer worker`` run it.

Beside the tasks, a worker runs Scheduler and Relay; WORKER_PARTS switches parts off.
"""

import gc
import sys
from importlib.metadata import version
from typing import Any

import structlog
from celery import Celery, bootsteps, signals
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.thread import TaskPool as ThreadPool

from worker import green, vitals
from worker.errors import SettingsError
from worker.health import Health
from worker.messaging import broker, topology
from worker.observability import logs, metrics, sentry, tracing
from worker.one_core import OneCore, can_choose, ticks_of_cores
from worker.process import Process, current
from worker.relay import Relay
from worker.retention import Retention
from worker.scheduler import Scheduler
from worker.scrape import Exposed, Scrapes
from worker.settings import DatabaseSettings, LogSettings, TracingSettings, read
from worker.storage import database

log = structlog.get_logger(__name__)

# Seconds for one answer of RabbitMQ: without them a worker that is told to stop would wait for ever for one that hangs.
BROKER_PATIENCE = {"read_timeout": 15, "write_timeout": 15}


def make_app(process: Process) -> Celery:
    """A Celery application for the settings of a process. Raises SettingsError."""
    process.check_settings()
    if process.worker.WORKER_POOL == "gevent":
        green.check()
    is_memory = process.broker.url.startswith("memory")
    broker_url, tls = broker.with_tls(process.broker.url)
    app = Celery("confirm-offer", set_as_current=True)
    app.conf.update(
        broker_url=broker_url,
        broker_use_ssl=tls,
        broker_transport_options={"polling_interval": 0.01} if is_memory else BROKER_PATIENCE,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        # Above the longest drain of a warm shutdown, one call: no heartbeat is sent in it with the threads pool.
        broker_heartbeat=0 if is_memory else max(60, round(2 * process.xone_settings.XONE_TIMEOUT)),
        task_queues=(topology.jobs_queue, topology.resume_queue),
        task_create_missing_queues=False,
        task_acks_late=True,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        accept_content=["json"],
        imports=("tasks.celery_tasks",),
        worker_consumer="worker.messaging.consumer:PlainConsumer",
        **({} if green.is_on() else {"worker_pool": process.worker.WORKER_POOL}),  # Celery has -P for gevent
        worker_concurrency=process.worker.WORKER_CONCURRENCY,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_soft_shutdown_timeout=0,
        enable_utc=True,
        timezone="UTC",
    )
    if "tasks" not in process.worker.parts:
        app.amqp.queues.deselect([topology.JOBS, topology.RESUME])
    app.steps["worker"].add(Duties)
    return app


class Duties(bootsteps.StartStopStep):  # type: ignore[misc]
    """What this worker does beside its tasks, in threads: Scheduler, Retention, Relay, and what looks after itself.

    Started after the pool, so that prefork forks without them.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._process = current()
        parts = self._process.worker.parts
        self._scheduler = Scheduler(self._process) if "scheduler" in parts else None
        days = self._process.retention_days if self._scheduler is not None else None
        self._retention = Retention(self._process, days) if days is not None else None
        self._relay = Relay(self._process) if "relay" in parts else None
        duties = [duty for duty in (self._scheduler, self._retention, self._relay) if duty is not None]
        self.health = Health(self._process, duties, consumes="tasks" in parts)
        self._scrapes = self._counting(parent)
        stays = (
            self._process.worker.WORKER_ONE_CORE == "on" and issubclass(parent.pool_cls, ThreadPool) and can_choose()
        )
        self._one_core = OneCore(self._process.dice, ticks_of_cores) if stays else None
        parent.duties = self  # for the consumer, and for _flush

    def _counting(self, parent: Any) -> Scrapes | None:
        """What is asked for metrics, where METRICS_PORT is set. Counting begins before the pool forks."""
        port = self._process.worker.METRICS_PORT
        if port is None:
            return None
        folder = self._process.worker.PROMETHEUS_MULTIPROC_DIR or vitals.folder() / "metrics"
        forks = issubclass(parent.pool_cls, PreforkPool)
        try:
            instruments = metrics.begin(several_in=folder if forks else None)
        except OSError as error:
            raise SettingsError(f"PROMETHEUS_MULTIPROC_DIR: {folder} can't be written to ({error.strerror})") from None
        engine = database.connect(read(DatabaseSettings).url, connections=1)
        return Scrapes(port, Exposed(instruments, engine, self.health.notes))

    def start(self, parent: Any) -> None:
        worker = self._process.worker
        log.info(
            "worker_started",
            version=version("confirm-offer"),
            pool="gevent" if green.is_on() else worker.WORKER_POOL,
            concurrency=worker.WORKER_CONCURRENCY,
            one_core=self._one_core is not None,
            parts=sorted(worker.parts),
            tracing=tracing.is_on(),
            sentry=self._process.sentry.dsn is not None,
        )
        for duty in (self._one_core, self._scheduler, self._retention, self._relay, self.health, self._scrapes):
            if duty is not None:
                duty.start()

    def stop(self, parent: Any) -> None:
        """A warm shutdown begins: nothing new is dispatched; the Relay goes on until the last task has ended."""
        self.health.is_stopping = True
        for duty in (self._scheduler, self._retention):
            if duty is not None:
                duty.stop()

    def terminate(self, parent: Any) -> None:
        self.stop(parent)

    def end(self) -> None:
        """The last task has ended: its event is published."""
        if self._relay is not None:
            self._relay.flush()
        for duty in (self._one_core, self.health, self._scrapes):
            if duty is not None:
                duty.stop()
        metrics.end()


@signals.worker_shutdown.connect
def _flush(sender: Any, **_: Any) -> None:
    if (duties := getattr(sender, "duties", None)) is not None:
        duties.end()
    current().close()
    log.info("worker_stopped")
    _send_what_is_told()


@signals.worker_process_shutdown.connect
def _send_what_is_told(**_: Any) -> None:
    """Also of a process of the prefork pool."""
    tracing.flush()
    sentry.flush()


@signals.worker_shutting_down.connect
def _stop_waiting(**_: Any) -> None:
    current().stopping.set()


@signals.celeryd_init.connect  # comes before Celery's first warning
def _configure_logs_and_tracing(**_: Any) -> None:
    logs.configure(read(LogSettings))
    tracing.configure(read(TracingSettings))


@signals.celeryd_after_setup.connect  # comes when all is imported, and before the pool forks
def _collect_no_modules(**_: Any) -> None:
    """Spares garbage collections what stays for good: a full one stops all threads for 10 ms in place of 70."""
    gc.collect()
    gc.freeze()


@signals.setup_logging.connect
def _leave_logs_as_they_are(**_: Any) -> None:
    """With this connected, Celery sets up none of its own."""


def _application() -> Celery:
    """The application for Celery's own command line, which wants it at import. A wrong setting ends the program."""
    try:
        read(LogSettings)
        sentry.configure_sentry(current().sentry)
        return make_app(current())
    except SettingsError as error:
        sys.stderr.write(f"confirm-offer: {error}\n")
        raise SystemExit(2) from None


app = _application()

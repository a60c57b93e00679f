"""The Celery application: ``celery -A worker worker`` and ``confirm-offer worker`` run it.

Beside the tasks, a worker runs Scheduler and Relay; WORKER_PARTS switches parts off.
"""

import gc
import sys
from typing import Any

import structlog
from celery import Celery, signals

from worker import gevent_support
from worker.errors import SettingsError
from worker.messaging import broker, topology
from worker.observability import logs, sentry, tracing
from worker.runtime import Runtime, current
from worker.services.bootstep import BackgroundServices
from worker.settings import LogSettings, TracingSettings, read

log = structlog.get_logger(__name__)

# Seconds for one answer of RabbitMQ: without them a worker that is told to stop would wait for ever for one that hangs.
BROKER_PATIENCE = {"read_timeout": 15, "write_timeout": 15}


def make_app(runtime: Runtime) -> Celery:
    """A Celery application for the settings of a process. Raises SettingsError."""
    runtime.check_settings()
    if runtime.worker_settings.WORKER_POOL == "gevent":
        gevent_support.require()
    is_memory = runtime.broker_settings.url.startswith("memory")
    broker_url, tls = broker.with_tls(runtime.broker_settings.url)
    app = Celery("confirm-offer", set_as_current=True)
    app.conf.update(
        broker_url=broker_url,
        broker_use_ssl=tls,
        broker_transport_options={"polling_interval": 0.01} if is_memory else BROKER_PATIENCE,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        # Above the longest drain of a warm shutdown, one call: no heartbeat is sent in it with the threads pool.
        broker_heartbeat=0 if is_memory else max(60, round(2 * runtime.xone_settings.XONE_TIMEOUT)),
        task_queues=(topology.jobs_queue, topology.resume_queue),
        task_create_missing_queues=False,
        task_acks_late=True,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        accept_content=["json"],
        imports=("tasks.celery_tasks",),
        worker_consumer="worker.messaging.consumer:PlainConsumer",
        **(
            {} if gevent_support.is_active() else {"worker_pool": runtime.worker_settings.WORKER_POOL}
        ),  # Celery has -P for gevent
        worker_concurrency=runtime.worker_settings.WORKER_CONCURRENCY,
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
    if "tasks" not in runtime.worker_settings.parts:
        app.amqp.queues.deselect([topology.JOBS, topology.RESUME])
    app.steps["worker"].add(BackgroundServices)
    return app


@signals.worker_shutdown.connect
def _flush(sender: Any, **_: Any) -> None:
    if (services := getattr(sender, "background_services", None)) is not None:
        services.end()
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
    current().shutting_down.set()


@signals.celeryd_init.connect  # comes before Celery's first warning
def _configure_logs_and_tracing(**_: Any) -> None:
    logs.configure(read(LogSettings))
    tracing.configure(read(TracingSettings))


@signals.celeryd_after_setup.connect  # comes when all is imported, and before the pool forks
def _freeze_gc(**_: Any) -> None:
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
        sentry.configure_sentry(current().sentry_settings)
        return make_app(current())
    except SettingsError as error:
        sys.stderr.write(f"confirm-offer: {error}\n")
        raise SystemExit(2) from None


app = _application()

"""The Celery application of ``celery -A worker worker`` and ``confirm-offer worker``.

Beside the tasks, a worker runs background services (worker.services.bootstep); WORKER_PARTS switches parts off.
"""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import structlog
from celery import Celery, signals
from celery.app.amqp import AMQP
from celery.apps import worker as celery_program
from celery.concurrency import asynpool
from celery.worker import WorkController
from celery.worker import state as celery_state

from worker import celery_environment, core_dumps, gevent_support
from worker.errors import SettingsError
from worker.messaging import broker, topology
from worker.observability import logs, sentry, tracing, unread_output
from worker.runtime import Runtime, current
from worker.services.bootstep import BackgroundServices
from worker.services.vitals import Vitals
from worker.settings import LogSettings, TracingSettings, read

log = structlog.get_logger(__name__)

# Seconds to connect, and for one answer of RabbitMQ. Without them, a worker that is to stop waits for ever for a broker
# that hangs. With gevent, Celery takes away its own time-out for connecting.
BROKER_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 15, "write_timeout": 15}
EMBEDDED_SHUTDOWN_TIMEOUT = 15  # seconds


class ConnectingToAnyHost(AMQP):  # type: ignore[misc]
    """Celery's part for AMQP."""

    Connection = broker.AnyHost

    def TaskConsumer(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        """As Celery's, which declares its queues each time: see ConnectAndDeclare."""
        return super().TaskConsumer(*args, auto_declare=False, **kwargs)


def make_app(runtime: Runtime) -> Celery:
    """A Celery application with the settings of a process. Raises SettingsError for an invalid one."""
    if (obeyed := celery_environment.remove()) is not None:
        raise SettingsError(f"{obeyed}: Celery's command obeys it; remove it, or start 'confirm-offer worker' instead")
    runtime.check_settings()
    if runtime.worker_settings.WORKER_POOL == "gevent":
        gevent_support.require()
    is_memory = runtime.broker_settings.url.startswith("memory")
    broker_url, tls = broker.with_tls(runtime.broker_settings.url)
    app = Celery(
        "confirm-offer",
        set_as_current=True,
        loader="celery.loaders.app:AppLoader",  # without the file celeryconfig.py
        backend="disabled",
        amqp=ConnectingToAnyHost,
        fixups=set(),  # those of Django
    )
    app.conf.update(
        broker_url=broker_url,
        broker_read_url=broker_url,
        broker_write_url=broker_url,
        result_backend="disabled",
        broker_use_ssl=tls,
        broker_transport_options={"polling_interval": 0.01} if is_memory else BROKER_TIMEOUTS,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_heartbeat=0 if is_memory else broker.HEARTBEAT,
        broker_heartbeat_checkrate=4,  # a loop that is late by a heartbeat is still in time
        task_queues=(topology.jobs_queue, topology.resume_queue),
        task_create_missing_queues=False,
        task_acks_late=True,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        accept_content=["json"],
        imports=("tasks.celery_tasks",),
        worker_consumer="worker.messaging.consumer:PlainJsonConsumer",
        # Celery's option -P sets gevent.
        **({} if gevent_support.is_active() else {"worker_pool": runtime.worker_settings.WORKER_POOL}),
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


@contextmanager
def embedded_worker() -> Iterator[None]:
    """Runs a worker with a pool of threads inside this process until the block ends, then shuts it down warmly.

    It is the worker that ``confirm-offer worker`` runs. One at a time: Celery keeps a worker's state per process.
    """
    worker = WorkController(app=app, pool_cls="threads")
    thread = Thread(target=worker.start, name="worker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        celery_state.should_stop = 0  # an exit code: the consumer ends as after SIGTERM
        thread.join(EMBEDDED_SHUTDOWN_TIMEOUT)


@signals.worker_shutdown.connect
def _end_worker(sender: Any, **_: Any) -> None:
    """The last task has ended."""
    if (services := getattr(sender, "background_services", None)) is not None:
        services.end()
    current().close()
    log.info("worker_stopped")
    _flush_telemetry()


class _EndOfParent:
    """Tells the processes of the prefork pool that the worker stops, by a pipe: its end is the end of the parent."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()

    def tell(self) -> None:
        """In the parent: the worker stops. The kernel does the same if the parent dies."""
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1

    def follow(self) -> None:
        """In a child: its waits end with the worker."""
        self.tell()  # closes this process's copy
        Thread(target=self._wait, name="end-of-parent", daemon=True).start()

    def _wait(self) -> None:
        os.read(self._reading, 1)
        _stop_waiting()


_end_of_parent: _EndOfParent | None = None


@signals.worker_before_create_process.connect  # in the parent, before each process of the prefork pool
def _open_pipe(**_: Any) -> None:
    global _end_of_parent
    if _end_of_parent is None:
        _end_of_parent = _EndOfParent()


@signals.worker_process_init.connect  # in each process of the prefork pool
def _follow_parent(**_: Any) -> None:
    # billiard sets this handler of SIGUSR1 later. Its own one raises in the middle of a task.
    asynpool._pool.soft_timeout_sighandler = logs.write_stacks
    if _end_of_parent is not None:
        _end_of_parent.follow()
    Vitals(current(), is_child=True).start()


@signals.worker_process_shutdown.connect  # in each process of the prefork pool
def _flush_telemetry(**_: Any) -> None:
    tracing.flush()
    sentry.flush()


def _stop_waiting() -> None:
    current().stop()
    unread_output.drop_when_full()


@signals.worker_shutting_down.connect
def _interrupt_waits(**_: Any) -> None:
    _stop_waiting()
    if _end_of_parent is not None:
        _end_of_parent.tell()


@signals.celeryd_init.connect
def _forbid_core_dumps(**_: Any) -> None:
    """Of ``celery -A worker``; ``confirm-offer`` has done so already."""
    core_dumps.forbid()


@signals.celeryd_init.connect  # before Celery's first warning
def _configure_logs_and_tracing(**_: Any) -> None:
    logs.configure(read(LogSettings))
    tracing.configure(read(TracingSettings))
    of_our_own = ("CELERY_BROKER_URL", current().broker_settings.url)  # Celery's command has made it of BROKER_URL
    if ignored := sorted(name for name, value in celery_environment.removed.items() if (name, value) != of_our_own):
        log.warning("celery_variables_ignored", names=ignored)


def _say(message: str, stream: Any = sys.__stderr__) -> None:
    """As Celery's safe_say, which its handlers of signals call first. Says nothing where it would have to wait."""
    if unread_output.is_full(stream.fileno()):
        unread_output.drop_when_full()
    else:
        _safe_say(message, stream)


_safe_say, celery_program.safe_say = celery_program.safe_say, _say


@signals.celeryd_after_setup.connect  # in the main thread, before the pool forks
def _allow_interruption_of_logs(**_: Any) -> None:
    unread_output.allow_interruption()


@signals.celeryd_after_setup.connect
def _keep_hook_for_warnings(**_: Any) -> None:
    """Celery sends Python's warnings to logging, texts included: ours, which logs class and place, comes back."""
    logging.captureWarnings(False)


@signals.celeryd_after_setup.connect  # after all imports, before the pool forks
def _freeze_gc(**_: Any) -> None:
    """Freezes long-lived objects: a full collection pauses all threads for 10 ms instead of 70."""
    gc.collect()
    gc.freeze()


@signals.setup_logging.connect
def _keep_logging(**_: Any) -> None:
    """Does nothing. With a receiver of this signal, Celery does not configure logging."""


# Celery's own tools that lose jobs, or get no answer from a worker without remote control and events.
_NO_ANSWER = (
    "workers have no remote control and send no events; use 'confirm-offer health', 'confirm-offer doctor', the "
    "metrics (METRICS_PORT) and RabbitMQ's management"
)
_REFUSED_TOOLS = {
    "purge": "it would delete jobs without a trace; 'confirm-offer pause' stops calls, and jobs wait",
    **dict.fromkeys(("inspect", "status", "control", "events", "flower"), _NO_ANSWER),
}


def _refuse_tools(command: list[str]) -> None:
    """Ends the program at ``celery -A worker purge`` and others of _REFUSED_TOOLS. command: sys.argv."""
    if Path(command[0]).name == "celery" or command[0].endswith("/celery/__main__.py"):
        for tool in _REFUSED_TOOLS.keys() & set(command[1:]):
            raise SettingsError(f"celery {tool} is refused: {_REFUSED_TOOLS[tool]}")


def _app_of_process() -> Celery:
    """The application for Celery's command line, which needs it at import. Ends the program on an invalid setting."""
    try:
        _refuse_tools(sys.argv)
        read(LogSettings)
        sentry.configure_sentry(current().sentry_settings)
        return make_app(current())
    except SettingsError as error:
        sys.stderr.write(f"confirm-offer: {error}\n")
        raise SystemExit(2) from None


app = _app_of_process()

"""Logs: one line for each step that matters, as JSON or readable for people, with ids, states, codes and numbers.

Each line holds the log context of its thread (worker.observability.log_context). Celery's lines, Python's warnings and
uncaught exceptions have the same form.
"""

import faulthandler
import logging
import signal
import sys
import threading
import warnings
from types import TracebackType
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

from worker import gevent_support
from worker.errors import describe, where
from worker.formatting import printable
from worker.observability.log_context import bound
from worker.observability.sentry import report
from worker.settings import LogSettings

log = structlog.get_logger(__name__)

STANDARD_ERROR = 2  # the file descriptor
OURS = ("models", "tasks", "worker")
# Operators need what these loggers say of the worker and its connection, values included. They quote a message only
# where Celery decodes it, and ours are not decoded.
FORMATTED_LOGGERS = ("celery.apps.worker", "celery.worker.consumer.connection", "celery.worker.consumer.consumer")


def configure(settings: LogSettings, stream: TextIO = sys.stderr) -> None:
    """Sends all logs of this process, Celery's included, to ``stream`` in one form, and replaces Python's hooks for
    warnings and uncaught exceptions.
    """
    shared: list[Processor] = [
        _with_context,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _without_task_error,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception_without_text,
    ]
    last: list[Processor] = (
        [_fixed_order, structlog.processors.JSONRenderer()]
        if settings.LOG_FORMAT == "json"
        else [_for_people, structlog.dev.ConsoleRenderer(colors=stream.isatty(), sort_keys=False, pad_event_to=0)]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_unformatted, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # at lower levels, libraries log arguments, which may be personal data
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings quote what XONE answered
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # worker.observability.tracing logs it, once
    for name in OURS:
        logging.getLogger(name).setLevel(settings.LOG_LEVEL)
    logging.getLogger("celery").setLevel(max(logging.INFO, logging.getLevelName(settings.LOG_LEVEL)))
    task_logger = logging.getLogger("celery.app.trace")
    task_logger.setLevel(logging.WARNING)
    task_logger.addFilter(_is_no_reject)
    warnings.showwarning = _log_warning  # type: ignore[assignment]
    sys.excepthook = _report_uncaught
    threading.excepthook = _report_uncaught_in_thread
    sys.unraisablehook = _report_unraisable
    gevent_support.report_errors(lambda error: report(error, thread="greenlet"))


def silence() -> None:
    """For a command that uses parts of a worker: it tells by itself what they meet."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def show_stacks_on_sigusr1() -> None:
    """Makes SIGUSR1 write_stacks(). Celery's own handler adds the local variables, with names, e-mails and tokens."""
    faulthandler.register(signal.SIGUSR1, file=STANDARD_ERROR, all_threads=True)


def write_stacks(*_: Any) -> None:
    """Writes the stacks of all threads to standard error: places in the code, and no values. A handler of signals."""
    faulthandler.dump_traceback(file=STANDARD_ERROR, all_threads=True)


def _with_context(_logger: Any, _method: str, event: EventDict) -> EventDict:
    return {**bound(), **event}


def _fixed_order(_logger: Any, _method: str, event: EventDict) -> EventDict:
    return {name: event.pop(name, None) for name in ("timestamp", "level", "event")} | dict(event)


def _for_people(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """For a terminal: the time of day, the offer instead of ids that stand for it, and no empty values."""
    names = ("timestamp", "level", "event", "offer_id", "partner_id", "attempt", "state", "outcome", "code")
    first = {name: event.pop(name) for name in names if name in event}
    first["timestamp"] = first["timestamp"][11:19]
    if "offer_id" in first:
        for name in ("confirmation", "trace_id", "task"):
            event.pop(name, None)
    event.pop("logger", None)
    if "where" in event:
        event["where"] = " > ".join(event["where"])
    shown = {name: value for name, value in (first | dict(event)).items() if value is not None}
    return {name: printable(value) if isinstance(value, str) else value for name, value in shown.items()}


def _is_no_reject(record: logging.LogRecord) -> bool:
    """Drops Celery's line on a rejected message: a worker that stops puts its messages back."""
    return getattr(record, "data", {}).get("description") != "rejected"


def _log_warning(_message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """Logs class and place of a Python warning. Its text may hold a value.

    Those of what may be deprecated some day are for developers; Celery raises one at each reconnect.
    """
    if not issubclass(category, PendingDeprecationWarning):
        place = f"{'/'.join(filename.split('/')[-2:])}:{lineno}"
        log.warning("python_warning", kind=category.__name__, where=[place])


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        report(error.with_traceback(trace), thread=threading.current_thread().name)


def _report_uncaught_in_thread(caught: threading.ExceptHookArgs) -> None:
    if caught.exc_value is not None and not issubclass(caught.exc_type, SystemExit):
        report(caught.exc_value, thread=caught.thread.name if caught.thread else "unknown")


def _report_unraisable(unraisable: Any) -> None:
    if unraisable.exc_value is not None:
        report(unraisable.exc_value, thread=threading.current_thread().name)


def _without_task_error(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Replaces Celery's line on a task that raised, which quotes the exception."""
    record = event.get("_record")
    if record is not None and record.name == "celery.app.trace" and isinstance(getattr(record, "data", None), dict):
        event["event"] = "task_raised"
        event["task"] = record.data.get("name")
    return event


def _unformatted(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """A library's message without its arguments, which may be a body, a row, or the text of an exception."""
    record: logging.LogRecord = event["_record"]
    return event if record.name in FORMATTED_LOGGERS else {**event, "event": str(record.msg)}


def _exception_without_text(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Type and places of an exception. Its text may hold personal data."""
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    if isinstance(info, BaseException):
        info = (type(info), info, info.__traceback__)
    if info and info[1] is not None:
        event["error"] = describe(info[1])
        event["where"] = where(info[2])
    return event

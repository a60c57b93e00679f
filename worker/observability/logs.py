"""Logs: one line of JSON for each step that matters, or a readable line for people. Ids, states, codes and numbers.

What a thread is at work on (worker/context.py) stands in each of its lines. Celery's lines, Python's warnings and
exceptions that nobody catches come in the same form.
"""

import logging
import sys
import threading
import warnings
from types import TracebackType
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

from worker.errors import describe, where
from worker.observability.log_context import bound
from worker.observability.sentry import report
from worker.settings import LogSettings

log = structlog.get_logger(__name__)

OURS = ("models", "tasks", "worker")
# What these say of the worker and its connection, operators need. They quote a message only where Celery decodes it,
# and none of ours is decoded.
IN_FULL = ("celery.apps.worker", "celery.worker.consumer.connection", "celery.worker.consumer.consumer")


def configure(settings: LogSettings, stream: TextIO = sys.stderr) -> None:
    """Sends all logs of this process, Celery's own too, to standard error or another stream, in one form."""
    shared: list[Processor] = [
        _with_facts,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _task_that_raised,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception_without_text,
    ]
    last: list[Processor] = (
        [_in_order, structlog.processors.JSONRenderer()]
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
            foreign_pre_chain=[_without_values, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # libraries' lower levels show messages and arguments, and so personal data
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings quote what XONE answered
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # worker/tracing.py tells, and only once
    for name in OURS:
        logging.getLogger(name).setLevel(settings.LOG_LEVEL)
    logging.getLogger("celery").setLevel(max(logging.INFO, logging.getLevelName(settings.LOG_LEVEL)))
    of_tasks = logging.getLogger("celery.app.trace")
    of_tasks.setLevel(logging.WARNING)
    of_tasks.addFilter(_no_rejects)
    warnings.showwarning = _tell_warning  # type: ignore[assignment]
    sys.excepthook = _tell_uncaught
    threading.excepthook = _tell_uncaught_of_thread
    sys.unraisablehook = _tell_unraisable


def _with_facts(_logger: Any, _method: str, event: EventDict) -> EventDict:
    return {**bound(), **event}


def _in_order(_logger: Any, _method: str, event: EventDict) -> EventDict:
    return {name: event.pop(name, None) for name in ("timestamp", "level", "event")} | dict(event)


def _for_people(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """What a person reads at a terminal: the time of day, the offer by its own name, and no empty value."""
    names = ("timestamp", "level", "event", "offer_id", "partner_id", "attempt", "state", "outcome", "code")
    told = {name: event.pop(name) for name in names if name in event}
    told["timestamp"] = told["timestamp"][11:19]
    if "offer_id" in told:
        for name in ("confirmation", "trace_id", "task"):
            event.pop(name, None)
    event.pop("logger", None)
    if "where" in event:
        event["where"] = " > ".join(event["where"])
    return {name: value for name, value in (told | dict(event)).items() if value is not None}


def _no_rejects(record: logging.LogRecord) -> bool:
    """A message that goes back to its queue, for the worker stops, is no line."""
    return getattr(record, "data", {}).get("description") != "rejected"


def _tell_warning(_message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """A warning of Python by its kind and place: its text may hold a value."""
    log.warning("python_warning", kind=category.__name__, where=[f"{'/'.join(filename.split('/')[-2:])}:{lineno}"])


def _tell_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        report(error.with_traceback(trace), thread=threading.current_thread().name)


def _tell_uncaught_of_thread(caught: threading.ExceptHookArgs) -> None:
    if caught.exc_value is not None and not issubclass(caught.exc_type, SystemExit):
        report(caught.exc_value, thread=caught.thread.name if caught.thread else "unknown")


def _tell_unraisable(unraisable: Any) -> None:
    if unraisable.exc_value is not None:
        report(unraisable.exc_value, thread=threading.current_thread().name)


def _task_that_raised(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Celery's line on a task that raised quotes the exception: rebuilt without its text."""
    record = event.get("_record")
    if record is not None and record.name == "celery.app.trace" and isinstance(getattr(record, "data", None), dict):
        event["event"] = "task_raised"
        event["task"] = record.data.get("name")
    return event


def _without_values(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """What a library says, as it stands in its code: the values in it may be a body, a row, or an exception's text."""
    record: logging.LogRecord = event["_record"]
    return event if record.name in IN_FULL else {**event, "event": str(record.msg)}


def _exception_without_text(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """An exception as its type and places: its text may hold what must not be logged."""
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    if isinstance(info, BaseException):
        info = (type(info), info, info.__traceback__)
    if info and info[1] is not None:
        event["error"] = describe(info[1])
        event["where"] = where(info[2])
    return event

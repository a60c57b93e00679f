"""Logs: one line of JSON for each step that matters, or a readable line for people. Ids, states, codes and numbers."""

import logging
import sys
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

from worker.report import describe, where
from worker.settings import LogSettings

OURS = ("models", "tasks", "worker")


def configure(settings: LogSettings, stream: TextIO = sys.stderr) -> None:
    """Sends all logs of this process, Celery's own too, to standard error or another stream, in one form."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception_without_text,
    ]
    last: Processor = (
        structlog.processors.JSONRenderer()
        if settings.LOG_FORMAT == "json"
        else structlog.dev.ConsoleRenderer(colors=stream.isatty())
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
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # libraries' lower levels show messages and arguments, and so personal data
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings quote what XONE answered
    for name in OURS:
        logging.getLogger(name).setLevel(settings.LOG_LEVEL)
    logging.getLogger("celery").setLevel(max(logging.INFO, logging.getLevelName(settings.LOG_LEVEL)))
    logging.getLogger("celery.app.trace").setLevel(logging.WARNING)


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

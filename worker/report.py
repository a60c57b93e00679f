"""Defects, told to the log and to Sentry by an allow-list. Texts of exceptions stay here: they may hold anything."""

import traceback
from types import TracebackType
from typing import Any

import sentry_sdk
import structlog
from sentry_sdk.types import Event, Hint

from worker.errors import ConfirmOfferError

log = structlog.get_logger(__name__)


def configure_sentry(dsn: str | None) -> None:
    """Switches Sentry on where there is a DSN. Only ``report`` sends: no integration, breadcrumb, local variable."""
    if dsn:
        sentry_sdk.init(
            dsn,
            default_integrations=False,
            auto_enabling_integrations=False,
            include_local_variables=False,
            max_breadcrumbs=0,
            server_name="",
            before_send=allowed_only,
        )


def report(error: BaseException, **facts: str | int | None) -> None:
    """Tells of a defect. facts: ids, codes and numbers only."""
    log.error("defect", error=describe(error), where=where(error.__traceback__), **facts)
    with sentry_sdk.new_scope() as scope:
        for name, value in facts.items():
            scope.set_tag(name, str(value))
        sentry_sdk.capture_exception(error)


def describe(error: BaseException) -> str:
    """The type of an exception, and the text only of our own, which are written without personal data."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, ConfirmOfferError) else name


def where(trace: TracebackType | None) -> list[str]:
    """``file:line function`` of the last frames, without the code and without any value."""
    frames = traceback.extract_tb(trace)[-8:]
    return [f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}" for frame in frames]


def allowed_only(event: Event, hint: Hint) -> Event:
    """An event for Sentry rebuilt from what may leave: types, places in the code, tags."""
    error = (hint.get("exc_info") or (None, None, None))[1]
    exceptions = (event.get("exception") or {}).get("values") or []
    kept: dict[str, Any] = {
        name: event[name]
        for name in (
            "event_id",
            "timestamp",
            "level",
            "platform",
            "release",
            "environment",
            "sdk",
            "tags",
            "transaction",
        )
        if name in event
    }
    kept["exception"] = {
        "values": [
            {
                "type": exception.get("type"),
                "module": exception.get("module"),
                "value": describe(error) if error is not None and exception is exceptions[-1] else None,
                "stacktrace": {
                    "frames": [_frame(frame) for frame in (exception.get("stacktrace") or {}).get("frames", [])]
                },
            }
            for exception in exceptions
        ]
    }
    return kept  # type: ignore[return-value]


def _frame(frame: dict[str, Any]) -> dict[str, Any]:
    return {name: frame.get(name) for name in ("filename", "function", "module", "lineno", "in_app")}

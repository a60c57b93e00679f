"""Reports to Sentry: defects, sampled transactions, check-ins. An allow-list decides what leaves the process.

The texts of exceptions do not, but for our own. Expected failures (a refused offer, an outage of XONE or a server) are
no defects and are not reported.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import sentry_sdk
import structlog
from sentry_sdk.crons import capture_checkin
from sentry_sdk.types import Event, Hint

from worker.errors import describe, where
from worker.observability.log_context import bound
from worker.settings import SentrySettings

log = structlog.get_logger(__name__)

CHECK_IN_INTERVAL = 60.0  # seconds, of each Scheduler
TAGS = frozenset(
    ("task", "duty", "thread", "confirmation", "partner_id", "offer_id", "attempt", "outcome", "code", "trace_id")
)

_OFF = nullcontext()
_samples = False


def configure_sentry(settings: SentrySettings) -> None:
    """Switches Sentry on if the settings have a DSN. No integration, breadcrumb or local variable is sent."""
    global _samples
    _samples = settings.dsn is not None and settings.SENTRY_TRACES_SAMPLE_RATE > 0
    if settings.dsn:
        sentry_sdk.init(
            settings.dsn,
            release=settings.release,
            environment=settings.SENTRY_ENVIRONMENT,
            traces_sample_rate=settings.SENTRY_TRACES_SAMPLE_RATE or None,
            default_integrations=False,
            auto_enabling_integrations=False,
            include_local_variables=False,
            max_breadcrumbs=0,
            server_name="",
            before_send=allowed_only,
            before_send_transaction=allowed_only,
        )


def flush() -> None:
    """Sends what is pending, within 2 s, before the process ends."""
    sentry_sdk.flush(2.0)


def report(error: BaseException, **facts: str | int | None) -> None:
    """Logs a defect and reports it to Sentry, with the log context and ``facts``: ids, codes and numbers only.

    Sentry groups errors with the same ``code`` into one issue.
    """
    log.error("defect", error=describe(error), where=where(error.__traceback__), **facts)
    with sentry_sdk.new_scope() as scope:
        tags = {**bound(), **facts}
        for tag in tags.keys() & TAGS:
            scope.set_tag(tag, str(tags[tag]))
        name = tags.get("task") or tags.get("duty") or tags.get("thread")
        if name is not None:
            scope.set_transaction_name(str(name))
        if facts.get("code"):
            scope.fingerprint = [type(error).__name__, str(facts["code"])]
        sentry_sdk.capture_exception(error)


def transaction(name: str) -> AbstractContextManager[None]:
    """Measures a task as a transaction of Sentry, if SENTRY_TRACES_SAMPLE_RATE samples it. name: of the task."""
    return _transaction(name) if _samples else _OFF


@contextmanager
def _transaction(name: str) -> Iterator[None]:
    with (
        sentry_sdk.isolation_scope(),
        sentry_sdk.start_transaction(op="queue.process", name=name, source="task") as running,
    ):
        running.set_status("ok")
        yield
        facts = bound()
        for tag in facts.keys() & TAGS:
            running.set_tag(tag, str(facts[tag]))


class CheckIns:
    """Tells a monitor of Sentry that a service runs, once a minute. Several workers may check in to the same monitor.

    monitor: its slug, None for none; clock: returns seconds.
    """

    def __init__(self, monitor: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._monitor = monitor
        self._clock = clock
        self._next_at = clock()

    def on_success(self) -> None:
        """Called after each successful run of the service. Sends a check-in when it is due."""
        if self._monitor is None or self._clock() < self._next_at:
            return
        self._next_at = self._clock() + CHECK_IN_INTERVAL
        capture_checkin(
            self._monitor,
            status="ok",
            monitor_config={
                "schedule": {"type": "interval", "value": 1, "unit": "minute"},
                "checkin_margin": 4,  # minutes
                "failure_issue_threshold": 1,
                "recovery_threshold": 1,
            },
        )


_EVENT_KEYS = ("type", "event_id", "timestamp", "level", "platform", "release", "environment", "sdk")
_CHECK_IN_KEYS = ("monitor_slug", "check_in_id", "status", "duration", "monitor_config")
_DEFECT_KEYS = ("transaction", "transaction_info", "fingerprint", "start_timestamp")
_TRACE_KEYS = ("trace_id", "span_id", "parent_span_id", "op", "status", "origin")


def allowed_only(event: Event, hint: Hint) -> Event:
    """Rebuilds an event from what may leave: types, places in the code, names of tasks, tags, times."""
    hint["attachments"] = []
    kind = event.get("type")
    if kind == "check_in":
        return _only(event, _EVENT_KEYS + _CHECK_IN_KEYS)  # type: ignore[return-value]
    allowed = _only(event, _EVENT_KEYS + _DEFECT_KEYS)
    if "tags" in event:
        allowed["tags"] = _only(event["tags"], TAGS)
    if kind == "transaction":
        allowed["contexts"] = {"trace": _only((event.get("contexts") or {}).get("trace") or {}, _TRACE_KEYS)}
    else:
        allowed["exception"] = {"values": _exceptions(event, (hint.get("exc_info") or (None, None, None))[1])}
    return allowed  # type: ignore[return-value]


def _only(content: Any, keys: Iterable[str]) -> dict[str, Any]:
    return {key: content[key] for key in keys if key in content}


def _exceptions(event: Event, error: BaseException | None) -> list[dict[str, Any]]:
    exceptions = (event.get("exception") or {}).get("values") or []
    return [
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


def _frame(frame: dict[str, Any]) -> dict[str, Any]:
    return {name: frame.get(name) for name in ("filename", "function", "module", "lineno", "in_app")}

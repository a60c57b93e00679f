"""What a thread is at work on: in each of its log lines, on its span, and with what it reports to Sentry.

Ids, codes and numbers only. Cleared with each task, for threads of the pool take one after the other.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from worker.observability import tracing

_bound: ContextVar[Mapping[str, str | int | None]] = ContextVar("context", default={})  # noqa: B039 - never changed


@contextmanager
def for_task(
    name: str, queue: str, traceparent: str | None, message_id: str | None, correlation_id: str | None
) -> Iterator[None]:
    """A task works on a message. traceparent: a valid one, or none."""
    with tracing.process(queue, traceparent, message_id, correlation_id):
        _bound.set({"task": name, **_trace_of(tracing.traceparent(traceparent))})
        try:
            yield
        finally:
            _bound.set({})


def for_lease(lease: Any) -> None:
    """The task works on a claim."""
    if not tracing.is_on():
        _bound.set({**_bound.get(), **_trace_of(lease.traceparent)})
    bind(confirmation=str(lease.id), partner_id=lease.partner_id, offer_id=lease.offer_id, attempt=lease.number)


def bind(**facts: str | int | None) -> None:
    """Adds facts."""
    _bound.set({**_bound.get(), **facts})
    tracing.note(**facts)


def bound() -> Mapping[str, str | int | None]:
    """The facts of this thread."""
    return _bound.get()


def _trace_of(traceparent: str | None) -> dict[str, str]:
    return {"trace_id": traceparent.split("-")[1]} if traceparent is not None else {}

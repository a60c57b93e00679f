"""The log context of a thread: facts about its work, in each log line, on its span and in its reports to Sentry.

Facts are ids, codes and numbers only. Each task clears them at its end, as the threads of the pool are reused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from worker.observability import tracing

_bound: ContextVar[Mapping[str, str | int | None]] = ContextVar("context", default={})  # noqa: B039 - never mutated


@contextmanager
def for_task(
    name: str, queue: str, traceparent: str | None, message_id: str | None, correlation_id: str | None
) -> Iterator[None]:
    """Sets the context while a task works on a message of a queue. traceparent: a valid one, or None."""
    with tracing.process(queue, traceparent, message_id, correlation_id):
        _bound.set({"task": name, **_trace_of(tracing.traceparent(traceparent))})
        try:
            yield
        finally:
            _bound.set({})


def for_lease(lease: Any) -> None:
    """Adds the confirmation of a Lease that the task has acquired."""
    if not tracing.is_on():
        _bound.set({**_bound.get(), **_trace_of(lease.traceparent)})
    bind(confirmation=str(lease.id), partner_id=lease.partner_id, offer_id=lease.offer_id, attempt=lease.number)


def bind(**facts: str | int | None) -> None:
    """Adds facts to the context and to the current span."""
    _bound.set({**_bound.get(), **facts})
    tracing.note(**facts)


def bound() -> Mapping[str, str | int | None]:
    """The facts of this thread, by name."""
    return _bound.get()


def _trace_of(traceparent: str | None) -> dict[str, str]:
    return {"trace_id": traceparent.split("-")[1]} if traceparent is not None else {}

"""What a thread is at work on: bound to its log lines, its span, and what it reports to Sentry.

Ids, codes and numbers only. Cleared with each task, for threads of the pool take one after the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from structlog.contextvars import bind_contextvars, clear_contextvars

from worker import report, tracing


@contextmanager
def of_task(
    name: str, queue: str, traceparent: str | None, message_id: str | None, correlation_id: str | None
) -> Iterator[None]:
    """A task works on a message. traceparent: a valid one, or none."""
    clear_contextvars()
    bind_contextvars(task=name)
    try:
        with tracing.process(queue, traceparent, message_id, correlation_id), report.transaction(name):
            _bind_trace(tracing.traceparent(traceparent))
            yield
    finally:
        clear_contextvars()


def of_confirmation(held: Any) -> None:
    """The task works on a claim."""
    bind(confirmation=str(held.id), partner_id=held.partner_id, offer_id=held.offer_id, attempt=held.number)
    if not tracing.is_on():
        _bind_trace(held.traceparent)


def bind(**facts: str | int | None) -> None:
    """Adds facts."""
    bind_contextvars(**facts)
    tracing.note(**facts)


def _bind_trace(traceparent: str | None) -> None:
    if traceparent is not None:
        bind_contextvars(trace_id=traceparent.split("-")[1])

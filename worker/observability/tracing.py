"""Traces, by OpenTelemetry where ``confirm-offer[tracing]`` is installed and its variables name a collector.

publish (checkout) ── process confirm-offer.jobs ─┬─ accept job · record attempt …     database
                                                  ├─ POST /api/partners/…              XONE
                                                  ├─ send confirm-offer.resume ── process confirm-offer.resume ── …
                                                  └─ send booking-events ── the consumer, by the event's traceparent

A few spans of our own, with ids, codes and numbers: no statement, no URL, no text of an exception. Where tracing is
off, each of these functions returns at once, and nothing of OpenTelemetry is imported.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from models.job import JobRejected
from worker.errors import XoneError
from worker.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.trace import Span, Tracer
    from sqlalchemy import Engine


log = structlog.get_logger(__name__)

Sent = TypeVar("Sent", bound=Any)  # a Message of worker/broker.py

MAX_FLUSH = 3.0  # seconds

_OFF = nullcontext()
_make: "Callable[[], TracerProvider] | None" = None  # None: tracing is off
_provider: "TracerProvider | None" = None  # of this process, made at its first span: threads do not survive a fork
_tracer: "Tracer | None" = None
_lock = Lock()


def configure(settings: TracingSettings) -> None:
    """Switches tracing on where the settings name a collector. Never stops the program: tells why it stays off."""
    if settings.endpoint is None:
        return
    if not _is_installed():
        log.warning("tracing_off", why="confirm-offer[tracing] is not installed")
    elif settings.protocol != "http/protobuf":
        log.warning("tracing_off", why="the collector must take http/protobuf")
    else:
        switch_on(lambda: _exporting_to(settings))


def switch_on(make: "Callable[[], TracerProvider] | None") -> None:
    """Spans go to what ``make`` returns, called once in each process; None switches tracing off."""
    global _make, _provider, _tracer
    _make, _provider, _tracer = make, None, None


def is_on() -> bool:
    return _make is not None


def flush() -> None:
    """Sends what has not been sent: the process ends."""
    if _provider is not None:
        ending = Thread(target=_provider.shutdown, name="spans", daemon=True)  # it tries for long where nobody answers
        ending.start()
        ending.join(MAX_FLUSH)


def _is_installed() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def _exporting_to(settings: TracingSettings) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

    class Exporter(OTLPSpanExporter):
        """Tells once that the collector does not take spans, and once that it does again."""

        loses = False

        def export(self, spans: "Sequence[ReadableSpan]") -> SpanExportResult:
            result = super().export(spans)
            lost = result is not SpanExportResult.SUCCESS
            if lost and not self.loses:
                log.warning("spans_lost", why="the collector can't be reached, or does not take them")
            elif self.loses and not lost:
                log.info("spans_arrive")
            self.loses = lost
            return result

    resource = Resource.create({"service.version": version("confirm-offer")})
    if settings.OTEL_SERVICE_NAME or str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": settings.OTEL_SERVICE_NAME or "confirm-offer"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Exporter(endpoint=settings.endpoint)))
    return provider


# --- The spans ---


def process(
    queue: str, traceparent: str | None, message_id: str | None, conversation_id: str | None
) -> AbstractContextManager[None]:
    """A message of a queue is worked on; goes on with the trace of its traceparent."""
    if _make is None:
        return _OFF
    attributes = {
        **_messaging("process", "process", queue, queue),
        **({"messaging.message.id": message_id} if message_id else {}),
        **({"messaging.message.conversation_id": conversation_id} if conversation_id else {}),
    }
    return _span(f"process {queue}", "CONSUMER", attributes, _context(traceparent))


def call(method: str, template: str, server: Mapping[str, str | int]) -> AbstractContextManager[None]:
    """A call to XONE. template: its path with the names of what stands in it; server: ``server.*`` attributes.

    XONE gets no traceparent: it is a third party.
    """
    if _make is None:
        return _OFF
    return _span(f"{method} {template}", "CLIENT", {"http.request.method": method, "url.template": template, **server})


def answered(status: int) -> None:
    """The status of the answer to the call that is under way."""
    if _make is None:
        return
    span = _current()
    span.set_attribute("http.response.status_code", status)
    if status >= 400:
        _set_error(span, str(status))


def transaction(name: str, engine: "Engine") -> AbstractContextManager[None]:
    """A transaction, with all that is waited for until it is committed. name: what it does."""
    if _make is None:
        return _OFF
    return _span(name, "CLIENT", {"db.system.name": engine.dialect.name})


@contextmanager
def _sending(refused: set[Any]) -> Iterator[Callable[[Sent], Sent]]:
    from opentelemetry import trace

    spans: dict[Any, Span] = {}

    def send(message: Sent) -> Sent:
        destination = f"{message.exchange}:{message.routing_key}"
        attributes = _messaging("send", "send", destination, message.routing_key)
        for name, key in (("message_id", "id"), ("correlation_id", "conversation_id")):
            if message.properties.get(name):
                attributes[f"messaging.message.{key}"] = message.properties[name]
        span = _tracer_here().start_span(
            f"send {message.routing_key}",
            _context(message.headers.get("traceparent")),
            kind=trace.SpanKind.PRODUCER,
            attributes=attributes,
        )
        spans[message.key] = span
        return replace(message, headers={**message.headers, "traceparent": _traceparent_of(span)})

    try:
        yield send
    except BaseException as error:
        for span in spans.values():
            _set_error(span, _type_of(error))
        raise
    finally:
        for key, span in spans.items():
            if key in refused:
                _set_error(span, "refused")
            span.end()


def sending(refused: set[Any]) -> "AbstractContextManager[Callable[[Sent], Sent]]":
    """Messages are published, until the broker has confirmed them. Yields what each goes through.

    A message then bears the traceparent of its own span, in the trace of the one that it bore before. refused: keys
    of messages that the broker refused, known at the end.
    """
    return _UNCHANGED if _make is None else _sending(refused)


_UNCHANGED: "AbstractContextManager[Callable[[Any], Any]]" = nullcontext(lambda message: message)


def note(**facts: str | int | None) -> None:
    """Ids, codes and numbers of what the current span is about. A ``code`` is that of an error."""
    if _make is None:
        return
    span = _current()
    for name, value in facts.items():
        if value is not None:
            span.set_attribute(f"confirm_offer.{name}", value)
    if facts.get("code"):
        _set_error(span, str(facts["code"]))


def traceparent(otherwise: str | None) -> str | None:
    """The traceparent of the current span; ``otherwise`` where tracing is off."""
    if _make is None:
        return otherwise
    span = _current()
    return _traceparent_of(span) if span.get_span_context().is_valid else otherwise


# --- The parts ---


def _tracer_here() -> "Tracer":
    global _provider, _tracer
    if _tracer is None:
        with _lock:
            if _provider is None:
                assert _make is not None
                _provider = _make()
            _tracer = _provider.get_tracer("confirm-offer", version("confirm-offer"))
    return _tracer


@contextmanager
def _span(name: str, kind: str, attributes: Mapping[str, Any], context: "Context | None" = None) -> Iterator[None]:
    from opentelemetry import trace

    with _tracer_here().start_as_current_span(
        name,
        context,
        kind=trace.SpanKind[kind],
        attributes=attributes,
        record_exception=False,  # its text may hold anything
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        except BaseException as error:
            _set_error(span, _type_of(error))
            raise


def _current() -> "Span":
    from opentelemetry import trace

    return trace.get_current_span()


def _set_error(span: "Span", kind: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _type_of(error: BaseException) -> str:
    return error.code if isinstance(error, XoneError | JobRejected) else type(error).__name__


def _messaging(name: str, kind: str, destination: str, routing_key: str) -> dict[str, Any]:
    return {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": destination,
        "messaging.rabbitmq.destination.routing_key": routing_key,
    }


def _context(traceparent: str | None) -> "Context":
    """With the span of a traceparent as parent; without one, or with a wrong one, a new trace begins."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {}, Context())


def _traceparent_of(span: "Span") -> str:
    of = span.get_span_context()
    return f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}"


def _start_afresh() -> None:
    global _provider, _tracer, _lock
    _provider, _tracer, _lock = None, None, Lock()


os.register_at_fork(after_in_child=_start_afresh)

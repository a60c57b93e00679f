"""Traces with OpenTelemetry, if ``confirm-offer[tracing]`` is installed and its variables name a collector.

publish (checkout) ── process confirm-offer.jobs ─┬─ accept job · record attempt …     database
                                                  ├─ POST /api/partners/…              XONE
                                                  ├─ send confirm-offer.resume ── process confirm-offer.resume ── …
                                                  └─ send booking-events ── the consumer, by the event's traceparent

The spans hold ids, codes and numbers, but no statement, URL or text of an exception. While tracing is off, each
function returns at once, and nothing of OpenTelemetry is imported.
"""

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
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

Outgoing = TypeVar("Outgoing", bound=Any)  # a Message of worker.messaging.publisher

FLUSH_TIMEOUT = 3.0  # seconds

_OFF = nullcontext()
_make: "Callable[[], TracerProvider] | None" = None  # None: tracing is off
_provider: "TracerProvider | None" = (
    None  # created at the first span of this process: its threads do not survive a fork
)
_tracer: "Tracer | None" = None
_lock = Lock()


def configure(settings: TracingSettings) -> None:
    """Switches tracing on if the settings name a collector. If that is not possible, logs why instead of raising."""
    if settings.endpoint is None:
        return
    if not _is_installed():
        log.warning("tracing_off", why="confirm-offer[tracing] is not installed")
    elif settings.protocol != "http/protobuf":
        log.warning("tracing_off", why="the collector must take http/protobuf")
    else:
        switch_on(lambda: _exporting_to(settings))


def switch_on(make: "Callable[[], TracerProvider] | None") -> None:
    """Sends spans to the provider that ``make`` returns, which each process calls once. None switches tracing off."""
    global _make, _provider, _tracer
    _make, _provider, _tracer = make, None, None


def is_on() -> bool:
    return _make is not None


def flush() -> None:
    """Sends what is pending, within FLUSH_TIMEOUT, before the process ends."""
    if _provider is not None:
        # In a thread, as it retries for long if the collector does not answer.
        shutdown = Thread(target=_provider.shutdown, name="spans", daemon=True)
        shutdown.start()
        shutdown.join(FLUSH_TIMEOUT)


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
        """Logs once that the collector does not take spans, and once that it does again."""

        is_losing = False

        def export(self, spans: "Sequence[ReadableSpan]") -> SpanExportResult:
            result = super().export(spans)
            lost = result is not SpanExportResult.SUCCESS
            if lost and not self.is_losing:
                log.warning("spans_lost", why="the collector can't be reached, or does not take them")
            elif self.is_losing and not lost:
                log.info("spans_arrive")
            self.is_losing = lost
            return result

    resource = Resource.create({"service.version": version("confirm-offer")})
    if settings.OTEL_SERVICE_NAME or str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": settings.OTEL_SERVICE_NAME or "confirm-offer"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Exporter(endpoint=settings.endpoint)))
    return provider


# --- Spans ---


def process(
    queue: str, traceparent: str | None, message_id: str | None, conversation_id: str | None
) -> AbstractContextManager[None]:
    """A span for work on a message of a queue. It continues the trace of a valid traceparent."""
    if _make is None:
        return _OFF
    attributes = {
        **_messaging("process", "process", queue, queue),
        **({"messaging.message.id": message_id} if message_id else {}),
        **({"messaging.message.conversation_id": conversation_id} if conversation_id else {}),
    }
    return _span(f"process {queue}", "CONSUMER", attributes, _context(traceparent))


def call(method: str, template: str, server: Mapping[str, str | int]) -> AbstractContextManager[None]:
    """A span for a call to XONE. template: the path, with placeholders; server: the ``server.*`` attributes.

    XONE gets no traceparent, as it is a third party.
    """
    if _make is None:
        return _OFF
    return _span(f"{method} {template}", "CLIENT", {"http.request.method": method, "url.template": template, **server})


def answered(status: int) -> None:
    """Adds the HTTP status of the answer to the span of the current call."""
    if _make is None:
        return
    span = _current()
    span.set_attribute("http.response.status_code", status)
    if status >= 400:
        _set_error(span, str(status))


def transaction(name: str, engine: "Engine") -> AbstractContextManager[None]:
    """A span for a database transaction, from its begin to its commit. name: what it does."""
    if _make is None:
        return _OFF
    return _span(name, "CLIENT", {"db.system.name": engine.dialect.name})


@contextmanager
def _sending(refused: Container[Any]) -> Iterator[Callable[[Outgoing], Outgoing]]:
    from opentelemetry import trace

    spans: dict[Any, Span] = {}

    def send(message: Outgoing) -> Outgoing:
        destination = f"{message.exchange}:{message.routing_key}"
        attributes = _messaging("send", "send", destination, message.routing_key)
        for name, key in (("message_id", "id"), ("correlation_id", "conversation_id")):
            if message.properties.get(name):
                attributes[f"messaging.message.{key}"] = message.properties[name]
        span = _get_tracer().start_span(
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


def sending(refused: Container[Any]) -> "AbstractContextManager[Callable[[Outgoing], Outgoing]]":
    """Spans for messages, from publishing to the broker's confirms. Yields a function that each message goes through.

    It returns the message with the traceparent of the message's own span, in the trace of the traceparent that it had.
    refused: keys of messages that the broker refused, filled in before the end.
    """
    return _UNCHANGED if _make is None else _sending(refused)


_UNCHANGED: "AbstractContextManager[Callable[[Any], Any]]" = nullcontext(lambda message: message)


def note(**facts: str | int | None) -> None:
    """Adds ids, codes and numbers to the current span. A ``code`` marks it as an error."""
    if _make is None:
        return
    span = _current()
    for name, value in facts.items():
        if value is not None:
            span.set_attribute(f"confirm_offer.{name}", value)
    if facts.get("code"):
        _set_error(span, str(facts["code"]))


def traceparent(default: str | None) -> str | None:
    """The traceparent of the current span; ``default`` while tracing is off."""
    if _make is None:
        return default
    span = _current()
    return _traceparent_of(span) if span.get_span_context().is_valid else default


# --- Helpers ---


def _get_tracer() -> "Tracer":
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

    with _get_tracer().start_as_current_span(
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
    """A context with a traceparent's span as parent. Without a valid one, a new trace begins."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {}, Context())


def _traceparent_of(span: "Span") -> str:
    """Source: W3C Trace Context, version 00."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _reset_in_child() -> None:
    global _provider, _tracer, _lock
    _provider, _tracer, _lock = None, None, Lock()


os.register_at_fork(after_in_child=_reset_in_child)

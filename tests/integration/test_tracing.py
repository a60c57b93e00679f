"""Traces: a job is one trace from the checkout to its event, whatever its outcome, without personal data."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Queue
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from sqlalchemy import select, update

from models.tables import Confirmation, OutboxEvent
from tasks import celery_tasks
from tests.support.inbox import Inbox
from tests.support.system import job, until
from worker.messaging import broker, topology
from worker.messaging.consumer import celery_headers
from worker.messaging.publisher import Message, Publisher
from worker.observability import logs, tracing
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.services.outbox_relay import OutboxRelay
from worker.services.scheduler import Scheduler
from worker.settings import LogSettings, TracingSettings
from worker.storage.database import now_plus

MARK = "Quxomat"
PERSON = {"first_name": MARK, "last_name": MARK, "country": "GB", "email": f"{MARK}@mail.example"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
CONFIRM = "POST /api/partners/{partner_id}/offers/{offer_id}"
TOKEN = "POST /api/oauth/token"


class TracedJob:
    """A job taken step by step, on a real broker and database, and its spans."""

    def __init__(self, runtime: Runtime, connection: Connection, exporter: InMemorySpanExporter) -> None:
        self.runtime = runtime
        self._channel = connection.channel()
        self._exporter = exporter

    def take_job(self, offer_id: str, traceparent: str | None = TRACEPARENT, **changes: Any) -> None:
        """Publishes a job as a checkout does, and runs the task of a worker on it."""
        quote = {"id": "quote-1", "insured": [PERSON]}
        body = json.dumps(job(offer_id, **{"policyholder": PERSON, "quotes": [quote], **changes})).encode()
        headers = {"traceparent": traceparent} if traceparent else {}
        properties = {"message_id": "M-1", "correlation_id": "C-1"}
        message = Message("job", body, topology.confirm_offer.name, topology.JOBS, headers=headers)
        prepared = self._channel.prepare_message(message.body, headers=message.headers, properties=properties)
        self._channel.basic_publish(prepared, exchange=message.exchange, routing_key=message.routing_key)
        self._run(celery_tasks.confirm_offer, topology.JOBS)

    def resume(self) -> None:
        """Makes the next attempt due, and runs it."""
        with self.runtime.engine.begin() as connection:
            connection.execute(update(Confirmation).values(due_at=now_plus(-1.0)))
        scheduler = Scheduler(self.runtime)
        scheduler.run_once()
        scheduler.close()
        self._run(celery_tasks.resume, topology.RESUME)

    def event(self) -> Any:
        """Publishes an event. Returns the message that a consumer gets."""
        relay = OutboxRelay(self.runtime)
        relay.run_once()
        relay.close()
        return self.message("test.events")

    def message(self, queue: str) -> Any:
        messages: list[Any] = []
        until(lambda: messages.append(self._channel.basic_get(queue, no_ack=True)) or messages[-1])
        return messages[-1]

    def _run(self, task: Any, queue: str) -> None:
        message = self.message(queue)
        task.push_request(
            **celery_headers(task.name, message),
            properties=message.properties,
            correlation_id=message.properties.get("correlation_id"),
        )
        try:
            task.run(message.body if isinstance(message.body, bytes) else message.body.encode())
        finally:
            task.pop_request()

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans in the order of their start."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def span(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@pytest.fixture
def database_url(postgresql_url: str) -> str:
    return postgresql_url


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.switch_on(lambda: provider)
    yield exporter
    tracing.switch_on(None)


@pytest.fixture
def traced_job(
    broker_url: str, runtime: Runtime, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TracedJob]:
    monkeypatch.setenv("BROKER_URL", broker_url)
    monkeypatch.setattr("worker.runtime._current", runtime)
    with broker.connect(broker_url) as connection:
        Queue("test.events", topology.booking_events, "#", durable=True)(connection.channel()).declare()
        yield TracedJob(runtime, connection, exporter)


def parent_of(span: ReadableSpan) -> str | None:
    return f"{span.parent.span_id:016x}" if span.parent else None


def id_of(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


def traceparent_of(span: ReadableSpan) -> str:
    return f"00-{span.context.trace_id:032x}-{id_of(span)}-01"


def assert_one_trace(traced_job: TracedJob, trace_id: str = TRACE) -> None:
    assert {f"{span.context.trace_id:032x}" for span in traced_job.spans} == {trace_id}


def assert_no_personal_data(traced_job: TracedJob, sandbox: Sandbox) -> None:
    exported = " ".join(span.to_json() for span in traced_job.spans)
    secrets = {MARK, sandbox.client_secret, *sandbox._tokens}
    for booking in sandbox.bookings.values():
        secrets |= {booking["security_token"], booking["coi"]["url"], booking["account_url"]}
    assert [secret for secret in secrets if secret in exported] == []
    assert all(not span.events for span in traced_job.spans), "an event of a span would hold the text of an exception"


def test_a_job_and_its_event_are_one_trace(traced_job: TracedJob, sandbox: Sandbox) -> None:
    traced_job.take_job("offer-1")
    event = traced_job.event()

    names = [span.name for span in traced_job.spans]
    assert names == [
        "process confirm-offer.jobs",
        "accept job",
        TOKEN,
        CONFIRM,
        "record attempt",
        "send booking.confirmed",
    ]
    assert_one_trace(traced_job)
    processing = traced_job.span("process confirm-offer.jobs")
    assert parent_of(processing) == PARENT
    assert {parent_of(span) for span in traced_job.spans[1:]} == {id_of(processing)}
    assert event.headers["traceparent"] == traceparent_of(traced_job.span("send booking.confirmed"))
    assert event.properties["correlation_id"] == "C-1"
    assert_no_personal_data(traced_job, sandbox)


def test_spans_follow_the_conventions(traced_job: TracedJob, sandbox: Sandbox) -> None:
    traced_job.take_job("offer-1")
    event = traced_job.event()

    processing, confirm, send = (
        traced_job.span("process confirm-offer.jobs"),
        traced_job.span(CONFIRM),
        traced_job.span("send booking.confirmed"),
    )
    assert (processing.kind, confirm.kind, send.kind) == (SpanKind.CONSUMER, SpanKind.CLIENT, SpanKind.PRODUCER)
    with traced_job.runtime.engine.connect() as connection:
        confirmation = connection.execute(select(Confirmation.id)).scalar_one()
    assert processing.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "confirm-offer.jobs",
        "messaging.rabbitmq.destination.routing_key": "confirm-offer.jobs",
        "messaging.message.id": "M-1",
        "messaging.message.conversation_id": "C-1",
        "confirm_offer.confirmation": str(confirmation),
        "confirm_offer.partner_id": "P-100",
        "confirm_offer.offer_id": "offer-1",
        "confirm_offer.attempt": 1,
        "confirm_offer.outcome": "booked",
        "confirm_offer.state": "confirmed",
    }
    assert confirm.attributes == {
        "http.request.method": "POST",
        "url.template": "/api/partners/{partner_id}/offers/{offer_id}",
        "server.address": "127.0.0.1",
        "server.port": int(sandbox.url.rpartition(":")[2]),
        "http.response.status_code": 201,
    }
    assert traced_job.span("accept job").attributes == {"db.system.name": "postgresql"}
    assert send.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "booking-events:booking.confirmed",
        "messaging.rabbitmq.destination.routing_key": "booking.confirmed",
        "messaging.message.id": event.properties["message_id"],
        "messaging.message.conversation_id": "C-1",
    }
    assert all(span.status.is_unset for span in traced_job.spans)


def test_a_retry_continues_the_trace(traced_job: TracedJob, sandbox: Sandbox) -> None:
    traced_job.take_job("offer-1~http-503~1")
    traced_job.resume()
    event = traced_job.event()

    first, sent, second = map(
        traced_job.span, ("process confirm-offer.jobs", "send confirm-offer.resume", "process confirm-offer.resume")
    )
    assert_one_trace(traced_job)
    assert (parent_of(sent), parent_of(second)) == (id_of(first), id_of(sent))
    assert (first.attributes or {})["error.type"] == "http-503"
    assert (second.attributes or {})["confirm_offer.attempt"] == 2
    assert "error.type" not in (second.attributes or {})
    answers = [
        (span.attributes or {})["http.response.status_code"] for span in traced_job.spans if span.name == CONFIRM
    ]
    assert answers == [503, 201]
    assert event.headers["traceparent"].split("-")[1] == TRACE
    assert_no_personal_data(traced_job, sandbox)


def test_a_refusal_is_an_error_by_its_code(traced_job: TracedJob, sandbox: Sandbox) -> None:
    traced_job.take_job("offer-1~http-422")
    event = traced_job.event()

    processing, call = traced_job.span("process confirm-offer.jobs"), traced_job.span(CONFIRM)
    assert ((processing.attributes or {})["error.type"], processing.status.is_ok) == ("http-422", False)
    assert (call.attributes or {})["error.type"] == "422"
    assert event.headers["traceparent"] == traceparent_of(traced_job.span("send confirmation.failed"))
    assert_one_trace(traced_job)
    assert_no_personal_data(traced_job, sandbox)


def test_no_answer_is_an_error_by_its_code(traced_job: TracedJob, sandbox: Sandbox) -> None:
    traced_job.take_job("offer-1~drop-after~1")
    traced_job.resume()

    (confirm,) = [span for span in traced_job.spans if span.name == CONFIRM]
    assert (confirm.attributes or {})["error.type"] == "connection-lost"
    assert "http.response.status_code" not in (confirm.attributes or {})
    (read_back,) = [span for span in traced_job.spans if span.name == "GET /api/partners/{partner_id}/bookings"]
    assert (read_back.attributes or {})["http.response.status_code"] == 200
    assert_one_trace(traced_job)
    assert_no_personal_data(traced_job, sandbox)


def test_a_dead_letter_has_the_trace(traced_job: TracedJob, sandbox: Sandbox) -> None:
    traced_job.take_job("offer-1", policyholder={"first_name": MARK})

    dead_letter = traced_job.message(topology.DEAD_LETTERS)
    processing, send = traced_job.span("process confirm-offer.jobs"), traced_job.span("send confirm-offer.dead-letters")
    assert (processing.attributes or {})["error.type"] == "invalid-job"
    assert (dead_letter.headers["traceparent"], parent_of(send)) == (traceparent_of(send), id_of(processing))
    assert_one_trace(traced_job)
    assert_no_personal_data(traced_job, sandbox)


@pytest.mark.parametrize("traceparent", [None, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "no traceparent"])
def test_a_job_without_a_traceparent_begins_a_trace(traced_job: TracedJob, traceparent: str | None) -> None:
    traced_job.take_job("offer-1~http-503~1", traceparent)
    traced_job.resume()
    event = traced_job.event()

    processing = traced_job.span("process confirm-offer.jobs")
    assert processing.parent is None
    assert_one_trace(traced_job, f"{processing.context.trace_id:032x}")
    assert event.headers["traceparent"].split("-")[1] == f"{processing.context.trace_id:032x}"


def test_the_sampling_decision_of_the_checkout_is_followed(traced_job: TracedJob) -> None:
    traced_job.take_job("offer-1", f"00-{TRACE}-{PARENT}-00")
    event = traced_job.event()

    assert traced_job.spans == []
    assert event.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert event.headers["traceparent"].endswith("-00")


def test_a_message_that_the_broker_refuses_is_an_error(traced_job: TracedJob, broker_url: str) -> None:
    with Publisher(broker_url) as publisher:
        nowhere = Message("a", b"{}", topology.confirm_offer.name, "nowhere")
        assert publisher.publish([nowhere]) == set()

    assert (traced_job.span("send nowhere").attributes or {})["error.type"] == "refused"


def test_xone_gets_no_traceparent(traced_job: TracedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    http, sent = traced_job.runtime.xone._http, []
    open_ = http.open
    monkeypatch.setattr(http, "open", lambda *request: sent.append(request) or open_(*request))

    traced_job.take_job("offer-1")

    assert len(sent) == 2
    assert "traceparent" not in str(sent).lower()


def test_without_tracing_the_event_has_the_traceparent_of_the_job(traced_job: TracedJob) -> None:
    tracing.switch_on(None)
    traced_job.take_job("offer-1~http-503~1")
    traced_job.resume()
    event = traced_job.event()

    assert event.headers["traceparent"] == TRACEPARENT
    assert traced_job.spans == []
    with traced_job.runtime.engine.connect() as connection:
        assert connection.execute(select(OutboxEvent.traceparent)).scalar_one() == TRACEPARENT


def test_a_collector_that_refuses_spans_is_logged_once(logging_restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")  # ms
    output, inbox = io.StringIO(), Inbox()
    logs.configure(LogSettings(LOG_FORMAT="json"), output)
    tracing.configure(TracingSettings(OTEL_EXPORTER_OTLP_ENDPOINT=inbox.url))

    def has_new_spans() -> bool:
        with tracing.process("a-queue", None, None, None):
            pass
        return len(inbox.bodies) >= 3

    inbox.status = 400
    until(has_new_spans)
    inbox.status = 200
    inbox.bodies.clear()
    until(has_new_spans)
    tracing.flush()
    tracing.switch_on(None)
    inbox.close()

    assert [json.loads(line)["event"] for line in output.getvalue().splitlines()] == ["spans_lost", "spans_arrive"]
    assert {span.name for span in inbox.spans()} == {"process a-queue"}


def test_without_tracing_opentelemetry_is_not_imported() -> None:
    modules = "tasks.celery_tasks, worker.services.outbox_relay, worker.services.scheduler"
    script = f"import sys, {modules}; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "False"

"""Telemetry of a worker: traces to a collector, check-ins to Sentry, its log."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.inbox import Inbox
from tests.support.system import System, WorkerProcess, job, until
from worker.messaging import topology

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
SLOW = [pytest.param(pool, marks=pytest.mark.slow) for pool in ("threads", "gevent")]
POOLS = ["prefork", *SLOW]  # prefork, with several processes, is the hardest case
NEVER = str(10 * 60 * 1000)  # ms: spans are exported only when the worker ends


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    inbox.close()


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_spans_of_all_processes_are_exported_before_the_worker_ends(system: System, inbox: Inbox, pool: str) -> None:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": inbox.url, "OTEL_BSP_SCHEDULE_DELAY": NEVER}
    worker = system.start_worker(**settings, WORKER_POOL=pool, WORKER_CONCURRENCY="2")
    system.publish([job("offer-1~http-503~1")], headers={"traceparent": TRACEPARENT})

    system.until_events(1)
    assert worker.stop() == 0

    (message,) = system.event_messages
    sent = {f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01": span.name for span in inbox.spans()}
    assert sent[message.headers["traceparent"]] == "send booking.confirmed"
    assert {f"{span.trace_id.hex()}" for span in inbox.spans()} == {TRACE}
    names = set(sent.values())
    assert names >= {"process confirm-offer.jobs", "send confirm-offer.resume", "process confirm-offer.resume"}


@pytest.mark.slow
def test_a_collector_without_the_extra_is_logged_and_ignored(system: System, inbox: Inbox, tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").touch()  # hides the real package
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    worker = system.start_worker(OTEL_EXPORTER_OTLP_ENDPOINT=inbox.url, PYTHONPATH=paths)
    system.publish([job("offer-1")], headers={"traceparent": TRACEPARENT})

    system.until_events(1)

    assert [line["why"] for line in lines(worker, "tracing_off")] == ["confirm-offer[tracing] is not installed"]
    assert system.event_messages[0].headers["traceparent"] == TRACEPARENT
    (ended,) = lines(worker, "attempt_ended")
    fields = ("offer_id", "partner_id", "attempt", "state", "trace_id")
    assert [ended[name] for name in fields] == ["offer-1", "P-100", 1, "confirmed", TRACE]
    assert inbox.bodies == []


def test_sentry_gets_check_ins_of_the_scheduler_and_no_expected_error(system: System, inbox: Inbox) -> None:
    system.sandbox.latency = 0.01
    worker = system.start_worker(
        SENTRY_DSN=inbox.dsn(),
        SENTRY_CRON_MONITOR="confirm-offer-scheduler",
        SENTRY_ENVIRONMENT="staging",
        SENTRY_RELEASE="confirm-offer@1.2.3+abc",
        RETRY_MAX_ATTEMPTS="2",
    )
    faults = ("http-422", "http-503~2", "http-500~1", "drop-before~1", "html~1", "busy~1")
    system.publish([*(job(f"offer-{number}~{fault}") for number, fault in enumerate(faults)), b"no job"])
    system.until_events(len(faults))
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)
    assert worker.stop() == 0

    (envelope,) = inbox.bodies
    kind, check_in = map(json.loads, envelope.split(b"\n")[1:3])
    assert kind["type"] == "check_in"
    assert (check_in["monitor_slug"], check_in["status"]) == ("confirm-offer-scheduler", "ok")
    assert (check_in["environment"], check_in["release"]) == ("staging", "confirm-offer@1.2.3+abc")
    assert check_in["monitor_config"]["schedule"] == {"type": "interval", "value": 1, "unit": "minute"}


def lines(worker: WorkerProcess, event: str) -> list[dict[str, object]]:
    return [line for line in worker.logged() if line["event"] == event]

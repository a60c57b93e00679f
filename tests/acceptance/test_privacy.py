"""Marked personal data and secrets are sent through all paths, also failing ones, and found only where they may be."""

import base64
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from models.states import ENDED
from tests.support.inbox import Inbox
from tests.support.servers import postgresql_program
from tests.support.system import System, WorkerProcess, job, until
from worker.messaging import topology
from worker.sandbox.faults import FAULTS

pytestmark = pytest.mark.slow

MARK = "Quxomat"  # in every personal or secret value
PERSON = {
    "first_name": f"{MARK}-first",
    "last_name": f"{MARK}-last",
    "email": f"{MARK}@mail.example",
    "phone": f"+44 {MARK}",
    "address1": f"1 {MARK} Street",
    "city": f"{MARK}ville",
    "region": f"{MARK}shire",
    "postcode": f"{MARK} 1",
    "birth_date": f"{MARK}-01-01",
    "unheard_of": {"passport": f"{MARK}-passport"},
}
QUOTE = {
    "id": "quote-1",
    "insured": [{**PERSON, "country": "GB"}],
    "brightwrite_details": {"bw_device_id": f"{MARK}-device"},
    "unheard_of": f"{MARK}-of-the-quote",
}
MARKED = {"policyholder": {**PERSON, "country": "GB"}, "quotes": [QUOTE]}
MALFORMED: tuple[Any, ...] = (
    {**MARKED, "partner_id": f"{MARK}/", "offer_id": "o-1"},
    {**MARKED, "offer_id": "o-2", f"{MARK}": 1},
    {**MARKED, "offer_id": "o-3", "policyholder": {**PERSON, "country": MARK}},
    {**MARKED, "offer_id": "o-4", "policyholder": f"{MARK}"},
    {**MARKED, "offer_id": "o-5", "quotes": [{**QUOTE, "id": [MARK]}]},
    {**MARKED, "offer_id": "o-6", "metadata": {f"{MARK}": {"x": MARK}}},
    {**MARKED, "offer_id": "o-7", "order_reference": [MARK]},
    f'{{"policyholder": "{MARK}'.encode(),
    f'{{"{MARK}": 1, "{MARK}": 2}}'.encode(),
    f'"{MARK}"'.encode(),
)
LIBRARIES = ("amqp", "celery", "kombu", "psycopg", "requests", "sqlalchemy", "urllib3", "vine")
LOUD = (
    "-c",
    f"""
import logging, sys
from worker.observability import logs
configure = logs.configure

def loud(*arguments):
    configure(*arguments)
    for name in {[*LIBRARIES, "celery.app.trace", "sqlalchemy.engine", "sqlalchemy.pool"]}:
        logging.getLogger(name).setLevel(logging.DEBUG)

logs.configure = loud
sys.argv = ["confirm-offer", "worker"]
from worker.cli.app import main
main()
""",
)  # a worker whose libraries log as much as possible
SLOW = {"slow-headers", "drip"}  # "slow" represents them
PERMANENT = {"pending", "booked-nowhere", "redirect"}  # the others occur once, so that the breaker stays closed


@pytest.fixture
def sentry() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    inbox.close()


@pytest.fixture
def collector() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    inbox.close()


def marks_of(system: System) -> set[str]:
    """Values that may be found nowhere: the mark, and the secrets of the sandbox."""
    secrets = {system.sandbox.client_secret, *system.sandbox._tokens}
    for booking in system.sandbox.bookings.values():
        if "security_token" in booking:
            secrets |= {booking["security_token"], booking["coi"]["url"], booking["account_url"]}
    return {MARK, base64.b64encode(MARK.encode()).decode()[:8], *secrets}


def found(marks: Iterable[str], text: str) -> set[str]:
    lowered = text.lower()
    return {mark for mark in marks if mark.lower() in lowered}


def kinds_of(sentry: Inbox) -> set[str]:
    """The kinds of the received envelopes."""
    return {json.loads(body.split(b"\n")[1])["type"] for body in list(sentry.bodies)}


def pg_dump(url: str) -> str:
    program = postgresql_program("pg_dump")
    return subprocess.run(
        [program, url.replace("+psycopg", ""), "--inserts"], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def metrics_of(worker: WorkerProcess) -> str:
    (port,) = [line["port"] for line in worker.logged() if line["event"] == "metrics_served"]
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_marked_data_is_found_only_where_it_may_be(system: System, sentry: Inbox, collector: Inbox) -> None:
    sandbox = system.sandbox
    sandbox.client_secret = f"{MARK}-of-the-client"
    sandbox.slow_seconds = 3
    offers = [f"ok-{number}" for number in range(5)] + ["refused~http-418", "broken~http-500~1"]
    offers += [f"{name}~{name}" if name in PERMANENT else f"{name}~{name}~1" for name in FAULTS.keys() - SLOW]
    settings = {
        "XONE_CLIENT_SECRET": sandbox.client_secret,
        "XONE_TIMEOUT": "1",
        "RETRY_MAX_ATTEMPTS": "2",
        "LOG_LEVEL": "DEBUG",
        "METRICS_PORT": "0",
        "SENTRY_DSN": sentry.dsn(MARK.lower()),
        "SENTRY_TRACES_SAMPLE_RATE": "1",
        "SENTRY_CRON_MONITOR": "scheduler",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
    }

    sandbox.rotate_secret("another")  # causes an error for Sentry
    worker = system.start_worker(LOUD, **settings)
    system.publish(job(offer, **MARKED) for offer in offers)
    until(lambda: "event" in kinds_of(sentry), 60)
    sandbox.rotate_secret(settings["XONE_CLIENT_SECRET"])
    system.publish(body if isinstance(body, bytes) else {**job("any"), **body} for body in MALFORMED)
    until(lambda: sum(system.states().values()) == len(offers), 60)
    until(lambda: set(system.states()) <= set(ENDED), 120)
    system.publish([job("ok-1", **{**MARKED, "quotes": [{"id": f"{MARK}-other"}]})])  # a conflicting job
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == len(MALFORMED) + 1)
    system.until_events(len(offers))
    metrics = metrics_of(worker)
    worker.stop()

    marks = marks_of(system)
    dead_letters = system.drain(topology.DEAD_LETTERS)
    places = {
        "logs": worker.log.read_text(),
        "metrics": metrics,
        "sentry": b"".join(sentry.bodies).decode(),
        "traces": b"".join(collector.bodies).decode("utf-8", "replace"),
        "events": "".join(
            f"{message.headers} {message.properties} {message.body}" for message in system.event_messages
        ),
        "resume queue": str([message.body for message in system.drain(topology.RESUME)]),
        "headers of dead letters": str([message.headers for message in dead_letters]),
        "database": pg_dump(system.database_url),
    }
    assert {place: found(marks, text) for place, text in places.items() if found(marks, text)} == {}
    assert all(offer in places["database"] for offer in offers), "the dump is one of these confirmations"
    assert MARK in "".join(str(dead_letter.body) for dead_letter in dead_letters), "the search finds existing marks"
    assert 'jobs_total{outcome="confirmed"}' in metrics
    assert set(system.states()) == set(ENDED)
    assert kinds_of(sentry) >= {"event", "transaction", "check_in"}
    assert {span.name for span in collector.spans()} >= {"record attempt", "send confirm-offer.dead-letters"}
    loggers = {line["logger"].split(".")[0] for line in worker.logged()}
    assert {"tasks", "celery", "kombu", "amqp", "sqlalchemy", "urllib3"} <= loggers


@pytest.mark.parametrize("pool", ["threads", "prefork", "gevent"])
def test_signals_show_places_in_the_code_and_no_values(system: System, pool: str) -> None:
    system.sandbox.latency = 3.0
    worker = system.start_worker(
        WORKER_POOL=pool, WORKER_CONCURRENCY="2", CELERY_RDBSIG="1", PYTHONDEVMODE="1", PYTHONFAULTHANDLER="1"
    )
    system.publish([job("offer-1", **MARKED)])
    until(lambda: system.sandbox.calls)

    pids = [worker.process.pid, *map(int, children_of(worker))]
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    until(lambda: worker.log.read_text().count("most recent call first") >= len(pids))
    system.until_events(1)

    assert len(system.sandbox.calls) == 1, "the signal interrupts no task"
    assert "LOCAL VARIABLES" not in worker.log.read_text()
    assert found(marks_of(system), worker.log.read_text()) == set()
    for pid in pids:
        assert re.search(r"^Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)


def children_of(worker: WorkerProcess) -> list[str]:
    pid = worker.process.pid
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

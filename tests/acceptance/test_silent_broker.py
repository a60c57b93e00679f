"""A broker that falls silent with all connections open, and workers that must not seem silent to it."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from tests.support.link import Link
from tests.support.system import System, WorkerProcess, job, until
from worker.cli.health import health
from worker.messaging.topology import JOBS
from worker.sandbox.server import Sandbox
from worker.services import health_file

pytestmark = pytest.mark.slow

CONNECTION_LOST = "consumer: Connection to broker lost. Trying to re-establish the connection..."


@pytest.fixture
def links(broker_url: str) -> Iterator[list[Link]]:
    """Two ways to the broker."""
    with ExitStack() as stack:
        yield [stack.enter_context(Link(urlsplit(broker_url).port or 0)) for _ in range(2)]


def over(links: list[Link], broker_url: str) -> str:
    """BROKER_URL for these ways to the broker."""
    virtual_host = broker_url.rpartition("/")[2]
    return ";".join(f"amqp://guest:guest@127.0.0.1:{link.port}/{virtual_host}" for link in links)


@pytest.mark.parametrize("pool", ["threads", "gevent", "prefork"])
def test_a_worker_leaves_a_silent_broker_in_half_a_minute_and_is_not_well_until_then(
    pool: str,
    links: list[Link],
    broker_url: str,
    postgresql_url: str,
    sandbox: Sandbox,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a call of almost 30 s under way, which is neither repeated nor lost."""
    monkeypatch.setattr(health_file.tempfile, "tempdir", str(tmp_path))
    environment = {name: value for name, value in environment.items() if name != "XONE_TIMEOUT"}
    with System(broker_url, postgresql_url, sandbox, environment, tmp_path) as system:
        worker = system.start_worker(BROKER_URL=over(links, broker_url), WORKER_POOL=pool, WORKER_CONCURRENCY="4")
        until(lambda: CliRunner().invoke(health).exit_code == 0, 60)
        sandbox.latency = 25.0
        system.publish([job("offer-1")])
        until(lambda: sandbox.bookings)  # XONE has been called and has not answered

        (used,) = [link for link in links if link.connections]
        used.silence()
        silent_since = time.monotonic()
        sandbox.latency = 0.0
        system.publish([job("offer-2")])
        until(lambda: "consumer" in _unwell(), 30)
        assert len(sandbox.bookings) == 1, "it is not well before it consumes again"
        until(lambda: ("P-100", "offer-2") in sandbox.bookings, 60)

        assert time.monotonic() - silent_since < 30
        until(lambda: _unwell() == [])
        system.until_events(2)
        assert (len(sandbox.calls), sandbox.overlapping) == (2, set())
        until(lambda: system.queue_length(JOBS) == 0)
        assert _told_by_celery(worker) == [
            "consumer: Connection to broker lost. Trying to re-establish the connection..."
        ]


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_a_worker_leaves_a_broker_that_falls_silent_in_the_middle_of_a_message(
    pool: str,
    links: list[Link],
    broker_url: str,
    postgresql_url: str,
    sandbox: Sandbox,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Its loop is blocked then: py-amqp reads the rest of a frame, for as long as that takes."""
    with System(broker_url, postgresql_url, sandbox, environment, tmp_path) as system:
        worker = system.start_worker(
            BROKER_URL=over(links, broker_url), WORKER_POOL=pool, WORKER_PARTS="tasks", WORKER_CONCURRENCY="2"
        )
        until(lambda: "ready." in worker.log.read_text(), 60)
        (used,) = [link for link in links if link.connections]
        used.silence(after=20_000)
        silent_since = time.monotonic()
        system.publish([json.dumps(job("offer-1")).encode() + b" " * 200_000])
        until(lambda: sandbox.bookings, 60)

        assert time.monotonic() - silent_since < 30
        assert [line["silent_s"] for line in worker.logged() if line["event"] == "broker_silent"]


def _told_by_celery(worker: WorkerProcess) -> list[str]:
    """What an operator is told beside our own lines: the first half of each line."""
    foreign = [line for line in worker.logged() if line["level"] != "info" and not line["logger"].startswith("worker.")]
    return [line["event"].partition(" (")[0] for line in foreign]


def _unwell() -> list[str]:
    (worker,) = json.loads(CliRunner().invoke(health, ["--json"]).stdout)["workers"]
    unwell: list[str] = worker["unwell"]
    return unwell


@pytest.mark.parametrize("pool", ["threads", "gevent", "prefork"])
def test_a_worker_that_stops_during_a_long_call_acknowledges_its_message(pool: str, system: System) -> None:
    """RabbitMQ closes a connection on which it hears nothing for three heartbeats, and gives the message to another."""
    worker = system.start_worker(WORKER_POOL=pool, WORKER_CONCURRENCY="2", XONE_TIMEOUT="60")
    system.sandbox.latency = 30.0
    system.publish([job("offer-1")])
    until(lambda: system.sandbox.bookings, 60)

    assert worker.stop(60) == 0

    assert system.states() == {"confirmed": 1}
    assert system.queue_length(JOBS) == 0
    assert _told_by_celery(worker) == []
    assert "connection_lost_while_stopping" not in worker.log.read_text()

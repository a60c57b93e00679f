"""Outages of database, broker and worker: a worker stays up, waits, logs it once, and goes on."""

import time
from pathlib import Path

import pytest
from sqlalchemy import delete

from models.states import State
from models.tables import Attempt, Confirmation
from tests.support.servers import PostgreSQL, RabbitMQ, require
from tests.support.system import System, job, until
from worker.messaging import broker, topology
from worker.sandbox.server import Sandbox
from worker.storage import database, migrator


def count_events(worker_log: Path, event: str) -> int:
    return worker_log.read_text().count(f'"{event}"')


@pytest.fixture
def own_postgresql(tmp_path: Path):  # type: ignore[no-untyped-def]
    require(PostgreSQL)
    server = PostgreSQL(tmp_path / "postgresql")
    server.start()
    server.create_database("confirm_offer")
    engine = database.connect(server.url("confirm_offer"))
    migrator.upgrade(engine)
    engine.dispose()
    yield server
    server.stop()


def test_a_worker_survives_an_outage_of_the_database(
    own_postgresql: PostgreSQL, broker_url: str, sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> None:
    url = own_postgresql.url("confirm_offer")
    with System(broker_url, url, sandbox, environment, tmp_path) as system:
        own_postgresql.stop()
        worker = system.start_worker()
        system.publish(job(f"first-{number}") for number in range(20))
        until(lambda: "waiting" in worker.log.read_text())
        own_postgresql.start()
        system.until_events(20)

        sandbox.latency = 0.5
        system.publish(job(f"second-{number}") for number in range(40))
        until(lambda: sum(offer.startswith("second") for _, offer in sandbox.bookings) >= 10)
        own_postgresql.kill()
        until(lambda: not [call for call in sandbox.calls if call.status is None])
        cpu_before = cpu_seconds(worker.process.pid)
        time.sleep(2.0)  # a fixed time: the worker must stay idle
        cpu = cpu_seconds(worker.process.pid) - cpu_before
        own_postgresql.start()
        system.until_events(60)

        assert system.states() == {State.CONFIRMED: 60}
        assert len(sandbox.bookings) == 60
        assert sandbox.overlapping == set()
        assert worker.process.poll() is None
        assert cpu < 1.0, "no hot loop"
        assert system.queue_length(topology.DEAD_LETTERS) == 0
        assert count_events(worker.log, "defect") == 0


def test_a_worker_survives_a_read_only_database(system: System) -> None:
    """As in a failover, when the server is a standby or has become one."""
    worker = system.start_worker()
    system.publish([job("first")])
    system.until_events(1)
    system.set_read_only("on")
    system.publish([job("second")])
    until(lambda: "waiting" in worker.log.read_text())

    system.set_read_only("off")

    system.until_events(2)
    assert system.queue_length(topology.DEAD_LETTERS) == 0
    assert count_events(worker.log, "defect") == 0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100.0


@pytest.fixture
def own_rabbitmq(tmp_path: Path):  # type: ignore[no-untyped-def]
    require(RabbitMQ)
    server = RabbitMQ(tmp_path / "rabbitmq")
    server.start()
    with broker.connect(server.url) as connection:
        topology.declare(connection)
    yield server
    server.stop()


@pytest.mark.slow
def test_a_worker_survives_an_outage_of_the_broker(
    own_rabbitmq: RabbitMQ, postgresql_url: str, sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> None:
    sandbox.latency = 0.3
    own_rabbitmq.stop()
    system = System(own_rabbitmq.url, postgresql_url, sandbox, environment, tmp_path)
    worker = system.start_worker()
    until(lambda: "Trying again" in worker.log.read_text() or "waits_for" in worker.log.read_text())
    own_rabbitmq.start()
    with system:
        offers = [f"offer-{number}" for number in range(200)]
        system.publish(map(job, offers))
        own_rabbitmq.flush()
        until(lambda: len(sandbox.bookings) >= 50)
        own_rabbitmq.kill()
        until(lambda: not [call for call in sandbox.calls if call.status is None])
        own_rabbitmq.start()
        system.reconnect()
        system.until_events(200, seconds=90)

        assert {event["data"]["offer_id"] for event in system.events} == set(offers)
        assert system.states() == {State.CONFIRMED: 200}
        assert len(sandbox.bookings) == 200
        assert sandbox.overlapping == set()
        assert worker.process.poll() is None
        until(lambda: system.queue_length(topology.JOBS) == 0)
        assert count_events(worker.log, "defect") == 0


def test_sigterm_lets_calls_end_and_starts_none(system: System) -> None:
    system.sandbox.latency = 1.0
    worker = system.start_worker(WORKER_CONCURRENCY="8")
    offers = [f"offer-{number}" for number in range(40)]
    system.publish(map(job, offers))
    until(lambda: len(system.sandbox.bookings) >= 8)

    assert worker.stop() == 0

    booked = len(system.sandbox.bookings)
    assert booked < 40
    assert system.states()[State.CONFIRMED] == booked
    assert len(system.take_events()) == booked, "the outbox is flushed"
    system.sandbox.latency = 0.0
    system.start_worker()
    system.until_events(40)
    assert system.count(Attempt) == 40
    assert len(system.sandbox.calls) == 40


@pytest.mark.parametrize(
    "pool", ["threads", pytest.param("prefork", marks=pytest.mark.slow), pytest.param("gevent", marks=pytest.mark.slow)]
)
def test_sigterm_ends_a_worker_soon_while_the_database_is_unavailable(
    pool: str,
    own_postgresql: PostgreSQL,
    broker_url: str,
    sandbox: Sandbox,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    with System(broker_url, own_postgresql.url("confirm_offer"), sandbox, environment, tmp_path) as system:
        own_postgresql.stop()
        worker = system.start_worker(WORKER_POOL=pool, WORKER_CONCURRENCY="4")
        system.publish([job("offer-1")])
        until(lambda: "waiting" in worker.log.read_text())

        assert worker.stop(20) == 0

        until(lambda: system.queue_length(topology.JOBS) == 1)
        own_postgresql.start()
        system.start_worker()
        system.until_events(1)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_sigterm_ends_a_worker_in_its_grace_period_while_the_database_hangs(
    pool: str,
    own_postgresql: PostgreSQL,
    broker_url: str,
    sandbox: Sandbox,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Connections stay open, and the database answers none of them: answers of XONE wait to be recorded."""
    sandbox.latency = 1.0
    with System(broker_url, own_postgresql.url("confirm_offer"), sandbox, environment, tmp_path) as system:
        worker = system.start_worker(WORKER_POOL=pool, WORKER_CONCURRENCY="2")
        system.publish(job(f"offer-{number}") for number in range(2))
        until(lambda: len(sandbox.bookings) == 2)
        own_postgresql.pause()
        try:
            assert worker.stop(62) == 0  # XONE_TIMEOUT is 2 s, the grace period a minute longer
        finally:
            own_postgresql.resume()

        system.end_leases()
        system.start_worker()
        system.until_events(2)
        assert system.states() == {State.CONFIRMED: 2}
        assert len(sandbox.bookings) == 2


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_sigterm_ends_a_worker_in_its_grace_period_while_the_broker_hangs(
    pool: str,
    own_rabbitmq: RabbitMQ,
    postgresql_url: str,
    sandbox: Sandbox,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """As behind a broken network: connections stay open, and the broker does not answer."""
    with System(own_rabbitmq.url, postgresql_url, sandbox, environment, tmp_path) as system:
        worker = system.start_worker(WORKER_POOL=pool)
        system.publish([job("offer-1")])
        system.until_events(1)
        own_rabbitmq.pause()
        try:
            assert worker.stop(90) == 0
        finally:
            own_rabbitmq.resume()


@pytest.mark.slow
def test_a_worker_survives_a_hanging_broker(
    own_rabbitmq: RabbitMQ, postgresql_url: str, sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> None:
    sandbox.latency = 0.3
    with System(own_rabbitmq.url, postgresql_url, sandbox, environment, tmp_path) as system:
        worker = system.start_worker(WORKER_CONCURRENCY="16")
        system.publish(job(f"offer-{number}") for number in range(100))
        until(lambda: len(sandbox.bookings) >= 20)
        own_rabbitmq.pause()
        until(lambda: count_events(worker.log, "duty_waits"))
        own_rabbitmq.resume()

        until(lambda: system.states() == {State.CONFIRMED: 100})
        until(lambda: len({event["id"] for event in system.take_events()}) == 100)
        assert sandbox.overlapping == set()
        assert count_events(worker.log, "defect") == 0


@pytest.mark.slow
def test_a_confirmation_that_kills_its_workers_needs_review(system: System) -> None:
    """Workers are killed during the call; the test makes the lease expire, to save time."""
    system.sandbox.slow_seconds = 60
    system.sandbox.bookings_mode = "forbidden"
    system.publish([job("offer-1~slow")])
    for number in range(1, 6):
        worker = system.start_worker()
        until(lambda number=number: system.count(Attempt) == number)
        worker.kill()
        system.end_leases()
    system.start_worker()

    (event,) = system.until_events(1)

    assert (event["type"], event["data"]["error"]["code"]) == ("confirmation.needs_review", "poison")


def test_a_confirmation_that_the_database_loses_during_the_call_is_stored_again(system: System) -> None:
    system.sandbox.latency = 1.0
    worker = system.start_worker()
    system.publish([job("offer-1")])
    until(lambda: system.states()["confirming"])

    with system.engine.begin() as connection:  # as by a failover to a replica that lagged
        connection.execute(delete(Attempt))
        connection.execute(delete(Confirmation))

    (event,) = system.until_events(1)
    assert (event["type"], event["data"]["booking"]["id"]) == (
        "booking.confirmed",
        system.sandbox.bookings["P-100", "offer-1"]["id"],
    )
    told = [line["event"] for line in worker.logged() if line["event"].startswith("confirmation_")]
    assert told == ["confirmation_gone", "confirmation_restored"]
    assert len(system.sandbox.calls) == 1
    assert not any(line["level"] in ("error", "critical") for line in worker.logged())

"""``health``: alive and consuming, or why not; and whether a restart would help."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.commands import run
from tests.support.scraping import port_of, scraped
from tests.support.servers import PostgreSQL, RabbitMQ, free_port, require
from tests.support.system import PROJECT, System, job, until
from worker.cli.health import health
from worker.messaging import broker, topology
from worker.sandbox.server import Sandbox
from worker.services import health_file
from worker.storage import database, migrator

Probe = Callable[..., Result]

# A worker whose main thread, the consumer's, hangs from SIGALRM on. Its other threads go on.
HANGS = (
    "import signal, sys, time; from worker.__main__ import main;"
    "signal.signal(signal.SIGALRM, lambda *_: time.sleep(1000)); sys.argv = ['confirm-offer', 'worker']; main()"
)


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    """In this process, as a program takes longer to start than what is waited for."""

    def ask(*options: str) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(health_file.tempfile, "tempdir", str(tmp_path))
            return CliRunner().invoke(health, list(options))

    return ask


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A probe that waits for seconds where others wait for minutes."""
    monkeypatch.setattr(health_file.tempfile, "tempdir", str(tmp_path))
    for name, seconds in {"UNWELL_AFTER": 6.0, "FROZEN_AFTER": 6.0, "STUCK_AFTER": 12.0}.items():
        monkeypatch.setattr(health_file, name, seconds)
    return lambda *options: CliRunner().invoke(health, list(options))


def facts(probe: Probe) -> dict[str, Any]:
    """What the one worker notes; empty where there is none."""
    workers = json.loads(probe("--json").stdout)["workers"]
    return workers[0] if workers else {}


def settled(probe: Probe, *unwell: str) -> dict[str, Any]:
    """The facts, as soon as these parts and no others are unwell."""

    def is_so() -> dict[str, Any] | None:
        found = facts(probe)
        return found if found and set(found["unwell"]) == set(unwell) else None

    found: dict[str, Any] = until(is_so, 60.0)
    return found


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (["-m", "worker", "worker"], {}),
        pytest.param(["-m", "celery", "-A", "worker", "worker"], {}, marks=pytest.mark.slow),
        (["-m", "worker", "worker"], {"WORKER_POOL": "prefork", "WORKER_CONCURRENCY": "2"}),
        pytest.param(["-m", "worker", "worker"], {"WORKER_POOL": "gevent"}, marks=pytest.mark.slow),
    ],
    ids=["worker", "celery", "prefork", "gevent"],
)
def test_a_worker_is_well_while_it_runs(
    command: list[str], settings: dict[str, str], system: System, probe: Probe, tmp_path: Path
) -> None:
    before = probe()
    worker = system.start_worker(command, **settings)
    until(lambda: probe().exit_code == 0, 60.0)
    told, live = run("health", TMPDIR=str(tmp_path)), probe("--live")
    worker.stop()
    after = probe()

    assert (before.exit_code, live.exit_code, after.exit_code) == (1, 0, 1)
    assert "no worker of this user runs on this machine" in before.stderr
    assert told.stdout == f"worker {worker.process.pid} is well: consumer, tasks, scheduler, relay, database\n"
    assert live.stdout == f"worker {worker.process.pid} is alive\n"


def test_parts_that_it_does_not_run_are_not_asked_for(system: System, probe: Probe) -> None:
    system.start_worker(WORKER_PARTS="relay")

    assert settled(probe)["parts"].keys() == {"relay", "database"}


@pytest.mark.parametrize("pool", [pytest.param("threads", marks=pytest.mark.slow), "prefork"])
def test_a_killed_worker_is_none(pool: str, system: System, probe: Probe, tmp_path: Path) -> None:
    worker = system.start_worker(WORKER_POOL=pool, WORKER_CONCURRENCY="2")
    until(lambda: facts(probe))
    worker.kill()

    assert "no worker of this user runs on this machine" in probe().stderr
    assert not list(tmp_path.glob("confirm-offer-*/*.json"))


def test_notes_of_a_killed_one_whose_process_id_another_took(impatient: Callable[..., Result]) -> None:
    """As in a container that is started again: its ids begin anew, and its /tmp may have stayed."""
    health_file.directory().mkdir()
    left = health_file.directory() / f"{os.getpid()}-0.json"
    left.write_text("{}")

    assert "no worker of this user runs on this machine" in impatient().output
    assert not left.exists()


@pytest.mark.parametrize("pool", ["threads", pytest.param("gevent", marks=pytest.mark.slow)])
def test_a_worker_without_rabbitmq_is_alive_but_not_well(pool: str, system: System, probe: Probe) -> None:
    system.start_worker(WORKER_POOL=pool, BROKER_URL=f"amqp://guest:guest@127.0.0.1:{free_port()}//")

    found = settled(probe, "consumer", "scheduler", "relay")
    until(lambda: probe().stdout.count("waits for") == 3)
    told, live = probe(), probe("--live")

    assert found["stuck"] == []
    assert told.stdout.splitlines()[1:] == [
        "  consumer: waits for broker, since its start",
        "  scheduler: waits for broker, since its start",
        "  relay: waits for broker, since its start",
    ]
    assert (told.exit_code, live.exit_code) == (1, 0)


def test_a_worker_without_its_database_is_alive_but_not_well(system: System, probe: Probe) -> None:
    system.start_worker(DATABASE_URL=f"postgresql+psycopg://postgres@127.0.0.1:{free_port()}/none")

    settled(probe, "database", "scheduler", "relay")
    until(lambda: probe().stdout.count("waits for database, since its start") == 3)

    assert (probe().exit_code, probe("--live").exit_code) == (1, 0)


@pytest.mark.slow
def test_a_frozen_worker_is_not_alive(system: System, probe: Probe, impatient: Callable[..., Result]) -> None:
    worker = system.start_worker()
    settled(probe)
    until(lambda: impatient("--live").exit_code == 0)

    worker.process.send_signal(signal.SIGSTOP)
    until(lambda: impatient("--live").exit_code == 1)

    for done in impatient(), impatient("--live"):
        assert done.exit_code == 1
        assert f"worker {worker.process.pid} is frozen: it has noted nothing for" in done.stdout
    worker.process.send_signal(signal.SIGCONT)
    until(lambda: impatient().exit_code == 0)


@pytest.mark.slow
def test_a_worker_whose_consumer_hangs_is_not_alive(
    system: System, probe: Probe, impatient: Callable[..., Result]
) -> None:
    worker = system.start_worker(["-c", HANGS])
    settled(probe)

    worker.process.send_signal(signal.SIGALRM)
    until(lambda: impatient("--live").exit_code == 1)

    assert impatient("--live").stdout == f"worker {worker.process.pid} is stuck: consumer\n"
    assert "\n  consumer: not well since" in impatient().stdout


def test_a_worker_that_ends_its_last_calls_is_alive(system: System, probe: Probe) -> None:
    worker = system.start_worker(XONE_TIMEOUT="90")
    settled(probe)
    system.sandbox.latency = 60.0
    system.publish([job("offer-1")])
    until(lambda: system.sandbox.bookings)  # XONE has been called, and has not answered

    worker.process.send_signal(signal.SIGTERM)
    until(lambda: facts(probe).get("stopping"))
    told, live = probe(), probe("--live")

    assert (told.exit_code, live.exit_code) == (1, 0)
    assert told.stdout == f"worker {worker.process.pid} is stopping: it takes nothing new\n"
    system.sandbox.stop()  # sends the answer
    assert worker.process.wait(30) == 0
    assert "no worker of this user runs on this machine" in probe().stderr


def test_a_consumer_that_the_broker_has_cancelled_consumes_again(system: System, probe: Probe) -> None:
    """Its queue is deleted; it comes back, and is well only where it really consumes."""
    system.start_worker()
    settled(probe)

    system.connection.default_channel.queue_delete(topology.JOBS)
    until(lambda: _consumers(system) == 1)
    system.publish([job("offer-1")])

    system.until_events(1)
    assert probe().exit_code == 0


@pytest.mark.slow
def test_a_consumer_whose_channel_the_broker_has_closed_consumes_again(
    system: System, probe: Probe, rabbitmq: RabbitMQ
) -> None:
    """A delivery that is held for longer than ``consumer_timeout`` closes the channel (406)."""
    worker = system.start_worker(XONE_TIMEOUT="60")
    settled(probe)
    _set_times(rabbitmq, consumer_timeout=1000, channel_tick_interval=1000)
    system.reconnect()
    try:
        with system.connection.channel() as channel:
            channel.queue_delete(topology.JOBS)  # the worker's channel comes anew, with the short time-out
        until(lambda: _consumers(system) == 1)
        system.sandbox.latency = 5.0
        system.publish([job("offer-1")])
        until(lambda: "PRECONDITION_FAILED" in worker.log.read_text())
    finally:
        _set_times(rabbitmq, consumer_timeout=1_800_000, channel_tick_interval=60_000)

    until(lambda: _consumers(system) == 1)
    assert settled(probe)["unwell"] == []
    system.until_events(1)
    assert system.states() == {"confirmed": 1}


def _set_times(rabbitmq: RabbitMQ, **milliseconds: int) -> None:
    """For channels that are opened from now on."""
    set_each = [f"application:set_env(rabbit, {name}, {value})" for name, value in milliseconds.items()]
    rabbitmq.ctl("eval", f"{', '.join(set_each)}.")


def _consumers(system: System) -> int:
    with system.connection.channel() as channel:
        try:
            return int(channel.queue_declare(topology.JOBS, passive=True).consumer_count)
        except system.connection.channel_errors:
            return 0


@pytest.mark.slow
def test_an_outage_in_the_middle_and_its_end(
    sandbox: Sandbox, environment: dict[str, str], tmp_path: Path, probe: Probe
) -> None:
    require(RabbitMQ)
    require(PostgreSQL)
    rabbitmq, postgresql = RabbitMQ(tmp_path / "rabbitmq"), PostgreSQL(tmp_path / "postgresql")
    rabbitmq.start()
    postgresql.start()
    postgresql.create_database("confirm_offer")
    engine = database.connect(postgresql.url("confirm_offer"))
    migrator.upgrade(engine)
    engine.dispose()
    with broker.connect(rabbitmq.url) as connection:
        topology.declare(connection)
    with System(rabbitmq.url, postgresql.url("confirm_offer"), sandbox, environment, tmp_path) as system:
        system.start_worker()
        settled(probe)
        rabbitmq.stop()
        settled(probe, "consumer", "scheduler", "relay")
        postgresql.stop()
        settled(probe, "consumer", "scheduler", "relay", "database")

        assert (probe().exit_code, probe("--live").exit_code) == (1, 0)
        rabbitmq.start()
        postgresql.start()
        settled(probe)
    rabbitmq.stop()
    postgresql.stop()


def test_a_worker_that_can_note_nothing_says_so_and_works(system: System, tmp_path: Path) -> None:
    (tmp_path / f"confirm-offer-{os.getuid()}").write_text("in the way")
    worker = system.start_worker()

    until(lambda: "health_not_noted" in worker.log.read_text())
    system.publish([job("offer-1")])

    system.until_events(1)


def test_a_probe_imports_little() -> None:
    """It runs every few seconds in every container."""
    script = (
        "import sys; from worker.cli.health import health;"
        "health.main(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)

    for heavy in "celery", "kombu", "sqlalchemy", "requests", "rich":
        assert f"'{heavy}'" not in done.stdout


# A worker that takes a stall as such after some seconds instead of minutes, and whose tasks do what a test says.
STALLS = """
import sys, threading
from tasks import celery_tasks
from worker.__main__ import main
from worker.services import progress

progress.GRACE = 1.0
if sys.argv.pop() == "hang":
    celery_tasks.confirm.accept_job = lambda *_: threading.Event().wait()
sys.argv = ["confirm-offer", "worker"]
main()
"""
SHORT_CALLS = {"XONE_TIMEOUT": "0.5"}  # a lease then has 5.5 s, and the limit is 8.5 s


@pytest.mark.slow
def test_tasks_that_never_end_are_not_well(
    system: System, probe: Probe, impatient: Callable[..., Result], tmp_path: Path
) -> None:
    worker = system.start_worker(
        ["-c", STALLS, "hang"], WORKER_CONCURRENCY="2", METRICS_PORT=str(free_port()), **SHORT_CALLS
    )
    settled(probe)
    system.publish(job(f"offer-{number}") for number in range(4))

    def stalled() -> bool:
        return "tasks: waits for the end of 2 messages that it has in hand" in impatient().stdout

    until(stalled, 60)
    assert impatient().exit_code == 1
    assert json.loads(impatient("--json").stdout)["workers"][0]["unwell"] == ["tasks"]
    assert time.time() - scraped(port_of(worker))['last_well_timestamp_seconds{part="tasks"}'] > 5
    until(lambda: impatient("--live").exit_code == 1, 60)
    assert "stuck: tasks" in impatient("--live").stdout


@pytest.mark.slow
def test_a_database_that_refuses_each_write_is_told_by_the_tasks(
    system: System, probe: Probe, impatient: Callable[..., Result]
) -> None:
    """A restart would not help, so that the worker is alive."""
    system.start_worker(["-c", STALLS, "work"], WORKER_CONCURRENCY="2", WORKER_PARTS="tasks", **SHORT_CALLS)
    settled(probe)
    system.takes_no_writes("on")
    system.publish([job("offer")])

    until(lambda: "tasks: waits for database" in impatient().stdout, 60)
    assert impatient("--live").exit_code == 0
    system.takes_no_writes("off")
    until(lambda: impatient().exit_code == 0)
    assert system.states() == {"confirmed": 1}


@pytest.mark.slow
def test_no_work_and_slow_work_are_well(system: System, probe: Probe, impatient: Callable[..., Result]) -> None:
    """Far longer than the limit: idle, and with calls that each time out while others end."""
    system.start_worker(["-c", STALLS, "work"], WORKER_CONCURRENCY="2", **SHORT_CALLS)
    settled(probe)
    system.sandbox.latency = 30.0
    system.publish(job(f"offer-{number}") for number in range(8))
    ends_at = time.monotonic() + 18

    def is_well_all_the_time() -> bool:
        assert "tasks" not in facts(impatient)["unwell"]
        return time.monotonic() > ends_at

    until(is_well_all_the_time, 60, every=0.5)

"""``health`` says whether a worker is alive and consumes, or why not, and whether a restart would help."""

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
from sqlalchemy import text

from tests.support.commands import run
from tests.support.scraping import port_of, scrape
from tests.support.servers import PostgreSQL, RabbitMQ, free_port, require
from tests.support.system import PROJECT, System, job, until
from worker.cli.health import health
from worker.messaging import broker, topology
from worker.sandbox.server import Sandbox
from worker.services import health_file
from worker.storage import database, migrator

Probe = Callable[..., Result]

# A worker whose main thread, with the consumer, hangs after SIGALRM. Its other threads go on.
HANGING_WORKER = (
    "import signal, sys, time; from worker.__main__ import main;"
    "signal.signal(signal.SIGALRM, lambda *_: time.sleep(1000)); sys.argv = ['confirm-offer', 'worker']; main()"
)


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Runs ``health`` in this process: a program takes longer to start than the tests may wait."""

    def run_health(*options: str) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(health_file.tempfile, "tempdir", str(tmp_path))
            return CliRunner().invoke(health, list(options))

    return run_health


@pytest.fixture
def fast_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A probe that waits for seconds instead of minutes."""
    monkeypatch.setattr(health_file.tempfile, "tempdir", str(tmp_path))
    for name, seconds in {"UNWELL_AFTER": 6.0, "FROZEN_AFTER": 6.0, "STUCK_AFTER": 12.0}.items():
        monkeypatch.setattr(health_file, name, seconds)
    return lambda *options: CliRunner().invoke(health, list(options))


def health_of(probe: Probe) -> dict[str, Any]:
    """The health file of the only worker; empty if there is none."""
    workers = json.loads(probe("--json").stdout)["workers"]
    return workers[0] if workers else {}


def wait_for_unwell(probe: Probe, *unwell: str) -> dict[str, Any]:
    """Waits until exactly these parts are unwell. Returns the health file."""

    def unwell_as_expected() -> dict[str, Any] | None:
        found = health_of(probe)
        return found if found and set(found["unwell"]) == set(unwell) else None

    found: dict[str, Any] = until(unwell_as_expected, 60.0)
    return found


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (["-m", "worker", "worker"], {}),
        pytest.param(["-m", "celery", "-A", "worker", "worker"], {}, marks=pytest.mark.slow),
        pytest.param(
            ["-m", "worker", "worker"],
            {"WORKER_POOL": "prefork", "WORKER_CONCURRENCY": "2"},
            marks=pytest.mark.slow,
        ),
        pytest.param(["-m", "worker", "worker"], {"WORKER_POOL": "gevent"}, marks=pytest.mark.slow),
    ],
    ids=["worker", "celery", "prefork", "gevent"],
)
def test_a_running_worker_is_healthy(
    command: list[str], settings: dict[str, str], system: System, probe: Probe, tmp_path: Path
) -> None:
    before = probe()
    worker = system.start_worker(command, **settings)
    until(lambda: probe().exit_code == 0, 60.0)
    status, live = run("health", TMPDIR=str(tmp_path)), probe("--live")
    worker.stop()
    after = probe()

    assert (before.exit_code, live.exit_code, after.exit_code) == (1, 0, 1)
    assert "no worker of this user runs on this machine" in before.stderr
    assert (
        status.stdout
        == f"worker {worker.process.pid} is well: consumer, tasks, scheduler, follow-ups, relay, database\n"
    )
    assert live.stdout == f"worker {worker.process.pid} is alive\n"


def test_parts_that_a_worker_does_not_run_are_not_checked(system: System, probe: Probe) -> None:
    system.start_worker(WORKER_PARTS="relay")

    assert wait_for_unwell(probe)["parts"].keys() == {"relay", "database"}


@pytest.mark.parametrize("pool", [pytest.param("threads", marks=pytest.mark.slow), "prefork"])
def test_a_killed_worker_is_not_found(pool: str, system: System, probe: Probe, tmp_path: Path) -> None:
    worker = system.start_worker(WORKER_POOL=pool, WORKER_CONCURRENCY="2")
    until(lambda: health_of(probe))
    worker.kill()

    assert "no worker of this user runs on this machine" in probe().stderr
    assert not list(tmp_path.glob("confirm-offer-*/*.json"))


def test_the_health_file_of_a_killed_worker_is_ignored_although_its_process_id_is_in_use(
    fast_probe: Callable[..., Result],
) -> None:
    """As in a restarted container: process ids begin again, and /tmp may have been kept."""
    health_file.directory().mkdir()
    old_file = health_file.directory() / f"{os.getpid()}-0.json"
    old_file.write_text("{}")

    assert "no worker of this user runs on this machine" in fast_probe().output
    assert not old_file.exists()


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_a_worker_without_rabbitmq_is_alive_but_not_healthy(pool: str, system: System, probe: Probe) -> None:
    system.start_worker(WORKER_POOL=pool, BROKER_URL=f"amqp://guest:guest@127.0.0.1:{free_port()}//")

    found = wait_for_unwell(probe, "consumer", "scheduler", "relay")
    until(lambda: probe().stdout.count("waits for") == 3)
    status, live = probe(), probe("--live")

    assert found["stuck"] == []
    assert status.stdout.splitlines()[1:] == [
        "  consumer: waits for broker, since its start",
        "  scheduler: waits for broker, since its start",
        "  relay: waits for broker, since its start",
    ]
    assert (status.exit_code, live.exit_code) == (1, 0)


def test_a_worker_without_its_database_is_alive_but_not_healthy(system: System, probe: Probe) -> None:
    system.start_worker(DATABASE_URL=f"postgresql+psycopg://postgres@127.0.0.1:{free_port()}/none")

    wait_for_unwell(probe, "database", "scheduler", "follow-ups", "relay")
    until(lambda: probe().stdout.count("waits for database, since its start") == 4)

    assert (probe().exit_code, probe("--live").exit_code) == (1, 0)


@pytest.mark.slow
def test_a_frozen_worker_is_not_alive(system: System, probe: Probe, fast_probe: Callable[..., Result]) -> None:
    worker = system.start_worker()
    wait_for_unwell(probe)
    until(lambda: fast_probe("--live").exit_code == 0)

    worker.process.send_signal(signal.SIGSTOP)
    until(lambda: fast_probe("--live").exit_code == 1)

    for done in fast_probe(), fast_probe("--live"):
        assert done.exit_code == 1
        assert f"worker {worker.process.pid} is frozen: it has noted nothing for" in done.stdout
    worker.process.send_signal(signal.SIGCONT)
    until(lambda: fast_probe().exit_code == 0)


@pytest.mark.slow
def test_a_worker_whose_consumer_hangs_is_not_alive(
    system: System, probe: Probe, fast_probe: Callable[..., Result]
) -> None:
    worker = system.start_worker(["-c", HANGING_WORKER])
    wait_for_unwell(probe)

    worker.process.send_signal(signal.SIGALRM)
    until(lambda: fast_probe("--live").exit_code == 1)

    assert fast_probe("--live").stdout == f"worker {worker.process.pid} is stuck: consumer\n"
    assert "\n  consumer: not well since" in fast_probe().stdout


def test_a_worker_that_finishes_its_last_calls_is_alive(system: System, probe: Probe) -> None:
    worker = system.start_worker(XONE_TIMEOUT="90")
    wait_for_unwell(probe)
    system.sandbox.latency = 60.0
    system.publish([job("offer-1")])
    until(lambda: system.sandbox.bookings)  # XONE has been called and has not answered

    worker.process.send_signal(signal.SIGTERM)
    until(lambda: health_of(probe).get("stopping"))
    status, live = probe(), probe("--live")

    assert (status.exit_code, live.exit_code) == (1, 0)
    assert status.stdout == f"worker {worker.process.pid} is stopping: it takes nothing new\n"
    system.sandbox.stop()  # sends the answers
    assert worker.process.wait(30) == 0
    assert "no worker of this user runs on this machine" in probe().stderr


@pytest.mark.parametrize("queue", [topology.JOBS, topology.RESUME])
def test_a_consumer_that_the_broker_has_cancelled_consumes_again(queue: str, system: System, probe: Probe) -> None:
    """The queue is deleted. The consumer declares it anew, and is well only when it really consumes."""
    system.start_worker()
    wait_for_unwell(probe)

    system.connection.default_channel.queue_delete(queue)
    until(lambda: _consumers(system, queue) == 1)
    system.publish([job("offer-1")])

    system.until_events(1)
    assert probe().exit_code == 0


@pytest.mark.slow
def test_a_consumer_whose_channel_the_broker_has_closed_consumes_again(
    system: System, probe: Probe, rabbitmq: RabbitMQ
) -> None:
    """A delivery that is not acknowledged within ``consumer_timeout`` closes the channel (406)."""
    worker = system.start_worker(XONE_TIMEOUT="60")
    wait_for_unwell(probe)
    _set_timeouts(rabbitmq, consumer_timeout=1000, channel_tick_interval=1000)
    system.reconnect()
    try:
        with system.connection.channel() as channel:
            channel.queue_delete(topology.JOBS)  # the worker opens a new channel, with the short timeout
        until(lambda: _consumers(system) == 1)
        system.sandbox.latency = 5.0
        system.publish([job("offer-1")])
        until(lambda: "PRECONDITION_FAILED" in worker.log.read_text())
    finally:
        _set_timeouts(rabbitmq, consumer_timeout=1_800_000, channel_tick_interval=60_000)

    until(lambda: _consumers(system) == 1)
    assert wait_for_unwell(probe)["unwell"] == []
    system.until_events(1)
    assert system.states() == {"confirmed": 1}


def _set_timeouts(rabbitmq: RabbitMQ, **milliseconds: int) -> None:
    """Sets timeouts of RabbitMQ, for channels that are opened later."""
    set_each = [f"application:set_env(rabbit, {name}, {value})" for name, value in milliseconds.items()]
    rabbitmq.ctl("eval", f"{', '.join(set_each)}.")


def _consumers(system: System, queue: str = topology.JOBS) -> int:
    with system.connection.channel() as channel:
        try:
            return int(channel.queue_declare(queue, passive=True).consumer_count)
        except system.connection.channel_errors:
            return 0


@pytest.mark.slow
def test_health_follows_an_outage_and_its_end(
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
        wait_for_unwell(probe)
        rabbitmq.stop()
        wait_for_unwell(probe, "consumer", "scheduler", "relay")
        postgresql.stop()
        wait_for_unwell(probe, "consumer", "scheduler", "follow-ups", "relay", "database")

        assert (probe().exit_code, probe("--live").exit_code) == (1, 0)
        rabbitmq.start()
        postgresql.start()
        wait_for_unwell(probe)
    rabbitmq.stop()
    postgresql.stop()


def test_a_worker_that_cannot_write_its_health_file_logs_it_and_works(system: System, tmp_path: Path) -> None:
    (tmp_path / f"confirm-offer-{os.getuid()}").write_text("in the way")
    worker = system.start_worker()

    until(lambda: "health_not_noted" in worker.log.read_text())
    system.publish([job("offer-1")])

    system.until_events(1)


def test_a_probe_imports_few_packages() -> None:
    """Probes run every few seconds in every container."""
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
    system: System, probe: Probe, fast_probe: Callable[..., Result], tmp_path: Path
) -> None:
    settings = {"WORKER_CONCURRENCY": "2", "METRICS_PORT": str(free_port()), "FOLLOW_UP_INTERVAL": "4", **SHORT_CALLS}
    worker = system.start_worker(["-c", STALLS, "hang"], **settings)
    wait_for_unwell(probe)
    system.publish(job(f"offer-{number}") for number in range(4))

    def stalled() -> bool:
        return "tasks: waits for the end of 2 messages that it has in hand" in fast_probe().stdout

    until(stalled, 60)
    assert fast_probe().exit_code == 1
    assert json.loads(fast_probe("--json").stdout)["workers"][0]["unwell"] == ["tasks"]
    assert time.time() - scrape(port_of(worker))['last_well_timestamp_seconds{part="tasks"}'] > 5
    until(lambda: fast_probe("--live").exit_code == 1, 60)
    assert "stuck: tasks" in fast_probe("--live").stdout


REFUSE = (
    "create function refuse() returns trigger language plpgsql as $$ begin raise 'full' using errcode = '53100'; end $$"
)


@pytest.mark.slow
def test_a_database_that_refuses_each_write_is_told_by_the_tasks(
    system: System, probe: Probe, fast_probe: Callable[..., Result]
) -> None:
    """A restart would not help, so that the worker is alive."""
    system.start_worker(["-c", STALLS, "work"], WORKER_CONCURRENCY="2", WORKER_PARTS="tasks", **SHORT_CALLS)
    wait_for_unwell(probe)
    with system.engine.begin() as connection:
        connection.execute(text(REFUSE))
        connection.execute(text("create trigger t before insert on confirmations execute function refuse()"))
    system.publish([job("offer")])

    until(lambda: "tasks: waits for database" in fast_probe().stdout, 60)
    assert fast_probe("--live").exit_code == 0
    with system.engine.begin() as connection:
        connection.execute(text("drop function refuse cascade"))
    until(lambda: fast_probe().exit_code == 0)
    assert system.states() == {"confirmed": 1}


@pytest.mark.slow
def test_a_read_only_database_is_not_well(system: System, probe: Probe) -> None:
    system.start_worker()
    until(lambda: probe().exit_code == 0)
    system.set_read_only("on")

    until(lambda: "database: waits for a database that takes writes" in probe().stdout, 60)
    system.set_read_only("off")
    until(lambda: probe().exit_code == 0, 60)


@pytest.mark.slow
def test_no_work_and_slow_work_are_well(system: System, probe: Probe, fast_probe: Callable[..., Result]) -> None:
    """Far longer than the limit: idle, and with calls that each time out while others end."""
    system.start_worker(["-c", STALLS, "work"], WORKER_CONCURRENCY="2", **SHORT_CALLS)
    wait_for_unwell(probe)
    system.sandbox.latency = 30.0
    system.publish(job(f"offer-{number}") for number in range(8))
    ends_at = time.monotonic() + 18

    def is_well_all_the_time() -> bool:
        assert "tasks" not in health_of(fast_probe)["unwell"]
        return time.monotonic() > ends_at

    until(is_well_all_the_time, 60, every=0.5)

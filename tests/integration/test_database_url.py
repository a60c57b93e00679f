"""What DATABASE_URL and libpq's environment give holds; a pooler before the database; what can't work is refused."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url, text

from models.states import State
from models.tables import Confirmation
from tests.support.confirming import rows, run
from tests.support.servers import PgBouncer, PostgreSQL, free_port, require
from tests.support.system import System, WorkerProcess, job
from worker.doctor import database as doctor
from worker.errors import SettingsError
from worker.messaging import topology
from worker.runtime import LIMITS, Runtime
from worker.sandbox.server import Sandbox
from worker.settings import DatabaseSettings, read
from worker.storage import database, migrator


def shown(url: str, *names: str) -> dict[str, str]:
    engine = database.connect(url)
    with engine.connect() as connection:
        values = {name: str(connection.execute(text(f"show {name}")).scalar()) for name in names}
    engine.dispose()
    return values


def test_options_of_the_url_hold(postgresql: PostgreSQL) -> None:
    postgresql.create_database("with_schema")
    with postgresql.connect("with_schema") as connection:
        connection.execute("create schema app")
    options = "options=-csearch_path%3Dapp&application_name=checkout-worker&connect_timeout=9"
    url = f"{postgresql.url('with_schema')}?{options}"

    engine = database.connect(url)
    migrator.upgrade(engine)
    with engine.connect() as connection:
        schemas = connection.execute(
            text("select distinct schemaname from pg_tables where tablename in ('confirmations', 'outbox')")
        ).scalars()
        assert list(schemas) == ["app"]
        parameters = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
    engine.dispose()

    assert shown(url, "search_path", "application_name", "timezone") == {
        "search_path": "app",
        "application_name": "checkout-worker",
        "timezone": "UTC",
    }
    assert parameters["connect_timeout"] == "9"
    assert parameters["keepalives_idle"] == "10", "what is not given has a default"
    postgresql.drop_database("with_schema")


def test_libpqs_environment_holds(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c search_path=elsewhere -c timezone=Asia/Tokyo")
    monkeypatch.setenv("PGAPPNAME", "by-environment")

    values = shown(postgresql_url, "search_path", "application_name", "timezone")

    assert values == {"search_path": "elsewhere", "application_name": "by-environment", "timezone": "UTC"}


def test_libpqs_form_for_several_hosts_holds(postgresql: PostgreSQL) -> None:
    host = f"127.0.0.1:{postgresql.port}"
    for hosts in f"127.0.0.1:{free_port()},{host}", f"{host},127.0.0.1", f"127.0.0.2,[::1]:{free_port()},{host}":
        given = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write&application_name=several"
        url = read(DatabaseSettings, DATABASE_URL=given).url

        assert shown(url, "port", "application_name") == {"port": str(postgresql.port), "application_name": "several"}


@pytest.mark.parametrize("place", ["url", "environment"])
def test_a_service_holds_whole(
    place: str, postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(postgresql_url)
    file = tmp_path / "services"
    file.write_text(f"[mine]\nhost={url.host}\nport={url.port}\nuser=postgres\napplication_name=by-service\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    if place == "environment":
        monkeypatch.setenv("PGSERVICE", "mine")

    given = f"postgresql+psycopg:///{url.database}" + ("?service=mine" if place == "url" else "")

    assert shown(given, "application_name") == {"application_name": "by-service"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("sslmod=require", "libpq does not know: sslmod"),
        ("prepare_threshold=0", "libpq does not know: prepare_threshold"),
        ("connect_timeout=soon", "whole number as its option connect_timeout"),
    ],
)
def test_options_that_are_none_are_refused_in_one_line(options: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        read(DatabaseSettings, DATABASE_URL=f"postgresql+psycopg://localhost/db?{options}")


def test_sqlite_knows_one_option(tmp_path: Path) -> None:
    assert read(DatabaseSettings, DATABASE_URL=f"sqlite:///{tmp_path}/file.db?timeout=60").url.endswith("60")
    with pytest.raises(SettingsError, match="no option but timeout"):
        read(DatabaseSettings, DATABASE_URL=f"sqlite:///{tmp_path}/file.db?isolation_level=none")


@pytest.fixture
def pooler(tmp_path: Path, postgresql: PostgreSQL) -> Iterator[Callable[..., PgBouncer]]:
    require(PgBouncer)
    started: list[PgBouncer] = []

    def start(pool_mode: str, **given: int) -> PgBouncer:
        started.append(PgBouncer(tmp_path / "pgbouncer", postgresql, pool_mode, **given))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.mark.parametrize("pool_mode", [pytest.param("session", marks=pytest.mark.slow), "transaction"])
def test_workers_behind_a_pooler(
    pool_mode: str,
    pooler: Callable[..., PgBouncer],
    broker_url: str,
    postgresql: PostgreSQL,
    sandbox: Sandbox,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """All through the pooler as Debian configures it: the migrations, two workers, what they are told of limits."""
    name = f"behind_a_pooler_by_{pool_mode}"
    postgresql.create_database(name)
    url = pooler(pool_mode, **({"pool_size": 3} if pool_mode == "transaction" else {"pool_size": 40})).url(name)
    engine = database.connect(url)
    migrator.upgrade(engine)
    engine.dispose()
    with System(broker_url, url, sandbox, environment, tmp_path) as system:
        workers = [system.start_worker() for _ in range(2)]
        system.publish(job(f"offer-{number}") for number in range(200))
        system.until_events(200)
        said = "".join(worker.log.read_text() for worker in workers)

        assert system.states() == {State.CONFIRMED: 200}
        assert system.queue_length(topology.DEAD_LETTERS) == 0
        assert [word for word in ("waiting", "duty_waits", "defect") if f'"{word}"' in said] == []
        assert {worker.stop() for worker in workers} == {0}
    postgresql.drop_database(name)


@pytest.mark.parametrize("pool_mode", ["session", "transaction"])
def test_limits_hold_behind_a_pooler_and_are_not_left_there(
    pool_mode: str, pooler: Callable[..., PgBouncer], postgresql_url: str
) -> None:
    url = pooler(pool_mode, pool_size=1).url(str(make_url(postgresql_url).database))
    limited = database.connect(url, connections=1, limits=LIMITS)
    with limited.connect() as connection:
        for _ in range(2):  # transactions
            assert connection.execute(text("show lock_timeout")).scalar() == "3s"
            assert connection.execute(text("show statement_timeout")).scalar() == "30s"
            connection.commit()
    if pool_mode == "session":  # another client gets the session when this one is gone, cleaned by the pooler
        limited.dispose()
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        assert other.execute("show statement_timeout").fetchone() == ("0",)
    limited.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_pooler_by_transaction(
    pooler: Callable[..., PgBouncer], runtime: Runtime, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each transaction is in another session: nothing is prepared, and values are read as they were written."""
    by_transaction, name = pooler("transaction", pool_size=2), str(make_url(database_url).database)
    with runtime.engine.begin() as connection:
        connection.execute(text(f"alter database \"{name}\" set datestyle = 'German, DMY'"))
    monkeypatch.setenv("DATABASE_URL", by_transaction.url(name))
    runtimes = [Runtime(dice=lambda: 0.0) for _ in range(2)]
    logged: list[object] = []
    monkeypatch.setattr("worker.outages.log.warning", lambda *said, **_: logged.append(said), raising=False)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: run(runtimes[number % 2], f"offer-{number}"), range(60)))

    confirmations = rows(runtimes[0], Confirmation)
    for each in runtimes:
        each.close()
    assert [row.state for row in confirmations] == [State.CONFIRMED] * 60
    assert max(abs(row.created_at.timestamp() - time.time()) for row in confirmations) < 60
    assert logged == []
    engine = database.connect(by_transaction.url(name))
    assert database.unusable(engine) is None
    engine.dispose()


@pytest.mark.parametrize("command", ["worker worker", pytest.param("celery -A worker worker", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("mode", "options", "reason"),
    [
        ("transaction", "?options=-csearch_path%3Dapp", "refuses the parameter 'options'"),
        ("statement", "", "gives no transactions"),
    ],
)
def test_what_a_pooler_can_not_do_is_refused_at_start_and_by_doctor(
    mode: str,
    options: str,
    reason: str,
    command: str,
    pooler: Callable[..., PgBouncer],
    postgresql_url: str,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    url = pooler(mode).url(str(make_url(postgresql_url).database)) + options
    settings = {**environment, "DATABASE_URL": url, "BROKER_URL": f"amqp://127.0.0.1:{free_port()}//"}

    findings = list(doctor.check(DatabaseSettings(DATABASE_URL=url), None))
    worker = WorkerProcess(settings, tmp_path / "worker.log", ["-m", *command.split()])

    assert any(reason in finding.message for finding in findings)
    assert worker.process.wait(30) == 2
    told = [line for line in worker.log.read_text().splitlines() if not line.startswith("{")]  # the others are the log
    assert [reason in line for line in told] == [True]


def test_a_database_that_can_not_hold_all_texts_is_refused(postgresql: PostgreSQL) -> None:
    with postgresql.connect() as connection:
        connection.execute("create database latin encoding 'LATIN1' template template0")
    url = postgresql.url("latin")
    engine = database.connect(url)

    reason = database.unusable(engine)

    engine.dispose()
    assert reason is not None
    assert "LATIN1" in reason
    findings = list(doctor.check(DatabaseSettings(DATABASE_URL=url), None))
    assert any("LATIN1" in finding.message for finding in findings)
    postgresql.drop_database("latin")


def test_a_database_that_is_away_is_no_reason_to_refuse() -> None:
    engine = database.connect(f"postgresql+psycopg://127.0.0.1:{free_port()}/none")

    assert database.unusable(engine) is None

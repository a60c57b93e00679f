"""A PostgreSQL that says nothing: frozen while its machine answers, replaced by another, or with commits that hang."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from tests.support.servers import PostgreSQL, postgresql_program, require
from tests.support.system import until
from worker import outages
from worker.doctor import database as doctor
from worker.runtime import LIMITS, Runtime
from worker.services.health import DatabaseProbe
from worker.settings import DatabaseSettings
from worker.storage import bounded_connection, database, migrator

SILENCE = 0.3  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    require(PostgreSQL)
    server = PostgreSQL(tmp_path_factory.mktemp("postgresql"), in_memory=True)
    server.start()
    engine = database.connect(server.url())
    migrator.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("create table things (id int)"))
    engine.dispose()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _probe_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_connection, "PROBE_TIMEOUT", 2)


@pytest.fixture
def engine(server: PostgreSQL) -> Iterator[Engine]:
    engine = database.connect(server.url(), limits=LIMITS._replace(silence=SILENCE, lock=0.2, idle_transaction=0.5))
    yield engine
    engine.dispose()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def runtime_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Runtime]]:
    runtime = Runtime(dice=lambda: 0.0)

    def of(url: str) -> Runtime:
        for name, value in {**environment, "DATABASE_URL": url, "BROKER_URL": "memory://"}.items():
            monkeypatch.setenv(name, value)
        return runtime

    yield of
    runtime.close()


def store(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("insert into things values (1)"))


def configure(server: PostgreSQL, setting: str, value: str) -> None:
    with server.connect() as connection:
        connection.execute(f"alter system set {setting} = '{value}'")
        connection.execute("select pg_reload_conf()")
    with server.connect() as connection:
        until(lambda: connection.execute(f"show {setting}").fetchone() == (value,))


WAITS: dict[str, Callable[[Connection], Any]] = {
    "statement": lambda connection: connection.execute(text("select 1")),
    "statements": lambda connection: connection.execute(text("insert into things values (:id)"), [{"id": 1}] * 2),
    "commit": lambda connection: connection.commit(),
    "rollback": lambda connection: connection.rollback(),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_thread_is_freed_from_a_server_that_is_frozen(wait: str, server: PostgreSQL, engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("insert into things values (1)"))
        server.pause()
        try:
            with pytest.raises(OperationalError) as raised:
                WAITS[wait](connection)
        finally:
            server.resume()
    assert database.is_unreachable(raised.value)
    with engine.connect() as connection:  # a new one
        assert connection.execute(text("select count(*) from things")).scalar() == 0


@pytest.mark.slow
def test_a_frozen_primary_is_left_for_the_promoted_standby(tmp_path: Path) -> None:
    """On which events are numbered anew: it has another timeline."""
    require(PostgreSQL)
    primary, standby = (PostgreSQL(tmp_path / name, in_memory=True) for name in ("primary", "standby"))
    primary.start()
    copy = [postgresql_program("pg_basebackup"), "--write-recovery-conf", f"--pgdata={standby.home / 'data'}"]
    source = ["--host=127.0.0.1", f"--port={primary.port}", "--username=postgres"]
    subprocess.run([*copy, *source], check=True, **standby._identity)
    with (standby.home / "data" / "postgresql.conf").open("a") as configuration:
        configuration.write(f"port = {standby.port}\nunix_socket_directories = '{standby.home}'\n")
    standby.start()
    hosts = f"host=127.0.0.1,127.0.0.1&port={primary.port},{standby.port}&target_session_attrs=read-write"
    engine = database.connect(f"postgresql+psycopg://postgres@/postgres?{hosts}", limits=LIMITS._replace(silence=1.0))
    migrator.upgrade(engine)
    with engine.connect() as connection:
        before = connection.execute(SERVER).one()
        with standby.connect() as person:
            until(lambda: person.execute("select to_regproc('confirm_offer_server')").fetchone() != (None,))
            primary.pause()
            person.execute("select pg_promote()")
        with pytest.raises(OperationalError):
            connection.execute(SERVER)
    with engine.connect() as connection:
        after = connection.execute(SERVER).one()
    engine.dispose()
    primary.resume()
    for server in primary, standby:
        server.kill()

    assert (before.port, after.port) == (primary.port, standby.port)
    assert (before.name[-8:], after.name[-8:]) == ("00000001", "00000002")


SERVER = text("select inet_server_port() as port, confirm_offer_server() as name")


def test_a_statement_that_a_server_works_on_is_waited_for(engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.execute(text(f"select pg_sleep({4 * SILENCE})")).scalar() == ""


def test_a_commit_that_waits_for_a_standby_is_made_once_and_told(
    server: PostgreSQL, engine: Engine, pool: ThreadPoolExecutor, runtime_of: Callable[[str], Runtime]
) -> None:
    probe = DatabaseProbe(runtime_of(server.url()))
    probe.max_commit_time = 3 * SILENCE
    probe.run_once()
    configure(server, "synchronous_standby_names", "nobody")
    try:
        storing = pool.submit(store, engine)
        until(lambda: told(server))
        with pytest.raises(database.CommitsWait):
            until(lambda: probe.run_once())
        assert not storing.done()
    finally:
        configure(server, "synchronous_standby_names", "")
    storing.result()
    assert not told(server)
    with server.connect() as connection:
        assert connection.execute("select count(*) from things").fetchone() == (1,)


def told(server: PostgreSQL) -> list[str]:
    findings = doctor.check(DatabaseSettings(DATABASE_URL=SecretStr(server.url())), None)
    return [finding.message for finding in findings if finding.check == "writes"]


def test_a_database_that_became_read_only_is_left_and_told(
    server: PostgreSQL, engine: Engine, runtime_of: Callable[[str], Runtime]
) -> None:
    runtime = runtime_of(server.url())
    probe = DatabaseProbe(runtime)
    probe.run_once()
    configure(server, "default_transaction_read_only", "on")
    try:
        with pytest.raises(DBAPIError) as raised:
            probe.run_once()
        assert told(server) == ["it takes none: its transactions are read-only"]
    finally:
        configure(server, "default_transaction_read_only", "off")
    assert raised.value.connection_invalidated, "all connections of the pool are left"
    assert outages.unavailable_dependency(raised.value) == "a database that takes writes"
    probe.run_once()


def test_limits_hold_in_each_session_and_those_of_the_url_come_first(server: PostgreSQL, engine: Engine) -> None:
    with engine.begin() as person, engine.connect() as connection:
        person.execute(text("lock table things"))
        with pytest.raises(OperationalError, match="lock timeout"):
            connection.execute(text("select count(*) from things"))
    assert shown(engine) == ["200ms", "30s", "500ms"]
    given = database.connect(f"{server.url()}?options=-cstatement_timeout%3D7s", limits=LIMITS)
    assert shown(given) == ["3s", "7s", "30s"]
    given.dispose()
    for_people = database.connect(server.url())
    assert shown(for_people) == ["0", "0", "0"]
    for_people.dispose()


def shown(engine: Engine) -> list[str]:
    names = "lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"
    with engine.connect() as connection:
        return [str(connection.execute(text(f"show {name}")).scalar()) for name in names]


def test_a_frozen_process_lets_go_of_its_rows(server: PostgreSQL, engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("lock table things"))
        until(lambda: not holds_lock(server))
        with pytest.raises(DBAPIError) as raised:
            connection.execute(text("select 1"))
    assert database.is_unreachable(raised.value)


def holds_lock(server: PostgreSQL) -> bool:
    with server.connect() as connection:
        return connection.execute("select from pg_locks where relation = 'things'::regclass").fetchone() is not None

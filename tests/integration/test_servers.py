"""The private servers of tests: data survives a crash, and they leave nothing behind."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import amqp
import psycopg
import pytest

from tests.support.servers import PostgreSQL, RabbitMQ, free_port, require

STANDARD_PORTS = (4369, 5432, 5672, 15672, 25672)
QUORUM = {"x-queue-type": "quorum"}


@pytest.fixture(scope="module")
def open_before() -> set[int]:
    """The standard ports on which other servers listen."""
    return {port for port in STANDARD_PORTS if is_open(port)}


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory, open_before: set[int]) -> Iterator[RabbitMQ]:
    require(RabbitMQ)
    server = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory, open_before: set[int]) -> Iterator[PostgreSQL]:
    require(PostgreSQL)
    server = PostgreSQL(tmp_path_factory.mktemp("postgresql"))
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_a_confirmed_message_survives_a_crash_of_rabbitmq(rabbitmq: RabbitMQ) -> None:
    with connect(rabbitmq) as connection, connection.channel() as channel:
        channel.queue_declare("crash", durable=True, auto_delete=False, arguments=QUORUM)
        message = amqp.Message("kept", delivery_mode=2)
        channel.basic_publish_confirm(message, routing_key="crash", mandatory=True)

    rabbitmq.flush()
    members = family(rabbitmq)
    rabbitmq.kill()
    wait_until(lambda: not members & alive().keys())
    rabbitmq.start()

    with connect(rabbitmq) as connection, connection.channel() as channel:
        wait_until(lambda: (got := channel.basic_get("crash", no_ack=True)) is not None and got.body == "kept")


@pytest.mark.slow
def test_a_paused_rabbitmq_answers_only_after_it_resumes(rabbitmq: RabbitMQ) -> None:
    rabbitmq.pause()
    try:
        with pytest.raises(TimeoutError):
            connect(rabbitmq, timeout=0.3).connect()
    finally:
        rabbitmq.resume()

    with connect(rabbitmq) as connection:
        assert connection.connected


@pytest.mark.slow
def test_ctl_reaches_this_node(rabbitmq: RabbitMQ) -> None:
    with connect(rabbitmq) as connection, connection.channel() as channel:
        channel.queue_declare("seen-by-ctl", durable=True, auto_delete=False)

    assert "seen-by-ctl" in rabbitmq.ctl("list_queues", "name").splitlines()
    with pytest.raises(RuntimeError, match="no_such_command"):
        rabbitmq.ctl("no_such_command")


def test_a_committed_row_survives_a_crash_of_postgresql(postgresql: PostgreSQL) -> None:
    with postgresql.connect() as connection:
        connection.execute("CREATE TABLE crash AS SELECT 'kept' AS word")

    members = family(postgresql)
    postgresql.kill()
    wait_until(lambda: not members & alive().keys())
    postgresql.start()

    with postgresql.connect() as connection:
        assert connection.execute("SELECT word FROM crash").fetchall() == [("kept",)]


def test_a_database_is_cloned_from_a_template_and_dropped_in_use(postgresql: PostgreSQL) -> None:
    postgresql.create_database("original")
    with postgresql.connect("original") as connection:
        connection.execute("CREATE TABLE marker AS SELECT 1 AS number")
    postgresql.create_database("clone", template="original")

    with postgresql.connect("clone") as connection:
        assert connection.execute("SELECT number FROM marker").fetchall() == [(1,)]
        postgresql.drop_database("clone")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_the_time_zone_of_a_session_is_not_utc(postgresql: PostgreSQL) -> None:
    with postgresql.connect() as connection:
        assert connection.execute("SHOW timezone").fetchone() == ("Asia/Kolkata",)


@pytest.mark.slow
def test_no_server_listens_on_a_standard_port(
    rabbitmq: RabbitMQ, postgresql: PostgreSQL, open_before: set[int]
) -> None:
    assert {port for port in STANDARD_PORTS if is_open(port)} == open_before


@pytest.mark.parametrize("name", [pytest.param("rabbitmq", marks=pytest.mark.slow), "postgresql"])
def test_stop_leaves_no_process_behind(name: str, request: pytest.FixtureRequest) -> None:
    server: RabbitMQ | PostgreSQL = request.getfixturevalue(name)
    members = family(server)
    server.stop()
    wait_until(lambda: not members & alive().keys())
    assert not is_open(server.port)
    server.start()


@pytest.mark.slow
def test_servers_end_with_a_test_run_that_is_killed(tmp_path: Path) -> None:
    require(RabbitMQ)
    require(PostgreSQL)
    script = """if True:
        import sys
        from pathlib import Path
        from tests.support.servers import PostgreSQL, RabbitMQ

        servers = PostgreSQL(Path(sys.argv[1], "postgresql")), RabbitMQ(Path(sys.argv[1], "rabbitmq"))
        for server in servers:
            server.start()
        print(servers[0].home, flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", script, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as test_run:
        assert test_run.stdout is not None
        home = Path(test_run.stdout.readline().decode().strip())
        members = descendants({test_run.pid})
        assert len(members) > 5
        test_run.kill()
    wait_until(lambda: not members & alive().keys())
    shutil.rmtree(home)  # a killed test run leaves only this folder


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    require(PostgreSQL)
    server = PostgreSQL(tmp_path)
    with (
        socket.create_server(("127.0.0.1", server.port)),
        pytest.raises(RuntimeError, match="already in use"),
    ):
        server.start()


def test_a_missing_server_skips_on_a_laptop_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(PostgreSQL):
        @staticmethod
        def missing() -> str | None:
            return "It is not installed."

    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="It is not installed"):
        require(Missing)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="It is not installed"):
        require(Missing)


def test_free_ports_are_free_and_differ() -> None:
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
    assert not any(is_open(port) for port in ports)


def connect(server: RabbitMQ, timeout: float = 10) -> amqp.Connection:
    """A connection that is not open yet: `with` or `connect()` opens it."""
    return amqp.Connection(
        f"127.0.0.1:{server.port}", connect_timeout=timeout, read_timeout=timeout, confirm_publish=True
    )


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive() -> dict[int, int]:
    """The parent of each running process on this machine."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
    rows = (line.split() for line in table.stdout.splitlines())
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def descendants(roots: set[int]) -> set[int]:
    parents = alive()
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in roots | found} - found:
        found |= more
    return found


def family(server: RabbitMQ | PostgreSQL) -> set[int]:
    """The processes of a server, also those in their own sessions."""
    roots = {process.pid for process in server.processes}
    return roots | descendants(roots)

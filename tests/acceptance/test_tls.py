"""TLS with verified certificates to RabbitMQ and PostgreSQL, with a private authority."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from kombu import Connection

from models.states import State
from tests.support.certificates import Authority
from tests.support.commands import run
from tests.support.servers import PostgreSQL, RabbitMQ, over_tls
from tests.support.system import System, job, until
from worker.messaging import broker, topology
from worker.messaging.publisher import Message, Publisher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other-authority"))


# --- RabbitMQ ---


def test_a_worker_uses_a_broker_over_tls(system: System, rabbitmq: RabbitMQ, authority: Authority) -> None:
    """Consumer, scheduler, relay and dead letters. With many jobs at once, a TLS record has several frames."""
    url = over_tls(rabbitmq, system.broker_url, trust=authority)
    system.publish(job(f"offer-{number}") for number in range(300))
    system.publish([job("again~http-503~1"), b"{"])
    system.start_worker(BROKER_URL=url)

    system.until_events(301)

    until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)
    assert system.states() == {State.CONFIRMED: 301}
    connections = rabbitmq.ctl("list_connections", "--silent", "vhost", "ssl")
    vhost = urlsplit(url).path[1:]
    assert f"{vhost}\ttrue" in connections.splitlines()


def test_commands_use_a_broker_over_tls(broker_url: str, rabbitmq: RabbitMQ, authority: Authority) -> None:
    url = over_tls(rabbitmq, broker_url, trust=authority)

    assert run("broker", "declare", BROKER_URL=url).returncode == 0
    assert run("enqueue", "-", stdin='{"bad": 1}', BROKER_URL=url).returncode == 1
    assert run("dead-letters", "list", BROKER_URL=url).stdout == "no dead letters\n"


def test_the_certificate_of_each_of_several_brokers_is_checked_for_its_own_name(
    broker_url: str, rabbitmq: RabbitMQ, authority: Authority
) -> None:
    """It holds for 127.0.0.1 only. Whichever host is tried first, the other one does not get its name."""
    right, wrong = (over_tls(rabbitmq, broker_url, host, authority) for host in ("127.0.0.1", "localhost"))

    for url in f"{right};{wrong}", f"{wrong};{right}":
        with broker.connect(url) as connection:
            connection.connect()
            assert connection.host_url.startswith("amqps://guest:guest@127.0.0.1")
    with broker.connect(f"{wrong};{wrong}") as connection, pytest.raises(OSError, match="Hostname mismatch"):
        connection.connect()


@pytest.mark.parametrize(
    ("host", "trusted", "reason"),
    [
        ("127.0.0.1", None, "unable to get local issuer certificate"),
        ("127.0.0.1", "other_authority", "unable to get local issuer certificate"),
        ("localhost", "authority", "Hostname mismatch"),
    ],
)
def test_a_broker_with_a_wrong_certificate_is_refused(
    host: str, trusted: str | None, reason: str, broker_url: str, rabbitmq: RabbitMQ, request: pytest.FixtureRequest
) -> None:
    url = over_tls(rabbitmq, broker_url, host, request.getfixturevalue(trusted) if trusted else None)

    done = run("broker", "declare", BROKER_URL=url)

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"its certificate is refused ({reason}" in done.stderr
    with Publisher(url) as publisher, pytest.raises(OSError, match=reason):
        publisher.publish([Message(1, b"{}", topology.confirm_offer.name, topology.JOBS)])


def test_a_worker_logs_that_it_refuses_the_broker(
    system: System, rabbitmq: RabbitMQ, other_authority: Authority
) -> None:
    worker = system.start_worker(BROKER_URL=over_tls(rabbitmq, system.broker_url, trust=other_authority))

    until(lambda: [line for line in worker.logged() if "CERTIFICATE_VERIFY_FAILED" in line.get("event", "")])

    assert "guest:guest" not in worker.log.read_text()


def test_a_checkout_publishes_over_tls_as_the_document_says(
    broker_url: str, rabbitmq: RabbitMQ, authority: Authority
) -> None:
    url = over_tls(rabbitmq, broker_url)
    with Connection(url, ssl={"ca_certs": str(authority.file), "server_hostname": "127.0.0.1"}) as connection:
        connection.connect()
    with pytest.raises(OSError, match="Hostname mismatch"):
        Connection(url, ssl={"ca_certs": str(authority.file), "server_hostname": "localhost"}).connect()


# --- PostgreSQL ---


@pytest.fixture
def tls_url(postgresql: PostgreSQL, postgresql_url: str, authority: Authority) -> Iterator[str]:
    """A URL of a server whose certificate is for 127.0.0.1, not for localhost."""
    postgresql.set_tls(authority.issue("127.0.0.1"))
    yield f"{postgresql_url}?sslmode=verify-full&sslrootcert={authority.file}"
    postgresql.set_tls(None)


def test_a_worker_uses_a_database_over_tls(tls_url: str, system: System, postgresql: PostgreSQL) -> None:
    system.start_worker(DATABASE_URL=tls_url)
    system.publish([job("offer-1")])

    system.until_events(1)

    with postgresql.connect() as connection:
        query = (
            "select distinct ssl from pg_stat_ssl join pg_stat_activity using (pid)"
            " where application_name = 'confirm-offer' and datname = %s"
        )
        encrypted = connection.execute(query, [urlsplit(tls_url).path[1:]]).fetchall()
    assert (True,) in encrypted


def test_a_database_with_a_wrong_certificate_is_refused(tls_url: str, other_authority: Authority) -> None:
    unknown = f"{tls_url.split('sslrootcert=')[0]}sslrootcert={other_authority.file}"
    for url in unknown, tls_url.replace("@127.0.0.1:", "@localhost:"):
        done = run("db", "check", DATABASE_URL=url)

        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "its certificate is refused" in done.stderr
    assert run("db", "check", DATABASE_URL=tls_url).returncode == 0

"""Topology and publishing against a real RabbitMQ."""

import itertools
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from kombu import Connection, Queue
from sqlalchemy.exc import OperationalError

from tests.support.link import Link
from tests.support.servers import RabbitMQ, free_port
from tests.support.system import PROJECT, until
from worker.errors import BrokerError
from worker.messaging import broker, topology
from worker.messaging.dead_letter_queue import DeadLetterQueue
from worker.messaging.inspection import Inspection
from worker.messaging.publisher import Message, Publisher
from worker.storage import database


@pytest.fixture
def connection(broker_url: str) -> Iterator[Connection]:
    with broker.connect(broker_url) as connection:
        yield connection


def message(key: object, routing_key: str = topology.JOBS, exchange: str = topology.confirm_offer.name) -> Message:
    return Message(key, b"{}", exchange, routing_key)


def length(connection: Connection, queue: str) -> int:
    channel = connection.channel()
    count = channel.queue_declare(queue, passive=True).message_count
    channel.close()
    return int(count)


def test_declaring_again_changes_nothing(connection: Connection) -> None:
    assert topology.declare(connection) == topology.declare(connection)


def test_a_declaration_that_is_not_answered_ends(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = urlsplit(broker_url).port or 0
    with Link(port) as link, broker.connect(broker_url.replace(f":{port}/", f":{link.port}/")) as connection:
        connection.connect()
        link.silence()
        monkeypatch.setattr(topology, "DECLARE_TIMEOUT", 0.5)

        with pytest.raises(OSError, match="closed connection"):
            topology.declare(connection)


def test_all_queues_are_quorum_queues(broker_url: str, rabbitmq: RabbitMQ) -> None:
    listing = rabbitmq.ctl("list_queues", "-p", broker_url.rsplit("/", 1)[1], "--silent", "name", "type")

    queues = (topology.JOBS, topology.RESUME, topology.DEAD_LETTERS, "booking-events.unrouted")
    assert dict(line.split() for line in listing.splitlines() if line) == dict.fromkeys(queues, "quorum")


def test_a_queue_of_another_type_is_a_clear_error(broker_url: str, connection: Connection, tmp_path: Path) -> None:
    channel = connection.channel()
    channel.queue_delete(topology.JOBS)
    channel.queue_declare(topology.JOBS, durable=True, auto_delete=False)

    with pytest.raises(BrokerError, match=r"queue confirm-offer\.jobs exists with other properties"):
        topology.declare(connection)
    for command in ("worker",), ("broker", "declare"):
        done = subprocess.run(
            [sys.executable, "-m", "worker", *command],
            env={
                **os.environ,
                "BROKER_URL": broker_url,
                "DATABASE_URL": f"sqlite:///{tmp_path}/unused.db",
                "XONE_CLIENT_ID": "any",
                "XONE_CLIENT_SECRET": "any",
                "DATA_KEYS": "a" * 43 + "=",
            },
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode != 0
        assert "queue confirm-offer.jobs exists with other properties" in done.stderr


def test_an_event_without_a_bound_queue_is_kept(broker_url: str, connection: Connection) -> None:
    with Publisher(broker_url) as publisher:
        assert publisher.publish([message(1, "booking.confirmed", topology.booking_events.name)]) == {1}

    assert length(connection, "booking-events.unrouted") == 1


def test_many_messages_are_confirmed_together(broker_url: str, connection: Connection) -> None:
    with Publisher(broker_url) as publisher:
        assert publisher.publish(map(message, range(2000))) == set(range(2000))
        assert publisher.publish(map(message, range(10))) == set(range(10))

    until(lambda: length(connection, topology.JOBS) == 2010)


def test_a_message_without_a_queue_is_not_confirmed(broker_url: str) -> None:
    with Publisher(broker_url) as publisher:
        confirmed = publisher.publish([message(1), message(2, "no.such.queue"), message(3)])

    assert confirmed == {1, 3}


def test_a_message_that_the_queue_refuses_is_not_confirmed(broker_url: str, connection: Connection) -> None:
    full = Queue(
        "full", topology.confirm_offer, "full", queue_arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    )
    full(connection.channel()).declare()

    with Publisher(broker_url) as publisher:
        confirmed = publisher.publish([message("first", "full"), message("second", "full"), message("other")])
        assert confirmed == {"first", "other"}


@pytest.mark.slow
def test_a_broker_with_an_alarm_gets_a_batch_once(broker_url: str, connection: Connection, rabbitmq: RabbitMQ) -> None:
    """It confirms nothing. When the alarm ends, it takes all that was sent, also over connections that are closed."""
    with Publisher(broker_url, confirm_timeout=0.3) as publisher, Publisher(broker_url, confirm_timeout=0.3) as other:
        assert publisher.publish([message(1)]) == {1}
        rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "1000")
        try:
            for each in [publisher] * 5 + [other] * 5:
                with pytest.raises(TimeoutError):
                    each.publish([message(2)])
        finally:
            rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "512MB")
        until(lambda: _is_taken(publisher, 3))
        assert other.publish([message(4)]) == {4}

    until(lambda: length(connection, topology.JOBS) >= 4)
    assert length(connection, topology.JOBS) <= 5, "3 may have been sent twice"


def _is_taken(publisher: Publisher, key: int) -> bool:
    with suppress(TimeoutError):
        return publisher.publish([message(key)]) == {key}
    return False


@pytest.fixture
def small_messages_only(rabbitmq: RabbitMQ) -> Iterator[None]:
    """RabbitMQ closes the channel for a message of more than 1,000 bytes."""
    with rabbitmq.max_message_size(1000):
        yield


@pytest.mark.usefixtures("small_messages_only")
def test_messages_that_close_the_channel_are_found(broker_url: str) -> None:
    with Publisher(broker_url) as publisher:
        for at_fault in {0}, {199}, {0, 1, 2}, {7, 50, 133}, set(range(0, 200, 20)):
            batch = [
                Message(key, b"x" * 2000 if key in at_fault else b"{}", topology.confirm_offer.name, topology.JOBS)
                for key in range(200)
            ]
            assert publisher.publish(batch) == set(range(200)) - at_fault
            assert publisher.refused.keys() == at_fault
            assert all("larger than configured max size" in reason for reason in publisher.refused.values())
        assert publisher.publish([message(1)]) == {1}


@pytest.mark.usefixtures("small_messages_only")
def test_a_single_message_that_closes_the_channel_is_refused(broker_url: str) -> None:
    with Publisher(broker_url) as publisher:
        assert publisher.publish([Message(1, b"x" * 2000, topology.confirm_offer.name, topology.JOBS)]) == set()


def test_a_message_that_amqp_can_not_say_stops_no_other(broker_url: str) -> None:
    long_key = Message("key", b"{}", topology.confirm_offer.name, "k" * 300)
    header = Message("header", b"{}", topology.confirm_offer.name, topology.JOBS, headers={"x": object()})
    long_id = Message("id", b"{}", topology.confirm_offer.name, topology.JOBS, properties={"message_id": "m" * 300})

    with Publisher(broker_url) as publisher:
        taken = publisher.publish([message(1), long_key, message(2), header, long_id, message(3)])
        assert taken == {1, 2, 3}
        assert publisher.refused.keys() == {"key", "header", "id"}


@pytest.mark.parametrize("queue", [topology.JOBS, topology.DEAD_LETTERS, topology.RESUME, "booking-events.unrouted"])
def test_a_queue_of_ours_that_is_gone_is_declared_anew(broker_url: str, connection: Connection, queue: str) -> None:
    exchange = topology.booking_events if queue == "booking-events.unrouted" else topology.confirm_offer
    connection.channel().queue_delete(queue)

    with Publisher(broker_url, declares=True) as publisher:
        assert publisher.publish(message(number, queue, exchange.name) for number in range(3)) == {0, 1, 2}

    until(lambda: length(connection, queue) == 3)


def test_an_exchange_of_ours_that_is_gone_is_declared_anew(broker_url: str, connection: Connection) -> None:
    connection.channel().exchange_delete(topology.booking_events.name)

    with Publisher(broker_url, declares=True) as publisher:
        assert publisher.publish([message(1, "booking.confirmed", topology.booking_events.name)]) == {1}


def test_after_an_error_no_late_confirm_is_counted(broker_url: str) -> None:
    with Publisher(broker_url) as publisher:
        publisher.publish([message(1)])
        with pytest.raises(Exception, match="no-such-exchange"):
            publisher.publish([message(2, exchange="no-such-exchange")])
        assert publisher.publish([message(3)]) == {3}


def test_an_unavailable_broker_is_recognized() -> None:
    with Publisher("amqp://guest:guest@127.0.0.1:1//") as publisher, pytest.raises(OSError) as error:  # noqa: PT011
        publisher.publish([message(1)])
    assert broker.is_away(error.value)


def dead(url: str, number: int) -> list[str]:
    """URLs of hosts that refuse connections."""
    return [f"amqp://guest:guest@127.0.0.1:{free_port()}/{url.rpartition('/')[2]}" for _ in range(number)]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 1), (2, 0), (3, 2)])
def test_each_part_finds_the_host_that_answers(broker_url: str, before: int, after: int) -> None:
    url = ";".join([*dead(broker_url, before), broker_url, *dead(broker_url, after)])

    with broker.connect(url) as connection:
        topology.declare(connection)
    with Publisher(url) as publisher:
        assert publisher.publish([Message(1, b"{}", topology.confirm_offer.name, topology.DEAD_LETTERS)]) == {1}
    with DeadLetterQueue(url) as letters:
        assert letters.message_count == 1
    with Inspection(url) as inspection:
        assert inspection.product == "RabbitMQ"


def test_the_host_that_answered_last_is_tried_first_until_its_connection_is_lost(broker_url: str) -> None:
    other = broker_url.replace("127.0.0.1", "localhost")
    url = f"{broker_url};{other}"
    with broker.connect(url) as connection:
        connection.connect()
        used = connection.host_url
        assert [broker.connect(url).host_url for _ in range(9)] == [used] * 9

        connection.try_last()

        assert {broker.connect(url).host_url, used} == {broker_url, other}


def test_each_process_begins_with_a_host_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all workers sit on the first broker, and all move together when it dies."""
    hosts = [f"amqp://host-{number}//" for number in range(3)]
    orders = set()
    for _ in range(200):
        monkeypatch.setattr(broker, "_order", {})  # as in another process
        orders.add(tuple(broker._hosts_in_order(";".join(hosts))))

    assert orders == set(itertools.permutations(hosts))


def test_a_host_has_no_port_or_virtual_host_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "amqp://a:1111/one;amqp://b"
    monkeypatch.setattr(broker, "_order", {url: url.split(";")})
    connection = broker.connect(url)

    connection.maybe_switch_next()

    assert connection.as_uri() == "amqp://guest:**@b:5672//"


def test_a_peer_is_silent_when_nothing_comes_and_hanging_up_wakes_who_waits_for_it() -> None:
    ours, theirs = socket.socketpair()
    peer = broker.Peer(SimpleNamespace(connection=SimpleNamespace(sock=ours, bytes_recv=7)))  # type: ignore[arg-type]
    until(lambda: peer.seconds_silent() > 0.2)
    theirs.send(b"not read yet, as the loop is busy")
    assert peer.seconds_silent() < 0.2
    ours.recv(100)
    until(lambda: peer.seconds_silent() > 0.2)

    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ours.recv, 100)
        peer.hang_up()
        assert waits.result(10) == b""
    ours.close()
    peer.hang_up()  # nothing is left to do
    theirs.close()


def test_none_of_several_hosts_is_told_as_away(broker_url: str) -> None:
    with Publisher(";".join(dead(broker_url, 3))) as publisher, pytest.raises(OSError):  # noqa: PT011
        publisher.publish([message(1)])


def test_an_idle_publisher_has_agreed_on_no_heartbeats(broker_url: str, rabbitmq: RabbitMQ) -> None:
    """Nothing sends them while it waits for work, and RabbitMQ would end the connection with an error."""
    with Publisher(broker_url) as publisher, DeadLetterQueue(broker_url):
        publisher.publish([message(1)])
        vhost = broker_url.rpartition("/")[2]

        def agreed() -> set[str]:
            lines = rabbitmq.ctl("list_connections", "--silent", "vhost", "timeout").splitlines()
            return {line.split("\t")[1] for line in lines if line.split("\t")[0] == vhost}

        assert until(agreed) == {"0"}


def test_unrouted_events_survive_looks_with_the_policy_of_the_docs(
    broker_url: str, connection: Connection, rabbitmq: RabbitMQ
) -> None:
    """A delivery limit, which RabbitMQ 4 has by default, would drop an event that was looked at too often."""
    vhost = broker_url.rpartition("/")[2]
    rabbitmq.ctl("set_policy", "-p", vhost, "limit", ".*", '{"delivery-limit": 20}', "--apply-to", "queues")
    command = re.search(r"^rabbitmqctl set_policy (.*)$", (PROJECT / "docs/upgrading.md").read_text(), re.MULTILINE)
    assert command is not None
    rabbitmq.ctl("set_policy", "-p", vhost, *shlex.split(command[1]))
    with Publisher(broker_url) as publisher:
        publisher.publish([message(1, "booking.confirmed", topology.booking_events.name)])

    for _ in range(40):
        channel = connection.channel()
        until(lambda channel=channel: channel.basic_get(topology.unrouted_queue.name))
        channel.close()

    until(lambda: length(connection, topology.unrouted_queue.name) == 1)


@pytest.mark.slow  # Kombu waits within each try
def test_repeated_tries_leave_no_connection_open() -> None:
    publisher = Publisher("amqp://guest:guest@127.0.0.1:1//")
    engine = database.connect("postgresql+psycopg://127.0.0.1:1/none")
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        with pytest.raises(OSError):  # noqa: PT011
            publisher.ensure_connection()
        with pytest.raises(OperationalError):
            engine.connect()

    assert len(os.listdir("/proc/self/fd")) <= open_before


def test_a_broker_that_hangs_does_not_hang_the_publisher(rabbitmq: RabbitMQ, broker_url: str) -> None:
    publisher = Publisher(broker_url, confirm_timeout=1.0)
    publisher.publish([message(1)])
    rabbitmq.pause()
    try:
        with pytest.raises(OSError) as error:  # noqa: PT011
            publisher.publish([message(2)])
    finally:
        rabbitmq.resume()
    assert broker.is_away(error.value)

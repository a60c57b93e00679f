"""The rights of docs/rabbitmq-permissions.md: each user of RabbitMQ can do its part and nothing else."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from amqp.exceptions import AccessRefused
from kombu import Connection
from sqlalchemy import select

from models.states import State
from models.tables import Confirmation
from tests.support.commands import run
from tests.support.servers import RabbitMQ
from tests.support.system import PROJECT, System, job, until
from worker.messaging import broker, topology
from worker.messaging.publisher import Message, Publisher
from worker.sandbox.server import Sandbox

pytestmark = pytest.mark.slow  # rabbitmqctl takes a second per command

VHOST, PASSWORD = "confirm-offer", "secret"
DOCUMENT = (PROJECT / "docs" / "rabbitmq-permissions.md").read_text("utf-8")
(*COMMANDS, FEWER_RIGHTS) = [shlex.split(line)[1:] for line in DOCUMENT.splitlines() if line.startswith("rabbitmqctl ")]
UNROUTED = "booking-events.unrouted"


@pytest.fixture(scope="module")
def server(rabbitmq: RabbitMQ) -> RabbitMQ:
    """Creates the users and rights of the document. The tests use the user guest, which may do everything."""
    for command in COMMANDS:
        rabbitmq.ctl(*command, *([PASSWORD] if command[0] == "add_user" else []))
    rabbitmq.ctl("set_permissions", "-p", VHOST, "guest", ".*", ".*", ".*")
    return rabbitmq


@pytest.fixture
def system(
    server: RabbitMQ, postgresql_url: str, sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> Iterator[System]:
    declared = run("broker", "declare", BROKER_URL=url_of(server, "operator"))
    assert declared.returncode == 0, declared.stderr
    with System(f"{server.url.removesuffix('//')}/{VHOST}", postgresql_url, sandbox, environment, tmp_path) as running:
        yield running
        delete_all(running)


def delete_all(system: System) -> None:
    channel = system.connection.channel()
    for queue in (*(queue.name for queue in topology.QUEUES), system.events_queue.name):
        channel.queue_delete(queue)
    for exchange in topology.EXCHANGES:
        channel.exchange_delete(exchange.name)


def url_of(server: RabbitMQ, user: str) -> str:
    return f"amqp://{user}:{PASSWORD}@127.0.0.1:{server.port}/{VHOST}"


@contextmanager
def channel_of(server: RabbitMQ, user: str) -> Iterator[Any]:
    with Connection(url_of(server, user)) as connection:
        yield connection.channel()


def publish(server: RabbitMQ, user: str, exchange: str, routing_key: str, body: bytes = b"{}") -> None:
    """Publishes a message with a confirm. Raises AccessRefused."""
    with Publisher(url_of(server, user)) as publisher:
        assert publisher.publish([Message(1, body, exchange, routing_key)]) == {1}


# --- The part of each user ---


def test_the_documented_rights_suffice_for_a_job(system: System, server: RabbitMQ) -> None:
    """A job is published, retried and confirmed, and the consumer gets its event. Another job is a dead letter."""
    worker = system.start_worker(BROKER_URL=url_of(server, "worker"))
    with channel_of(server, "orders") as channel:
        channel.queue_declare("orders.all", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        channel.queue_bind("orders.all", topology.booking_events.name, "#")
        for body in b"{", json.dumps(job("offer-1~http-503~1")).encode():
            publish(server, "checkout", topology.confirm_offer.name, topology.JOBS, body)

        message = until(lambda: channel.basic_get("orders.all"))

        channel.basic_ack(message.delivery_tag)
        channel.queue_delete("orders.all")
    assert message.properties["type"] == "booking.confirmed"
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)
    assert system.states() == {State.CONFIRMED: 1}
    assert worker.stop() == 0
    expected = {"job_rejected", "python_warning"}  # python_warning: Celery warns if tests run as root
    assert not [line for line in worker.logged() if line["level"] != "info" and line["event"] not in expected]


def test_a_message_of_a_checkout_in_the_resume_queue_starts_nothing(system: System, server: RabbitMQ) -> None:
    worker = system.start_worker(BROKER_URL=url_of(server, "worker"))
    publish(server, "checkout", topology.confirm_offer.name, topology.JOBS, json.dumps(job("offer-1")).encode())
    system.until_events(1)
    with system.engine.connect() as connection:
        (confirmation,) = connection.execute(select(Confirmation.id)).scalars()

    publish(server, "checkout", topology.confirm_offer.name, topology.RESUME, str(confirmation).encode())

    until(lambda: system.queue_length(topology.RESUME) == 0)
    assert worker.stop() == 0
    assert system.queue_length(topology.RESUME) == 0
    assert len(system.sandbox.calls) == 1


def test_the_worker_declares_exchanges_and_queues(system: System, server: RabbitMQ) -> None:
    delete_all(system)

    system.start_worker(BROKER_URL=url_of(server, "worker"))

    names = until(lambda: lines if len(lines := queues(server)) == len(topology.QUEUES) else None)
    assert set(names) == {queue.name for queue in topology.QUEUES}


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_a_worker_that_connects_anew_declares_nothing(pool: str, system: System, server: RabbitMQ) -> None:
    """It loses the right to declare after its start, and then its connections."""
    worker = system.start_worker(BROKER_URL=url_of(server, "worker"), WORKER_POOL=pool, WORKER_CONCURRENCY="4")
    system.publish([job("offer-1")])
    system.until_events(1)
    granted = next(command for command in COMMANDS if command[0] == "set_permissions" and "worker" in command)
    server.ctl(*granted[:-3], "^$", *granted[-2:])
    try:
        close = 'rabbit_networking:close_all_user_connections(<<"worker">>, <<"test">>).'
        server.ctl("eval", close)
        until(lambda: "Connection to broker lost" in worker.log.read_text())

        system.publish([job("offer-2")])
        system.until_events(2)

        assert worker.process.poll() is None
    finally:
        server.ctl(*granted)


def queues(server: RabbitMQ) -> list[str]:
    return server.ctl("list_queues", "-p", VHOST, "--silent", "name").split()


def test_operators_need_fewer_rights_if_the_worker_declares(system: System, server: RabbitMQ, tmp_path: Path) -> None:
    server.ctl(*FEWER_RIGHTS)
    try:
        system.start_worker(BROKER_URL=url_of(server, "worker"))
        operator_settings = {"BROKER_URL": url_of(server, "operator"), "DATABASE_URL": system.database_url}
        (tmp_path / "jobs.jsonl").write_text(json.dumps(job("offer-1")))

        assert run("enqueue", str(tmp_path / "jobs.jsonl"), **operator_settings).returncode == 0
        system.publish([b"{"])
        system.until_events(1)
        until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)
        for command in (
            ["dead-letters", "list"],
            ["dead-letters", "replay", "--yes"],
            ["dead-letters", "drop", "--yes", "--reason", "test"],
            ["events", "replay", "--since", "1h", "--yes"],
        ):
            if command[0] == "dead-letters":
                until(
                    lambda: system.queue_length(topology.DEAD_LETTERS) == 1
                )  # the replayed message is a dead letter again
            done = run(*command, **operator_settings)
            assert done.returncode == 0, done.stderr

        assert len(system.until_events(2)) == 2
        for action in read_jobs, declare_ours:
            with pytest.raises((AccessRefused, topology.BrokerError)):
                action(server, "operator")
    finally:
        server.ctl(*next(command for command in COMMANDS if command[0] == "set_permissions" and "operator" in command))


# --- Rights and missing rights ---


def read(server: RabbitMQ, user: str, queue: str) -> None:
    with channel_of(server, user) as channel:
        channel.basic_get(queue)


def read_jobs(server: RabbitMQ, user: str) -> None:
    read(server, user, topology.JOBS)


def read_dead_letters(server: RabbitMQ, user: str) -> None:
    read(server, user, topology.DEAD_LETTERS)


def read_events_of_others(server: RabbitMQ, user: str) -> None:
    read(server, user, "test.events")


def declare_ours(server: RabbitMQ, user: str) -> None:
    with broker.connect(url_of(server, user)) as connection:
        topology.declare(connection)


def purge_jobs(server: RabbitMQ, user: str) -> None:
    with channel_of(server, user) as channel:
        channel.queue_purge(topology.JOBS)


def declare_their_own(server: RabbitMQ, user: str) -> None:
    with channel_of(server, user) as channel:
        channel.queue_declare(f"{user}.own", durable=True, auto_delete=False)
        channel.queue_bind(f"{user}.own", topology.booking_events.name, "#")
        channel.queue_delete(f"{user}.own")


def copy_jobs(server: RabbitMQ, user: str) -> None:
    """Declares a queue of the user that gets a copy of all jobs."""
    with channel_of(server, user) as channel:
        channel.queue_declare(f"{user}.copy", durable=True, auto_delete=False)
        channel.queue_bind(f"{user}.copy", topology.confirm_offer.name, topology.JOBS)


def publish_a_job(server: RabbitMQ, user: str) -> None:
    publish(server, user, topology.confirm_offer.name, topology.JOBS)


def publish_an_event(server: RabbitMQ, user: str) -> None:
    publish(server, user, topology.booking_events.name, "booking.confirmed")


def publish_by_the_default_exchange(server: RabbitMQ, user: str) -> None:
    publish(server, user, "", topology.JOBS)


ACTIONS: dict[Callable[[RabbitMQ, str], None], set[str]] = {
    publish_a_job: {"checkout", "worker", "operator"},
    publish_an_event: {"worker", "operator"},
    publish_by_the_default_exchange: set(),
    read_jobs: {"worker", "operator"},
    read_dead_letters: {"operator"},
    read_events_of_others: set(),
    purge_jobs: {"worker", "operator"},
    declare_ours: {"worker", "operator"},
    declare_their_own: {"orders"},
    copy_jobs: set(),
}


@pytest.mark.parametrize("user", ["checkout", "worker", "operator", "orders"])
def test_each_user_can_do_its_part_only(user: str, system: System, server: RabbitMQ) -> None:
    allowed = set()
    for action in ACTIONS:
        try:
            action(server, user)
            allowed.add(action)
        except (AccessRefused, topology.BrokerError):
            pass

    assert allowed == {action for action, users in ACTIONS.items() if user in users}


@pytest.mark.parametrize("command", [["broker", "declare"], ["enqueue", "-"]])
def test_a_refusal_is_one_line(command: list[str], system: System, server: RabbitMQ) -> None:
    done = run(*command, stdin=json.dumps(job("offer-1")), BROKER_URL=url_of(server, "orders"))

    assert done.returncode == 1
    assert "ACCESS_REFUSED" in done.stderr
    assert "refused for user 'orders'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_worker_without_its_rights_ends_with_the_reason(system: System, server: RabbitMQ) -> None:
    worker = system.start_worker(BROKER_URL=url_of(server, "checkout"))

    assert worker.process.wait(30) != 0
    (line,) = [line for line in worker.logged() if line["level"] == "critical"]
    assert "refused for user 'checkout'" in line["error"]


def test_a_wrong_password_is_one_line(server: RabbitMQ) -> None:
    done = run("broker", "declare", BROKER_URL=url_of(server, "worker").replace(PASSWORD, "hush"))

    assert done.returncode == 1
    assert "user or password is not accepted" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "hush" not in done.stderr

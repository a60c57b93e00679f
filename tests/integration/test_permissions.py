"""Each user of RabbitMQ can do its part and nothing else, with the rights that docs/rabbitmq-permissions.md gives."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from amqp.exceptions import AccessRefused
from kombu import Connection, Queue

from models.states import State
from tests.acceptance.test_commands import run
from tests.servers import RabbitMQ
from tests.system import PROJECT, System, job, until
from worker import broker
from worker.broker import Message, Publisher
from worker.sandbox import Sandbox

pytestmark = pytest.mark.slow  # rabbitmqctl takes a second for each command

VHOST = "confirm-offer"
PASSWORD = "secret"
RESOURCES = (broker.JOBS, broker.RESUME, broker.DEAD_LETTERS, "booking-events.unrouted")


def commands() -> list[list[str]]:
    """The arguments of each rabbitmqctl of the document, in its order."""
    document = (PROJECT / "docs" / "rabbitmq-permissions.md").read_text("utf-8")
    lines = [line for line in document.splitlines() if line.startswith("rabbitmqctl ")]
    return [shlex.split(line)[1:] for line in lines]


(*GRANTS, FEWER_RIGHTS) = commands()


@pytest.fixture(scope="module")
def server(rabbitmq: RabbitMQ) -> RabbitMQ:
    """Users and rights as in the document; guest may do everything, for the tests' own use."""
    for command in GRANTS:
        rabbitmq.ctl(*command, *([PASSWORD] if command[0] == "add_user" else []))
    rabbitmq.ctl("set_permissions", "-p", VHOST, "guest", ".*", ".*", ".*")
    assert run("broker", "declare", BROKER_URL=url_of(rabbitmq, "operator")).returncode == 0
    return rabbitmq


@pytest.fixture
def system(
    server: RabbitMQ, postgresql_url: str, sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> Iterator[System]:
    with System(f"{server.url.removesuffix('//')}/{VHOST}", postgresql_url, sandbox, environment, tmp_path) as running:
        running.events_queue(running.connection.channel()).purge()
        yield running


def url_of(server: RabbitMQ, user: str) -> str:
    return f"amqp://{user}:{PASSWORD}@127.0.0.1:{server.port}/{VHOST}"


@contextmanager
def channel_of(server: RabbitMQ, user: str) -> Iterator[Any]:
    with Connection(url_of(server, user)) as connection:
        yield connection.channel()


def publish(server: RabbitMQ, user: str, exchange: str, routing_key: str, body: bytes = b"{}") -> bool:
    """Whether the broker took it."""
    with Publisher(url_of(server, user)) as publisher:
        return publisher.publish([Message(1, body, exchange, routing_key)]) == {1}


def refused(server: RabbitMQ, user: str, do: Callable[[Any], Any]) -> None:
    with channel_of(server, user) as channel, pytest.raises(AccessRefused):
        do(channel)


def test_a_whole_job_with_these_rights_only(system: System, server: RabbitMQ) -> None:
    """Published by a checkout, tried twice, confirmed; a bad one is put aside; a consumer gets the event."""
    worker = system.start_worker(BROKER_URL=url_of(server, "worker"))
    orders = Queue("orders.booking-events", broker.booking_events, "booking.*", no_declare=False)
    with channel_of(server, "orders") as channel:
        channel.queue_declare(orders.name, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        channel.queue_bind(orders.name, broker.booking_events.name, "#")
        file = system.folder / "jobs.jsonl"
        file.write_text("")

        for body in (
            b"{",
            b'{"partner_id": "P-100", "offer_id": "offer-1~http-503~1", "quotes": [{"id": "q"}],'
            + (b'"policyholder": {"first_name": "A", "last_name": "L", "country": "GB", "email": "a@example.com"}}'),
        ):
            assert publish(server, "checkout", broker.confirm_offer.name, broker.JOBS, body)

        message = until(lambda: channel.basic_get(orders.name))
        assert message.headers is not None
        channel.basic_ack(message.delivery_tag)
    until(lambda: system.queue_length(broker.DEAD_LETTERS) == 1)
    assert system.states() == {State.CONFIRMED: 1}
    assert worker.stop() == 0
    assert "AccessRefused" not in worker.log.read_text()
    system.drain(broker.DEAD_LETTERS)


def test_the_worker_declares_all_by_itself(system: System, server: RabbitMQ) -> None:
    channel = system.connection.channel()
    for queue in RESOURCES:
        channel.queue_delete(queue)
    for exchange in broker.EXCHANGES:
        channel.exchange_delete(exchange.name)

    worker = system.start_worker(BROKER_URL=url_of(server, "worker"))
    until(lambda: "AccessRefused" in worker.log.read_text() or exists(system, broker.RESUME))

    assert all(until(lambda queue=queue: exists(system, queue)) for queue in RESOURCES)


def exists(system: System, queue: str) -> bool:
    from amqp.exceptions import NotFound

    try:
        system.queue_length(queue)
    except NotFound:
        return False
    return True

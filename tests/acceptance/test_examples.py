"""The examples and the README's own: jobs published by each are confirmed, and each sees each event once."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import DatabaseError, connect
from typing import Any

import pytest
from amqp.exceptions import NotFound
from kombu import Producer

from tests.support.certificates import Authority
from tests.support.servers import RabbitMQ, lacking, over_tls
from tests.support.system import PROJECT, System, until
from worker.messaging import broker, topology
from worker.published.json_schema import JOB_EXAMPLE

EXAMPLES = PROJECT / "examples"
README = (PROJECT / "README.md").read_text()


@dataclass(frozen=True)
class Client:
    """Programs in one language. The README's own take the job from job.json and print what they see."""

    publish: tuple[str, ...]
    consume: tuple[str, ...]
    is_readme: bool = False

    def lacks(self) -> str | None:
        program = self.publish[0]
        if shutil.which(program) is None:
            return f"{program} is not installed: '.ci/install-servers' does it on Debian"
        if program == "node" and not (EXAMPLES / "node" / "node_modules").exists():
            return "amqplib is not installed: 'make node' does it, with npm"
        if program == "php":
            needs = "require 'PhpAmqpLib/autoload.php'; new PDO('sqlite::memory:');"
            if subprocess.run([program, "-r", needs], capture_output=True, check=False).returncode != 0:
                return "php-amqplib or php-sqlite3 is not installed: '.ci/install-servers' does it on Debian"
        return None


def python(name: str) -> tuple[str, ...]:
    return sys.executable, str(EXAMPLES / "python" / name)


CLIENTS = {
    "kombu": Client(python("publish_kombu.py"), python("consume_kombu.py")),
    "pika": Client(python("publish_pika.py"), python("consume_pika.py")),
    "node": Client(("node", str(EXAMPLES / "node" / "publish.js")), ("node", str(EXAMPLES / "node" / "consume.js"))),
    "php": Client(("php", str(EXAMPLES / "php" / "publish.php")), ("php", str(EXAMPLES / "php" / "consume.php"))),
    "readme": Client(
        (sys.executable, "-c", re.findall(r"```python\n(.*?)```", README, re.S)[0]),
        (sys.executable, "-c", re.findall(r"```python\n(.*?)```", README, re.S)[1]),
        is_readme=True,
    ),
}
EXAMPLE_CLIENTS = [name for name in CLIENTS if name != "readme"]


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Client:
    found = CLIENTS[request.param]
    if sentence := found.lacks():
        lacking(sentence)
    return found


def trusting(authority: Authority) -> dict[str, str]:
    """Where Python and PHP, and Node.js, are told of an authority that the system does not know."""
    return {"SSL_CERT_FILE": str(authority.file), "NODE_EXTRA_CA_CERTS": str(authority.file)}


def publish(client: Client, job: Any, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "job.json").write_text(json.dumps(job))
    return subprocess.run(
        [*client.publish, "job.json"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Consumer:
    """An example that runs, with a queue and a folder of its own."""

    def __init__(self, name: str, folder: Path, **environment: str) -> None:
        self.name = name
        self.queue = "orders.booking-events" if CLIENTS[name].is_readme else f"{name}.booking-events"
        self.folder = folder / name
        self.folder.mkdir()
        self.out = self.folder / "out"
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                CLIENTS[name].consume,
                cwd=self.folder,
                env={**os.environ, "QUEUE": self.queue, "PYTHONUNBUFFERED": "1", **environment},
                stdout=out,
                stderr=out,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def seen(self) -> list[tuple[str, str]]:
        """Type and subject of each event that it took for news, in order."""
        if CLIENTS[self.name].is_readme:
            words = (line.split() for line in self.out.read_text().splitlines())
            return [(event_type, subject) for event_type, subject in words]
        # Node.js' SQLite locks in a way of its own: to a reader with locks, its transaction is one that was cut off,
        # and is rolled back. "immutable" reads without locks and rolls nothing back.
        url = f"file:{self.folder / 'orders.db'}?immutable=1"
        with suppress(DatabaseError), closing(connect(url, uri=True)) as database:
            return database.execute("select type, subject from mails order by rowid").fetchall()
        return []

    def until_seen(self, event: tuple[str, str]) -> None:
        until(lambda: event in self.seen() or self.process.poll() is not None)
        assert event in self.seen(), (self.name, self.out.read_text())

    def is_subscribed(self, system: System) -> bool:
        assert self.process.poll() is None, self.out.read_text()
        channel = system.connection.channel()
        try:
            return bool(channel.queue_declare(self.queue, passive=True).consumer_count)
        except NotFound:
            return False
        finally:
            channel.close()


@contextmanager
def consuming(names: list[str], system: System, **environment: str) -> Iterator[list[Consumer]]:
    with ExitStack() as stack:
        consumers = []
        for name in names:
            url = system.broker_url if CLIENTS[name].is_readme else environment["BROKER_URL"]
            consumers.append(Consumer(name, system.folder, **{**environment, "BROKER_URL": url}))
            stack.callback(consumers[-1].kill)
        until(lambda: all(consumer.is_subscribed(system) for consumer in consumers))
        yield consumers


def again(producer: Producer, body: str | bytes, **changes: Any) -> None:
    """Publishes an event once more, or one made from it. One producer's come in order."""
    event = json.loads(body)
    event.update({name: value for name, value in changes.items() if name != "sequence"})
    event["data"]["sequence"] = changes.get("sequence", event["data"]["sequence"])
    producer.publish(
        json.dumps(event).encode(),
        exchange=topology.booking_events.name,
        routing_key=event["type"],
        content_type="application/cloudevents+json; charset=utf-8",
        content_encoding="utf-8",
        delivery_mode=2,
    )


@pytest.mark.parametrize("client", CLIENTS, indirect=True)
def test_its_language_is_installed(client: Client) -> None:
    """Skipped where it is not; the tests that run all clients together leave it out then."""
    assert client.lacks() is None


def test_jobs_of_each_are_confirmed_and_each_sees_each_event_once(
    system: System, rabbitmq: RabbitMQ, authority: Authority
) -> None:
    names = [name for name, client in CLIENTS.items() if client.lacks() is None]
    settings = {**trusting(authority), "BROKER_URL": over_tls(rabbitmq, system.broker_url)}
    system.start_worker()
    with consuming(names, system, **settings) as consumers:
        for name in names:
            url = system.broker_url if CLIENTS[name].is_readme else settings["BROKER_URL"]
            job = {**JOB_EXAMPLE, "offer_id": f"offer-{name}"}
            done = publish(CLIENTS[name], job, system.folder, **{**settings, "BROKER_URL": url})
            assert done.returncode == 0, done.stderr
        twice = {**JOB_EXAMPLE, "offer_id": "twice~http-422~1"}
        publish(CLIENTS["kombu"], twice, system.folder, **settings)
        until(lambda: [event for event in system.take_events() if event["type"] == "confirmation.failed"])
        publish(CLIENTS["kombu"], {**twice, "order_reference": "SO-2"}, system.folder, **settings)
        system.until_events(len(names) + 2)
        expected = Counter((event["type"], event["subject"]) for event in system.events)
        assert expected.keys() == {
            *(("booking.confirmed", f"P-100/offer-{name}") for name in names),
            *(("confirmation.failed", "P-100/twice~http-422~1"), ("booking.confirmed", "P-100/twice~http-422~1")),
        }

        bodies = [message.body for message in system.event_messages]
        producer = system.connection.Producer()
        for body in [*bodies, *reversed(bodies)]:
            again(producer, body)
        again(producer, bodies[0], subject="P-100/late", id="id-2", sequence=2)
        again(producer, bodies[0], subject="P-100/late", id="id-1", sequence=1)
        last = (json.loads(bodies[0])["type"], "P-100/last")
        again(producer, bodies[0], subject=last[1], id="id-0")

        for consumer in consumers:
            consumer.until_seen(last)
            assert Counter(consumer.seen()) == {**expected, (last[0], "P-100/late"): 1, last: 1}, consumer.name
            assert set(expected.values()) == {1}
        until(lambda: all(system.queue_length(consumer.queue) == 0 for consumer in consumers))


@pytest.mark.parametrize("client", CLIENTS, indirect=True)
def test_a_job_that_no_queue_is_bound_for_is_not_taken_for_published(
    client: Client, broker_url: str, tmp_path: Path
) -> None:
    with broker.connect(broker_url) as connection:
        connection.channel().queue_unbind(topology.JOBS, topology.confirm_offer.name, topology.JOBS)

    done = publish(client, JOB_EXAMPLE, tmp_path, BROKER_URL=broker_url)

    assert done.returncode != 0
    assert done.stdout == "" or client.publish[0] == "php"  # PHP tells errors there
    assert re.search("NO_ROUTE|Unroutable|no queue is bound|unroutable", done.stderr + done.stdout), done


@pytest.mark.parametrize("client", EXAMPLE_CLIENTS, indirect=True)
def test_a_job_goes_over_tls_to_a_broker_of_that_name_and_to_no_other(
    client: Client, broker_url: str, rabbitmq: RabbitMQ, authority: Authority, tmp_path: Path
) -> None:
    def published(host: str, trust: dict[str, str]) -> bool:
        done = publish(client, JOB_EXAMPLE, tmp_path, BROKER_URL=over_tls(rabbitmq, broker_url, host), **trust)
        return done.returncode == 0

    trust = trusting(authority)  # of a certificate for 127.0.0.1
    with ThreadPoolExecutor() as at_once:
        taken = at_once.map(published, ("127.0.0.1", "localhost", "127.0.0.1"), (trust, trust, {}))

    assert list(taken) == [True, False, False]
    with broker.connect(broker_url) as connection:
        channel = connection.channel()
        message = channel.basic_get(topology.JOBS, no_ack=True)
        assert json.loads(message.body) == JOB_EXAMPLE
        assert message.properties["delivery_mode"] == 2
        assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
        assert channel.basic_get(topology.JOBS, no_ack=True) is None


@pytest.mark.parametrize(
    "file", [*EXAMPLES.glob("python/*.py"), *EXAMPLES.glob("node/*.js"), *EXAMPLES.glob("php/*.php")]
)
def test_it_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 60


def test_jobs_in_the_documents_are_the_example() -> None:
    assert json.loads((EXAMPLES / "job.json").read_text()) == JOB_EXAMPLE
    assert json.loads(re.findall(r"```json\n(.*?)```", README, re.S)[0]) == JOB_EXAMPLE

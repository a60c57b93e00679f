"""The examples, and those of the README: their jobs are confirmed, and each consumer sees each event once."""

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
    """The programs of one language. Those of the README read the job from job.json and print the events."""

    publish: tuple[str, ...]
    consume: tuple[str, ...]
    is_readme: bool = False

    def missing(self) -> str | None:
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
    if reason := found.missing():
        lacking(reason)
    return found


def trust_of(authority: Authority) -> dict[str, str]:
    """The environment in which Python, PHP and Node.js trust this authority."""
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
    """A running example, with its own queue and folder."""

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
        """Type and subject of each event that it took for new, in order."""
        if CLIENTS[self.name].is_readme:
            words = (line.split() for line in self.out.read_text().splitlines())
            return [(event_type, subject) for event_type, subject in words]
        # Node.js' SQLite uses other locks: a reader with locks would take its transaction for an interrupted one and
        # roll it back. "immutable" reads without locks and rolls nothing back.
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


def republish(producer: Producer, body: str | bytes, **changes: Any) -> None:
    """Publishes an event again, or a changed copy. Events of one producer arrive in order."""
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
def test_the_language_of_each_example_is_installed(client: Client) -> None:
    """Skipped if it is not. Tests that run all clients together then leave it out."""
    assert client.missing() is None


def test_jobs_of_each_example_are_confirmed_and_each_example_sees_each_event_once(
    system: System, rabbitmq: RabbitMQ, authority: Authority
) -> None:
    names = [name for name, client in CLIENTS.items() if client.missing() is None]
    settings = {**trust_of(authority), "BROKER_URL": over_tls(rabbitmq, system.broker_url)}
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
            republish(producer, body)
        republish(producer, bodies[0], subject="P-100/late", id="id-2", sequence=2)
        republish(producer, bodies[0], subject="P-100/late", id="id-1", sequence=1)
        last = (json.loads(bodies[0])["type"], "P-100/last")
        republish(producer, bodies[0], subject=last[1], id="id-0")

        for consumer in consumers:
            consumer.until_seen(last)
            assert Counter(consumer.seen()) == {**expected, (last[0], "P-100/late"): 1, last: 1}, consumer.name
            assert set(expected.values()) == {1}
        until(lambda: all(system.queue_length(consumer.queue) == 0 for consumer in consumers))


@pytest.mark.parametrize("client", CLIENTS, indirect=True)
def test_a_job_without_a_bound_queue_is_not_published(client: Client, broker_url: str, tmp_path: Path) -> None:
    with broker.connect(broker_url) as connection:
        connection.channel().queue_unbind(topology.JOBS, topology.confirm_offer.name, topology.JOBS)

    done = publish(client, JOB_EXAMPLE, tmp_path, BROKER_URL=broker_url)

    assert done.returncode != 0
    assert done.stdout == "" or client.publish[0] == "php"  # PHP prints errors to stdout
    assert re.search("NO_ROUTE|Unroutable|no queue is bound|unroutable", done.stderr + done.stdout), done


@pytest.mark.slow
@pytest.mark.parametrize("client", EXAMPLE_CLIENTS, indirect=True)
def test_a_job_is_published_over_tls_only_to_a_broker_with_that_name(
    client: Client, broker_url: str, rabbitmq: RabbitMQ, authority: Authority, tmp_path: Path
) -> None:
    def published(host: str, trusted: dict[str, str]) -> bool:
        done = publish(client, JOB_EXAMPLE, tmp_path, BROKER_URL=over_tls(rabbitmq, broker_url, host), **trusted)
        return done.returncode == 0

    trusted = trust_of(authority)  # the certificate is for 127.0.0.1
    with ThreadPoolExecutor() as pool:
        results = pool.map(published, ("127.0.0.1", "localhost", "127.0.0.1"), (trusted, trusted, {}))

    assert list(results) == [True, False, False]
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
def test_each_example_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 60


def test_jobs_in_the_documents_equal_the_example() -> None:
    assert json.loads((EXAMPLES / "job.json").read_text()) == JOB_EXAMPLE
    assert json.loads(re.findall(r"```json\n(.*?)```", README, re.S)[0]) == JOB_EXAMPLE

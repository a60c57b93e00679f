"""The broker: can it be reached, are queues and rights as they must be, does it take messages, does anything wait?"""

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from amqp.exceptions import AccessRefused, NotAllowed, NotFound, PreconditionFailed
from kombu import Connection, Queue

from worker.doctor.finding import Finding, ok, plain, warning, wrong
from worker.messaging import broker, topology
from worker.settings import BrokerSettings

CHECK, RIGHTS, QUEUES = "broker", "broker rights", "queues"
OLDEST = (3, 10)
NOBODYS = "confirm-offer.doctor"  # a routing key that no queue is bound with
MEND_RIGHTS = "docs/rabbitmq-permissions.md has the command for the worker's user"


class Blocked(Exception):
    """The broker has said that it takes no messages."""


class Stand(NamedTuple):
    messages: int
    consumers: int


def look(settings: BrokerSettings) -> Iterator[Finding]:
    if settings.url.startswith("memory"):
        yield warning(CHECK, "in-memory: jobs reach this process only", "set BROKER_URL to that of a RabbitMQ")
        return
    connection = broker.connect(settings.url)
    try:
        connection.connect()
        yield _reached(connection, settings.url)
        found: dict[str, Stand] = {}
        yield from _compare(connection, found)
        yield from _publish(connection)
        yield from _waiting(found)
    except Exception as error:
        yield _refusal(error, settings.url)
    finally:
        with suppress(Exception):
            connection.collect(socket_timeout=1)  # a broker with an alarm answers no "close"


def _place(url: str) -> str:
    address = urlsplit(url.split(";")[0])
    port = address.port or (5671 if address.scheme == "amqps" else 5672)
    return f"{plain(address.hostname or 'localhost')}:{port}, virtual host {plain(_vhost(address.path))}"


def _vhost(path: str) -> str:
    return unquote(path[1:]) or "/"


def _reached(connection: Connection, url: str) -> Finding:
    server = connection.connection.server_properties
    product, version = str(server.get("product", "broker")), str(server.get("version", "0"))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if product == "RabbitMQ" and numbers < OLDEST:
        return wrong(CHECK, f"RabbitMQ {version} at {_place(url)}", "RabbitMQ 3.10 or later is needed")
    return ok(CHECK, f"{plain(product)} {plain(version)} at {_place(url)}")


def _refusal(error: Exception, url: str) -> Finding:
    place = _place(url)
    if isinstance(error, AccessRefused):
        return wrong(CHECK, f"{place}: user or password is not accepted", "check user and password in BROKER_URL")
    if isinstance(error, NotAllowed) and "not found" in str(error.reply_text):
        name = plain(_vhost(urlsplit(url).path))
        return wrong(
            CHECK,
            f"there is no virtual host {name}",
            f"check the end of BROKER_URL, or make it: rabbitmqctl add_vhost {name}",
        )
    if isinstance(error, NotAllowed):
        return wrong(RIGHTS, f"{place}: the user may not use it", MEND_RIGHTS)
    if why := broker.distrusts(error):
        return wrong(
            CHECK,
            f"{place}: its certificate is refused ({why})",
            "check the host and ssl_ca_certs in BROKER_URL: docs/tls.md",
        )
    if isinstance(error, ssl.SSLError):
        return wrong(CHECK, f"{place}: does not speak TLS", "check the port in BROKER_URL: amqps: is 5671 mostly")
    if isinstance(error, socket.gaierror):
        return wrong(CHECK, f"{place}: no machine has this name", "check the host in BROKER_URL, and the name servers")
    return wrong(
        CHECK,
        f"{place}: can't be reached ({type(error).__name__})",
        "see whether RabbitMQ runs (rabbitmq-diagnostics check_running); check host and port in BROKER_URL",
    )


def _compare(connection: Connection, found: dict[str, Stand]) -> Iterator[Finding]:
    """Whether what must be declared stands, with the properties it must have. What is missing is not declared."""
    missing, differ, refused = [], [], []
    for entity in (*topology.EXCHANGES, *topology.QUEUES):
        with connection.channel() as channel:
            try:
                if isinstance(entity, Queue):
                    stand = channel.queue_declare(entity.name, passive=True)
                    found[entity.name] = Stand(stand.message_count, stand.consumer_count)
                    entity(channel).queue_declare()
                else:
                    entity(channel).declare(passive=True)
                    entity(channel).declare()
            except NotFound:
                missing.append(entity.name)
            except PreconditionFailed as error:
                differ.append(f"{entity.name}: {_difference(str(error.reply_text))}")
            except AccessRefused:
                refused.append(entity.name)
    if missing:
        yield wrong(QUEUES, f"missing: {', '.join(missing)}", "confirm-offer broker declare (each worker does it too)")
    for each in differ:
        yield wrong(QUEUES, each, "let it run empty, delete it, then: confirm-offer broker declare")
    if refused:
        yield wrong(RIGHTS, f"the user may not declare: {', '.join(refused)}", MEND_RIGHTS)
    if not (missing or differ or refused):
        yield ok(QUEUES, f"{len(topology.QUEUES)} queues and {len(topology.EXCHANGES)} exchanges are as they should be")


def _difference(text: str) -> str:
    """From RabbitMQ's text, which holds names and properties only."""
    told = re.search(r"inequivalent arg '([\w-]+)'.* received (.+) but current is (.+)", text)
    return f"{told[1]} is {told[3]}, not {told[2]}" if told else "stands with other properties than it must have"


def _publish(connection: Connection) -> Iterator[Finding]:
    """Whether the user may publish, and RabbitMQ takes it. In a transaction that is rolled back: nothing arrives."""

    def blocked(_: Any) -> None:
        raise Blocked

    connection.connection.on_blocked = blocked
    for exchange, key in (topology.confirm_offer, topology.JOBS), (topology.booking_events, NOBODYS):
        channel = connection.channel()
        try:
            channel.tx_select()
            channel.basic_publish(channel.prepare_message(b""), exchange=exchange.name, routing_key=key)
            channel.tx_rollback()
            channel.close()
        except Blocked:
            yield wrong(
                CHECK,
                "it takes no messages: an alarm of memory or disk space",
                "rabbitmq-diagnostics check_local_alarms; free disk space or memory there, or stop what fills it",
            )
            return
        except NotFound:  # told above
            continue
        except AccessRefused:
            yield wrong(RIGHTS, f"the user may not publish to {exchange.name}", MEND_RIGHTS)


def _waiting(found: dict[str, Stand]) -> Iterator[Finding]:
    """Queues that nobody works on, and what people have to look at."""
    idle = [name for name in (topology.JOBS, topology.RESUME) if name in found and not found[name].consumers]
    waits = sum(stand.messages for name, stand in found.items() if name in (topology.JOBS, topology.RESUME))
    if idle:
        tell = wrong if waits else warning
        yield tell(
            "jobs", f"nobody takes them, and {waits:,} wait", "confirm-offer worker (WORKER_PARTS must hold tasks)"
        )
    elif topology.JOBS in found:
        workers = found[topology.JOBS].consumers
        yield ok("jobs", f"{workers:,} {'worker takes' if workers == 1 else 'workers take'} them, {waits:,} wait")
    if topology.DEAD_LETTERS in found and (letters := found[topology.DEAD_LETTERS].messages):
        yield warning(
            "dead letters",
            f"{letters:,} {'job' if letters == 1 else 'jobs'} could not be accepted",
            "confirm-offer dead-letters list",
        )
    unrouted = topology.unrouted_queue.name
    if unrouted in found and (events := found[unrouted].messages):
        yield warning(
            "events", f"{events:,} had no queue to go to: see {unrouted}", "docs/runbook.md, 'Nobody got the events'"
        )

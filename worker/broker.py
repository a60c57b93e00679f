"""The broker: names of exchanges and queues, their declaration, and publishing with confirms.

               confirm-offer (direct)                                booking-events (topic)
checkout ──▶ confirm-offer.jobs ──▶ queue confirm-offer.jobs           ├─▶ consumers' own queues
Scheduler ─▶ confirm-offer.resume ─▶ queue confirm-offer.resume        └─▶ booking-events.unrouted, where
worker ────▶ confirm-offer.dead-letters ─▶ queue of that name              nobody has bound a queue
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from ssl import CERT_REQUIRED, SSLCertVerificationError
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from amqp.exceptions import AccessRefused, AMQPError, NotAllowed, NotFound, PreconditionFailed
from amqp.serialization import PROPERTY_CLASSES, decode_properties_basic
from amqp.spec import Basic
from kombu import Connection, Exchange, Queue
from kombu.exceptions import OperationalError

from worker import green, tracing
from worker.errors import BrokerError

JOBS = "confirm-offer.jobs"
RESUME = "confirm-offer.resume"
DEAD_LETTERS = "confirm-offer.dead-letters"

DELIVERY_LIMIT = 60  # a backstop behind MAX_DELIVERIES of the task; RabbitMQ 4 has 20 by default, 3.x none
CONFIRM_TIMEOUT = 10.0  # seconds

confirm_offer = Exchange("confirm-offer", type="direct", durable=True)
unrouted = Exchange("booking-events.unrouted", type="fanout", durable=True)
booking_events = Exchange("booking-events", type="topic", durable=True, arguments={"alternate-exchange": unrouted.name})

_QUORUM = {"x-queue-type": "quorum"}
_TO_DEAD_LETTERS = {
    **_QUORUM,
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": confirm_offer.name,
    "x-dead-letter-routing-key": DEAD_LETTERS,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
# Who looks at letters takes them and gives them back, and each time counts. RabbitMQ 4 would drop them after 20.
_KEPT = {**_QUORUM, "x-delivery-limit": 2**31 - 1}

dead_letters_queue = Queue(DEAD_LETTERS, confirm_offer, routing_key=DEAD_LETTERS, queue_arguments=_KEPT)
jobs_queue = Queue(JOBS, confirm_offer, routing_key=JOBS, queue_arguments=_TO_DEAD_LETTERS)
resume_queue = Queue(RESUME, confirm_offer, routing_key=RESUME, queue_arguments=_TO_DEAD_LETTERS)
unrouted_queue = Queue("booking-events.unrouted", unrouted, routing_key="", queue_arguments=_QUORUM)

EXCHANGES = (confirm_offer, unrouted, booking_events)
QUEUES = (dead_letters_queue, jobs_queue, resume_queue, unrouted_queue)

# Bounds on operations that would otherwise hang while RabbitMQ has an alarm or a connection is half dead.
_SOCKET_LIMITS = {"connect_timeout": 5, "read_timeout": 60, "write_timeout": 60}


def connect(url: str) -> Connection:
    """A lazy connection for publishing and declaring; close it after use."""
    options = {"polling_interval": 0.01} if url.startswith("memory") else dict(_SOCKET_LIMITS)
    plain_url, tls = with_tls(url)
    return Connection(plain_url, ssl=tls, transport_options=options, heartbeat=0 if url.startswith("memory") else 60)


def with_tls(url: str) -> tuple[str, dict[str, Any] | bool]:
    """A URL without its option ``ssl_ca_certs``, and the argument ``ssl`` of a connection; False without TLS.

    Neither kombu nor py-amqp checks by itself that a certificate is for the host that was asked for, and py-amqp does
    not know the options as kombu reads them from a URL.
    """
    if not url.startswith("amqps:"):
        return url, False
    plain_url, _, options = url.partition("?")
    return plain_url, {
        "cert_reqs": CERT_REQUIRED,
        "ca_certs": dict(parse_qsl(options)).get("ssl_ca_certs"),  # none: those that the system trusts
        "server_hostname": urlsplit(plain_url).hostname or "localhost",
    }


def bound(connection: Connection) -> None:
    """Puts the bounds on a connection that stands where py-amqp's have no effect: on sockets of gevent."""
    if green.is_on() and connection.transport.driver_type == "amqp":
        socket: Any = connection.connection.transport.sock
        socket.settimeout((connection.transport_options or {})["read_timeout"])


def declare(connection: Connection) -> list[str]:
    """Declares all exchanges, queues and bindings; what stands already is left as it is.

    Returns their names. Raises BrokerError where one of that name is of another kind, or the user may not do it.
    """
    channel = connection.channel()
    try:
        for entity in (*EXCHANGES, *QUEUES):
            try:
                entity(channel).declare()
            except PreconditionFailed as error:
                raise BrokerError(_mismatch(entity, error)) from None
            except AccessRefused as error:
                raise BrokerError(f"{error.reply_text}; see docs/rabbitmq-permissions.md") from None
    finally:
        if connection.connected:
            channel.close()
    return [f"{'queue' if isinstance(entity, Queue) else 'exchange'} {entity.name}" for entity in (*EXCHANGES, *QUEUES)]


def _mismatch(entity: Exchange | Queue, error: PreconditionFailed) -> str:
    kind = "queue" if isinstance(entity, Queue) else "exchange"
    return (
        f"{kind} {entity.name} exists with other properties than this program needs ({error.reply_text}). "
        f"Let it run empty, delete it, and run 'confirm-offer broker declare' again"
    )


class NotTaken(OSError):
    """The broker refused a message, or no queue was bound for it: worth trying again later."""


@dataclass(frozen=True)
class Message:
    """A message to publish. ``key`` is the caller's own name for it, handed back with what became of it."""

    key: Any
    body: bytes
    exchange: str
    routing_key: str
    content_type: str = "application/json"
    properties: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, Any] = field(default_factory=dict)


class Publisher:
    """Publishes persistent messages and waits for the broker's confirms, many at a time.

    Confirms are matched by delivery tag. After any error the connection is discarded, for a confirm that comes late
    would be taken for another message's. Not for threads: one has one.
    """

    def __init__(self, url: str, confirm_timeout: float = CONFIRM_TIMEOUT) -> None:
        self._url = url
        self._confirm_timeout = confirm_timeout
        self._connection: Connection | None = None
        self._channel: Any = None
        self._unconfirmed: dict[int, Message] = {}
        self._refused: set[Any] = set()
        self._published = 0

    def publish(self, messages: Iterable[Message]) -> set[Any]:
        """Publishes all; returns the keys of those that the broker has. The others it refused, or nobody was bound.

        Raises the connection's error where the broker is away: then nothing is known of any of them.
        """
        try:
            channel = self._open()
            with tracing.sending(self._refused) as traced:
                keys = [self._send(channel, traced(message)) for message in messages]
                self._wait()
        except BaseException:
            self.close()
            raise
        return {key for key in keys if key not in self._refused}

    def ensure_connection(self) -> None:
        """Connects where there is no connection, or where the one there was is lost. Raises the connection's error."""
        try:
            channel = self._open()
            assert self._connection is not None
            if hasattr(channel, "confirm_select"):
                with suppress(TimeoutError):
                    self._connection.drain_events(timeout=0.001)
        except _AWAY:
            self.close()
            self._open()

    def _open(self) -> Any:
        self._unconfirmed.clear()
        self._refused.clear()
        if self._channel is None:
            self._connection = connect(self._url)
            self._connection.connect()
            bound(self._connection)
            self._channel = self._connection.channel()
            self._published = 0
            if hasattr(self._channel, "confirm_select"):  # the in-memory transport has, and needs, no confirms
                self._channel.confirm_select()
                self._channel.events["basic_ack"].add(self._on_ack)
                self._channel.events["basic_nack"].add(self._on_nack)
                self._channel.events["basic_return"].add(self._on_return)
        return self._channel

    def _send(self, channel: Any, message: Message) -> Any:
        if hasattr(channel, "confirm_select"):
            self._published += 1
            self._unconfirmed[self._published] = message
        prepared = channel.prepare_message(
            message.body,
            content_type=message.content_type,
            content_encoding="utf-8",
            headers=message.headers,
            properties={"delivery_mode": 2, **message.properties},
        )
        channel.basic_publish(prepared, exchange=message.exchange, routing_key=message.routing_key, mandatory=True)
        return message.key

    def _wait(self) -> None:
        deadline = time.monotonic() + self._confirm_timeout
        while self._unconfirmed:
            assert self._connection is not None
            self._connection.drain_events(timeout=max(deadline - time.monotonic(), 0.001))

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused.update(message.key for message in self._settle(tag, multiple))

    def _settle(self, tag: int, multiple: bool) -> list[Message]:
        tags = list(takewhile(lambda sent: sent <= tag, self._unconfirmed)) if multiple else [tag]
        return [self._unconfirmed.pop(sent) for sent in tags if sent in self._unconfirmed]

    def _on_return(self, _error: Exception, _exchange: str, routing_key: str, returned: Any) -> None:
        """An unroutable message comes back before its ack; it is known by its body."""
        body = returned.body if isinstance(returned.body, bytes) else str(returned.body).encode()
        for message in self._unconfirmed.values():
            if message.body == body and message.routing_key == routing_key and message.key not in self._refused:
                self._refused.add(message.key)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; the next publish opens a new one."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            connection.collect(socket_timeout=1)


def _readable(buffer: Any, offset: int) -> tuple[dict[str, Any], int]:
    """The properties of a message; none of them where one can't be read, such as an id that is not UTF-8.

    RabbitMQ passes on whatever bytes a publisher wrote, and py-amqp's error would end the program.
    """
    try:
        properties: tuple[dict[str, Any], int] = decode_properties_basic(buffer, offset)
    except Exception:
        return {}, len(buffer)
    return properties


PROPERTY_CLASSES[Basic.CLASS_ID] = _readable

_AWAY = (OSError, OperationalError, AMQPError)


def is_away(error: Exception) -> bool:
    """Whether the broker could not be reached, or the connection or channel broke."""
    return isinstance(error, _AWAY)


def lacks_queues(error: Exception) -> bool:
    """Whether an exchange or queue is missing: nobody has declared them."""
    return isinstance(error, NotFound)


def refuses(error: Exception) -> str | None:
    """What the broker says, where it refuses the user of the URL, or what this user asked for."""
    return str(error.reply_text) if isinstance(error, AccessRefused | NotAllowed) else None


def distrusts(error: Exception) -> str | None:
    """Why the broker's certificate was refused, where that is what went wrong."""
    return str(error.verify_message).rstrip(".") if isinstance(error, SSLCertVerificationError) else None

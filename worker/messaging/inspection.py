"""Inspects a RabbitMQ without changing it: server, declarations, permission to publish.

Queues and exchanges are declared passively first, so that a missing one stays missing. Test messages are published in a
transaction that is rolled back, so that none arrives.
"""

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Self

from amqp.exceptions import AccessRefused, ContentTooLarge, NotAllowed, NotFound, PreconditionFailed
from kombu import Exchange, Queue

from worker.messaging import broker, topology

_UNBOUND_KEY = "confirm-offer.doctor"  # a routing key that no queue is bound with


class ConnectionProblem(Enum):
    """Why a broker can't be used."""

    LOGIN_REFUSED = "user or password is not accepted"
    RIGHT_LACKING = "the user lacks a right"
    NO_VIRTUAL_HOST = "there is no such virtual host"
    VIRTUAL_HOST_FORBIDDEN = "the user may not use this virtual host"
    CERTIFICATE_REFUSED = "its certificate is refused"
    NO_TLS = "it does not speak TLS"
    UNKNOWN_HOST = "no machine has this name"
    UNREACHABLE = "it can't be reached"


class Declaration(Enum):
    """How a declared queue or exchange compares with what this program declares."""

    EQUAL = auto()
    MISSING = auto()
    DIFFERENT = auto()
    FORBIDDEN = auto()


class Publishing(Enum):
    """What the broker does with a test message."""

    ACCEPTED = auto()
    BLOCKED = auto()  # an alarm of memory or disk space
    NO_EXCHANGE = auto()
    FORBIDDEN = auto()


@dataclass(frozen=True)
class QueueDepth:
    """Messages ready to be delivered, and consumers, of one queue."""

    messages: int
    consumers: int


@dataclass(frozen=True)
class Comparison:
    """A queue or exchange. difference: in words, where it is DIFFERENT; depth: of a queue that exists."""

    name: str
    declaration: Declaration
    difference: str | None = None
    depth: QueueDepth | None = None


class Inspection:
    """An open connection to the broker at an AMQP URL, as a context manager. Entering raises the connection's error."""

    def __init__(self, url: str) -> None:
        self._connection = broker.connect(url)

    def __enter__(self) -> Self:
        try:
            self._connection.connect()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        with suppress(Exception):
            self._connection.collect(socket_timeout=1)  # a broker with an alarm does not answer "close"

    @property
    def product(self) -> str:
        return str(self._connection.connection.server_properties.get("product", "broker"))

    @property
    def version(self) -> str:
        return str(self._connection.connection.server_properties.get("version", "0"))

    def compare_declarations(self) -> Iterator[Comparison]:
        """Compares each exchange and queue of worker.messaging.topology with what is declared."""
        for entity in (*topology.EXCHANGES, *topology.QUEUES):
            yield self._compare(entity)

    def _compare(self, entity: Exchange | Queue) -> Comparison:
        depth = None
        with self._connection.channel() as channel:
            try:
                if isinstance(entity, Queue):
                    declared = channel.queue_declare(entity.name, passive=True)
                    depth = QueueDepth(declared.message_count, declared.consumer_count)
                    entity(channel).queue_declare()
                else:
                    entity(channel).declare(passive=True)
                    entity(channel).declare()
            except NotFound:
                return Comparison(entity.name, Declaration.MISSING)
            except PreconditionFailed as error:
                return Comparison(entity.name, Declaration.DIFFERENT, _difference(str(error.reply_text)), depth)
            except AccessRefused:
                return Comparison(entity.name, Declaration.FORBIDDEN, depth=depth)
        return Comparison(entity.name, Declaration.EQUAL, depth=depth)

    def try_publishing(self) -> Iterator[tuple[str, Publishing]]:
        """Publishes to each exchange that workers publish to. Yields its name and the outcome; ends when BLOCKED."""
        self._connection.connection.on_blocked = _raise_blocked
        for exchange, routing_key in (topology.confirm_offer, topology.JOBS), (topology.booking_events, _UNBOUND_KEY):
            outcome = self._publish(exchange.name, routing_key)
            yield exchange.name, outcome
            if outcome is Publishing.BLOCKED:
                return

    def takes_larger_messages(self) -> bool:
        """Whether the broker takes a job of more than MAX_MESSAGE_SIZE."""
        too_large = b" " * (topology.MAX_MESSAGE_SIZE + 1)
        try:
            return self._publish(topology.confirm_offer.name, topology.JOBS, too_large) is Publishing.ACCEPTED
        except (PreconditionFailed, ContentTooLarge):
            return False

    def _publish(self, exchange: str, routing_key: str, body: bytes = b"") -> Publishing:
        """Publishes in a transaction that is rolled back: no queue gets the message."""
        channel = self._connection.channel()
        try:
            channel.tx_select()
            channel.basic_publish(channel.prepare_message(body), exchange=exchange, routing_key=routing_key)
            channel.tx_rollback()
            channel.close()
        except _Blocked:
            return Publishing.BLOCKED
        except NotFound:
            return Publishing.NO_EXCHANGE
        except AccessRefused:
            return Publishing.FORBIDDEN
        return Publishing.ACCEPTED


class _Blocked(Exception):
    """The broker has sent connection.blocked."""


def _raise_blocked(_reason: Any) -> None:
    raise _Blocked


def _difference(reply_text: str) -> str:
    """From RabbitMQ's text, which holds only names and properties."""
    parts = re.search(r"inequivalent arg '([\w-]+)'.* received (.+) but current is (.+)", reply_text)
    return f"{parts[1]} is {parts[3]}, not {parts[2]}" if parts else "stands with other properties than it must have"


def connection_problem(error: Exception) -> ConnectionProblem:
    """Classifies what connecting, or a later operation on the connection, raised."""
    if isinstance(error, AccessRefused):
        is_login = "refused for user" not in str(error.reply_text)
        return ConnectionProblem.LOGIN_REFUSED if is_login else ConnectionProblem.RIGHT_LACKING
    if isinstance(error, NotAllowed):
        is_missing = "not found" in str(error.reply_text)
        return ConnectionProblem.NO_VIRTUAL_HOST if is_missing else ConnectionProblem.VIRTUAL_HOST_FORBIDDEN
    if broker.distrusts(error) is not None:
        return ConnectionProblem.CERTIFICATE_REFUSED
    if isinstance(error, ssl.SSLError):
        return ConnectionProblem.NO_TLS
    return ConnectionProblem.UNKNOWN_HOST if isinstance(error, socket.gaierror) else ConnectionProblem.UNREACHABLE

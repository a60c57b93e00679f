"""Publishes messages with publisher confirms."""

import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Self

from amqp.exceptions import AccessRefused, AMQPError, FrameSyntaxError, NotFound
from kombu import Connection

from worker.errors import BrokerError
from worker.messaging.broker import CONNECTION_ERRORS, AnyHost, apply_socket_limits, connect, refusal_of_message
from worker.messaging.topology import QUEUES, booking_events, confirm_offer, declare
from worker.observability import tracing

CONFIRM_TIMEOUT = 10.0  # seconds
REFUSED = "refused by a queue, which is full or has no leader"
UNROUTABLE = "no queue is bound for it"
PROBE = "probe"  # a routing key that no queue is bound with

_silent: set[str] = set()  # URLs of brokers that did not confirm in time to this process


class NotTaken(OSError):
    """The broker refused a message, or no queue is bound for it. The text says why. A later try may succeed."""


class _Unsendable(Exception):
    """A message that can't be written in AMQP."""

    def __init__(self, key: Any, reason: str) -> None:
        super().__init__(reason)
        self.key = key
        self.reason = reason


@dataclass(frozen=True)
class Message:
    """A message to publish. key: the caller's name for it, unique within one call of publish()."""

    key: Any
    body: bytes
    exchange: str
    routing_key: str
    content_type: str = "application/json"
    properties: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, Any] = field(default_factory=dict)


def _is_for_us(message: Message) -> bool:
    """Whether one of the queues that topology.declare declares should have taken the message."""
    return message.exchange == booking_events.name or message.routing_key in {queue.name for queue in QUEUES}


class Publisher:
    """Publishes persistent messages, many at a time, and waits for the broker's confirms.

    Confirms are matched by delivery tag. After any error or refusal the connection is discarded: a late confirm would
    be taken for another message's. Not thread-safe: each thread has its own.

    A broker with an alarm of memory or disk space confirms nothing, and takes all that was sent when the alarm ends,
    also of connections that are closed by then. While a broker is silent, it is sent probes only.
    """

    def __init__(self, url: str, confirm_timeout: float = CONFIRM_TIMEOUT, declares: bool = False) -> None:
        """confirm_timeout: seconds for the confirms of all messages of one call.

        declares: whether exchanges and queues of this program that are missing are declared, as workers do.
        """
        self._declares = declares
        self._url = url
        self._confirm_timeout = confirm_timeout
        self._connection: Connection | None = None
        self._channel: Any = None
        self._unconfirmed: dict[int, Message] = {}
        self._unroutable: set[Any] = set()
        self._published = 0
        self.confirmed: set[Any] = set()  # keys of what the broker has, of the last call, also of one that raised
        self.refused: dict[Any, str] = {}  # by key: why the broker, or the protocol, does not take a message

    def publish(self, messages: Iterable[Message]) -> set[Any]:
        """Publishes all messages. Returns the keys of those that the broker confirmed.

        ``refused`` then has the others: the broker refused them, or no queue is bound for them. A message that the
        broker closes the channel for is found and does not stop the others. Raises the connection's error (see
        broker.is_away) where the broker can't be reached or does not confirm in time; it may then have any of those
        that are not in ``confirmed``.
        """
        self.confirmed, self.refused, self._unroutable = set(), {}, set()
        batch = list(messages)
        deadline = time.monotonic() + self._confirm_timeout
        try:
            self._publish_round(batch, deadline)
        except NotFound:
            if not self._declare():
                raise
            self._publish_round(self._left(batch), deadline)
        unroutable = [each for each in batch if each.key in self._unroutable and _is_for_us(each)]
        if unroutable and self._declare():
            self._unroutable.clear()
            for message in unroutable:
                self.refused.pop(message.key, None)
            self._publish_round(unroutable, deadline)
        if self.refused.keys() - self._unroutable:
            self.close()  # RabbitMQ 3.10 may refuse all that follows on a channel that it has refused a message on
        return self.confirmed

    def _publish_round(self, messages: list[Message], deadline: float) -> None:
        """Publishes messages. Where one of them breaks the channel, halves them until it is found."""
        try:
            self._publish_together(messages, deadline)
        except _Unsendable as unsendable:
            self.refused[unsendable.key] = unsendable.reason
            self._publish_round(self._left(messages), deadline)
        except AMQPError as error:
            reason = refusal_of_message(error)
            if reason is None:
                raise
            left = self._left(messages)
            if len(left) == 1:
                self.refused[left[0].key] = reason
                return
            middle = len(left) // 2
            for half in left[:middle], left[middle:]:
                self._publish_round(half, deadline)

    def _left(self, messages: list[Message]) -> list[Message]:
        return [each for each in messages if each.key not in self.confirmed and each.key not in self.refused]

    def _publish_together(self, messages: list[Message], deadline: float) -> None:
        if not messages:
            return
        try:
            channel = self._open()
            if self._url in _silent:
                self._probe(channel, deadline)
                channel = self._open()
            with tracing.sending(self.refused) as traced:
                for message in messages:
                    self._send(channel, traced(message))
                self._wait(deadline)
        except OSError:
            self._leave()
            raise
        except BaseException:
            self.close()
            raise

    def _probe(self, channel: Any, deadline: float) -> None:
        """Waits until the broker answers to two messages that no queue gets, be it with a refusal.

        RabbitMQ with an alarm reads the first message of a connection, and nothing after it.
        """
        try:
            for key in object(), object():
                self._send(channel, Message(key, b"", confirm_offer.name, PROBE), mandatory=False)
                self._wait(deadline)
                self.confirmed.discard(key)
        except (AccessRefused, NotFound):
            self.close()
        _silent.discard(self._url)

    def _declare(self) -> bool:
        """Declares the exchanges and queues of this program. Returns False where that is refused or not wanted."""
        if not self._declares:
            return False
        try:
            self._open()
            assert self._connection is not None
            declare(self._connection)
        except BrokerError:
            self.close()
            return False
        except OSError:
            self._leave()
            raise
        return True

    def publish_one(self, message: Message) -> None:
        """As publish(). Raises NotTaken where the broker does not take the message."""
        if not self.publish([message]):
            raise NotTaken(self.refused[message.key])

    def ensure_connection(self) -> None:
        """Connects if there is no connection or it is lost. Raises the connection's error."""
        try:
            channel = self._open()
            assert self._connection is not None
            if hasattr(channel, "confirm_select"):
                with suppress(TimeoutError):
                    self._connection.drain_events(timeout=0.001)
        except CONNECTION_ERRORS:
            self._leave()
            self._open()

    def _open(self) -> Any:
        self._unconfirmed.clear()
        if self._channel is None:
            self._connection = connect(self._url)
            self._connection.connect()
            apply_socket_limits(self._connection)
            self._channel = self._connection.channel()
            self._published = 0
            if hasattr(self._channel, "confirm_select"):  # the in-memory transport has no confirms
                self._channel.confirm_select()
                self._channel.events["basic_ack"].add(self._on_ack)
                self._channel.events["basic_nack"].add(self._on_nack)
                self._channel.events["basic_return"].add(self._on_return)
        return self._channel

    def _send(self, channel: Any, message: Message, mandatory: bool = True) -> None:
        try:
            prepared = channel.prepare_message(
                message.body,
                content_type=message.content_type,
                content_encoding="utf-8",
                headers=message.headers,
                properties={"delivery_mode": 2, **message.properties},
            )
            channel.basic_publish(
                prepared, exchange=message.exchange, routing_key=message.routing_key, mandatory=mandatory
            )
        except (ValueError, TypeError, struct.error, FrameSyntaxError) as error:
            raise _Unsendable(message.key, f"can't be sent ({type(error).__name__})") from None
        if hasattr(channel, "confirm_select"):
            self._published += 1
            self._unconfirmed[self._published] = message
        else:
            self.confirmed.add(message.key)

    def _wait(self, deadline: float) -> None:
        while self._unconfirmed:
            assert self._connection is not None
            try:
                self._connection.drain_events(timeout=max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                _silent.add(self._url)
                raise

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self.confirmed.update(each.key for each in self._pop(tag, multiple) if each.key not in self.refused)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        for message in self._pop(tag, multiple):
            self.refused.setdefault(message.key, REFUSED)

    def _pop(self, tag: int, multiple: bool) -> list[Message]:
        tags = list(takewhile(lambda unconfirmed: unconfirmed <= tag, self._unconfirmed)) if multiple else [tag]
        return [self._unconfirmed.pop(each) for each in tags if each in self._unconfirmed]

    def _on_return(self, _error: Exception, _exchange: str, routing_key: str, returned: Any) -> None:
        """An unroutable message is returned before its ack, and recognized by its body."""
        body = returned.body if isinstance(returned.body, bytes) else str(returned.body).encode()
        for message in self._unconfirmed.values():
            if message.body == body and message.routing_key == routing_key and message.key not in self.refused:
                self.refused[message.key] = UNROUTABLE
                self._unroutable.add(message.key)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _leave(self) -> None:
        """Closes a connection that was lost. The next publish tries another host first."""
        if isinstance(self._connection, AnyHost):
            self._connection.try_last()
        self.close()

    def close(self) -> None:
        """Closes the connection. The next publish opens a new one."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            connection.collect(socket_timeout=1)

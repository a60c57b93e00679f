"""Publishes messages with publisher confirms."""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Self

from kombu import Connection

from worker.messaging.broker import CONNECTION_ERRORS, apply_socket_limits, connect
from worker.observability import tracing

CONFIRM_TIMEOUT = 10.0  # seconds


class NotTaken(OSError):
    """The broker refused a message, or no queue is bound for it. A later try may succeed."""


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


class Publisher:
    """Publishes persistent messages, many at a time, and waits for the broker's confirms.

    Confirms are matched by delivery tag. After any error the connection is discarded: a late confirm would be taken for
    another message's. Not thread-safe: each thread has its own.
    """

    def __init__(self, url: str, confirm_timeout: float = CONFIRM_TIMEOUT) -> None:
        """confirm_timeout: seconds for the confirms of all messages of one call."""
        self._url = url
        self._confirm_timeout = confirm_timeout
        self._connection: Connection | None = None
        self._channel: Any = None
        self._unconfirmed: dict[int, Message] = {}
        self._refused: set[Any] = set()
        self._published = 0

    def publish(self, messages: Iterable[Message]) -> set[Any]:
        """Publishes all messages. Returns the keys of those that the broker confirmed.

        The broker refused the others, or no queue is bound for them. Raises the connection's error (see
        broker.is_away) where the broker can't be reached or does not confirm in time; it may then have any of them.
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

    def publish_one(self, message: Message) -> None:
        """As publish(). Raises NotTaken where the broker does not take the message."""
        if not self.publish([message]):
            raise NotTaken

    def ensure_connection(self) -> None:
        """Connects if there is no connection or it is lost. Raises the connection's error."""
        try:
            channel = self._open()
            assert self._connection is not None
            if hasattr(channel, "confirm_select"):
                with suppress(TimeoutError):
                    self._connection.drain_events(timeout=0.001)
        except CONNECTION_ERRORS:
            self.close()
            self._open()

    def _open(self) -> Any:
        self._unconfirmed.clear()
        self._refused.clear()
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
        self._pop_confirmed(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused.update(message.key for message in self._pop_confirmed(tag, multiple))

    def _pop_confirmed(self, tag: int, multiple: bool) -> list[Message]:
        tags = list(takewhile(lambda unconfirmed: unconfirmed <= tag, self._unconfirmed)) if multiple else [tag]
        return [self._unconfirmed.pop(each) for each in tags if each in self._unconfirmed]

    def _on_return(self, _error: Exception, _exchange: str, routing_key: str, returned: Any) -> None:
        """An unroutable message is returned before its ack, and recognized by its body."""
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
        """Closes the connection. The next publish opens a new one."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            connection.collect(socket_timeout=1)

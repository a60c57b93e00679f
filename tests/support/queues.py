"""Publishes messages to queues and reads them, without a worker."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from worker.messaging import broker
from worker.messaging.publisher import Message, Publisher
from worker.messaging.topology import DEAD_LETTERS


def dead_letter(key: int, content: bytes, code: str = "invalid-job", **properties: Any) -> Message:
    headers = {
        "x-dead-letter-code": code,
        "x-dead-letter-detail": "policyholder.email: must be an e-mail address",
        "x-dead-letter-at": datetime(2026, 1, 31, 12, 0, key % 60, tzinfo=UTC).isoformat(timespec="seconds"),
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    return Message(key, content, "", DEAD_LETTERS, properties=properties, headers=headers)


def put(url: str, dead_letters: Iterable[Message]) -> None:
    dead_letters = list(dead_letters)
    with Publisher(url) as publisher:
        assert len(publisher.publish(dead_letters)) == len(dead_letters)


def drain(url: str, queue: str) -> list[Any]:
    """Removes all messages of a queue. Returns them in order."""
    with broker.connect(url) as connection:
        channel = connection.channel()
        messages = []
        while message := channel.basic_get(queue, no_ack=True):
            messages.append(message)
        channel.close()
    return messages


def length(url: str, queue: str) -> int:
    with broker.connect(url) as connection:
        return int(connection.channel().queue_declare(queue, passive=True).message_count)


def as_bytes(body: str | bytes) -> bytes:
    return body.encode() if isinstance(body, str) else body

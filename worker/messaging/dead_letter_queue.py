"""Dead letters: jobs that could not be accepted. People list them, put them back on the jobs queue, or drop them.

A letter is taken without acknowledging it, its copy is published with confirms, and then it is acknowledged. What is
interrupted goes back to its queue: a job may arrive twice, which is harmless, and is never lost.

Letters are consumed, not fetched one by one with basic.get. RabbitMQ 3.10 requeues fetched messages in no order, those
of a consumer in their original order, and consuming is forty times as quick.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Self

from models.job import DEAD_LETTER_CODES
from worker.errors import BrokerError
from worker.formatting import printable
from worker.messaging import broker
from worker.messaging.properties import ids_of_message, valid_text
from worker.messaging.publisher import Message, Publisher
from worker.messaging.topology import DEAD_LETTERS, JOBS, confirm_offer

MAX_PREFETCH = 65_535  # the AMQP field has 16 bits
DELIVERY_TIMEOUT = 2.0  # seconds without a letter, after which the queue is asked whether it holds more
REQUEUE_TIMEOUT = 2.0  # seconds in which RabbitMQ requeues what was not acknowledged
MAX_DETAIL = 2000  # characters


@dataclass(frozen=True)
class DeadLetter:
    """A letter that is held unacknowledged.

    tag: the broker's delivery tag; code, detail: why it is a dead letter; at: since when, None where that is unknown;
    properties: the valid ids of the job's message.
    """

    tag: int
    body: bytes
    code: str
    detail: str
    at: datetime | None
    properties: dict[str, str]
    traceparent: str | None


class DeadLetterQueue:
    """Holds, in their order, the letters that are in the queue at the start, until they are acknowledged.

    Letters that arrive later are not yielded: one that is replayed and fails again comes back as a new one. On leaving,
    letters that were not acknowledged go back to their place. Not thread-safe.
    """

    def __init__(self, url: str, max_held: int = MAX_PREFETCH) -> None:
        """max_held: letters held at once. They are read as they are asked for, however slowly."""
        self._connection = broker.connect(url)
        self._max_held = max_held
        self._channel: Any = None
        self._consumer: str | None = None
        self._received: deque[DeadLetter] = deque()
        self._acknowledged = 0

    def __enter__(self) -> Self:
        """Raises the connection's error, or BrokerError where the broker is none with dead letters (memory:)."""
        try:
            self._connection.connect()
            self._channel = self._connection.channel()
            if not hasattr(self._channel, "basic_qos") or self._connection.transport.driver_type != "amqp":
                raise BrokerError("this broker keeps no dead letters; BROKER_URL should begin with amqp: or amqps:")
            self._channel.auto_decode = False  # the body unchanged, whatever encoding its headers name
            self.message_count = self._count_messages()
            self.held_count = min(self.message_count, self._max_held)
            if self.held_count:
                self._channel.basic_qos(0, self.held_count, False)
                self._consumer = self._channel.basic_consume(DEAD_LETTERS, callback=self._on_message)
        except BaseException:
            self._connection.collect(socket_timeout=1)
            raise
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                self.stop_consuming()
                self._channel.close()  # the answer means that all acknowledgements have arrived
                self._wait_for_requeue()
        finally:
            self._connection.collect(socket_timeout=1)

    def _wait_for_requeue(self) -> None:
        """RabbitMQ requeues after it has answered. Until then, the next command would find the queue empty."""
        self._channel, ends_at = self._connection.channel(), time.monotonic() + REQUEUE_TIMEOUT
        while time.monotonic() < ends_at and (left := self.held_count - self._acknowledged):
            if self._count_messages() >= left:
                return
            time.sleep(0.01)

    def __iter__(self) -> Iterator[DeadLetter]:
        for _ in range(self.held_count):
            while not self._received:
                try:
                    self._connection.drain_events(timeout=DELIVERY_TIMEOUT)
                except TimeoutError:
                    if not self._count_messages() and not self._received:  # somebody else has taken them
                        return
            yield self._received.popleft()

    def _count_messages(self) -> int:
        return int(self._channel.queue_declare(DEAD_LETTERS, passive=True).message_count)

    def _on_message(self, message: Any) -> None:
        if self._consumer is not None:
            self._received.append(_dead_letter(message))

    def stop_consuming(self) -> None:
        """Ends the deliveries. Letters that were yielded stay held."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            self._channel.basic_cancel(consumer)
        self._received.clear()

    def ack(self, letters: Iterable[DeadLetter]) -> None:
        """Removes letters from the queue for good."""
        for letter in letters:
            self._channel.basic_ack(letter.tag)
            self._acknowledged += 1

    def ensure_still_held(self) -> None:
        """Raises the connection's error where the broker has taken the letters back, which it does after 30 minutes.

        Source: consumer_timeout of RabbitMQ.
        """
        self._count_messages()


def _dead_letter(message: Any) -> DeadLetter:
    headers = message.headers if isinstance(message.headers, dict) else {}
    code, detail, at = _reason(headers)
    body = message.body if isinstance(message.body, bytes) else str(message.body or "").encode()
    traceparent = valid_text(headers.get("traceparent"))
    return DeadLetter(message.delivery_tag, body, code, detail, at, ids_of_message(message.properties), traceparent)


def _reason(headers: dict[str, Any]) -> tuple[str, str, datetime | None]:
    """Code, detail and time.

    A letter that RabbitMQ itself gave up (it has ``x-death``) has no code of ours, or a publisher's.
    """
    code, deaths = headers.get("x-dead-letter-code"), headers.get("x-death")
    if isinstance(code, str) and code in DEAD_LETTER_CODES and not deaths:
        detail = valid_text(headers.get("x-dead-letter-detail"), MAX_DETAIL) or "-"
        return code, printable(detail), _dead_lettered_at(headers)
    reason = valid_text(headers.get("x-first-death-reason"))
    first = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}
    time = first.get("time")
    at = time.replace(tzinfo=time.tzinfo or UTC) if isinstance(time, datetime) else None
    return "poison", f"RabbitMQ gave it up ({printable(reason)})" if reason else "it bears no reason", at


def _dead_lettered_at(headers: dict[str, Any]) -> datetime | None:
    try:
        at = datetime.fromisoformat(str(headers.get("x-dead-letter-at")))
        return at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def select_letters(letters: Iterable[DeadLetter], code: str | None, limit: int | None) -> Iterator[DeadLetter]:
    """The first ``limit`` letters of a code; None: of any code, or without a limit."""
    return islice((letter for letter in letters if code in (None, letter.code)), limit)


def job_message(letter: DeadLetter, body: bytes | None = None) -> Message:
    """The job's message as it was before it became a dead letter. body: replaces the letter's own."""
    return Message(
        key=letter.tag,
        body=letter.body if body is None else body,
        exchange=confirm_offer.name,
        routing_key=JOBS,
        properties=dict(letter.properties),
        headers={"traceparent": letter.traceparent} if letter.traceparent else {},
    )


def replay(letters: DeadLetterQueue, batch: list[DeadLetter], publisher: Publisher) -> int:
    """Puts a batch back on the jobs queue. Returns how many the broker took; the others stay dead letters."""
    taken = publisher.publish(job_message(letter) for letter in batch)
    letters.ack(letter for letter in batch if letter.tag in taken)
    return len(taken)

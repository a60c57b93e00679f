"""Dead letters: jobs that could not be accepted, looked at, put back on the jobs queue, or dropped.

A letter is taken without acknowledging it, its copy is published with confirms, and only then is it acknowledged: what
is interrupted, however, goes back to its queue. So a letter may come twice, which is harmless, and is never lost.

They are consumed, not fetched one by one with basic.get: letters that were fetched go back in no order at all (RabbitMQ
3.10), those of a consumer in the order in which they came, and it is forty times as quick.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Self

from worker.errors import BrokerError
from worker.formatting import printable
from worker.messaging import broker
from worker.messaging.publisher import Message, Publisher
from worker.messaging.topology import DEAD_LETTERS, JOBS, confirm_offer

DEAD_LETTER_CODES = ("invalid-json", "invalid-job", "too-large", "conflicting-job", "poison")
AT_ONCE = 65_535  # the most that a consumer can hold
BATCH = 500  # letters
BATCH_BYTES = 8 * 1024 * 1024
STILL_FOR = 2.0  # seconds without a letter after which the queue is asked whether it has more
BACK_WITHIN = 2.0  # seconds in which RabbitMQ has put back what was held


@dataclass(frozen=True)
class DeadLetter:
    """A letter that is held. tag: the broker's name for it; detail: what was wrong; at: since when it is one."""

    tag: int
    body: bytes
    code: str
    detail: str
    at: datetime | None
    properties: dict[str, str]
    traceparent: str | None


class DeadLetterQueue:
    """Holds the letters that stood in the queue at the start, in their order, until they are settled.

    Letters that come later are not given: one that is replayed and fails again comes back as a new one. On leaving,
    what was not settled goes back to its place. Not for threads.
    """

    def __init__(self, url: str, most: int = AT_ONCE) -> None:
        """most: letters to be held at once. They are read when they are asked for, whatever time lies between."""
        self._connection = broker.connect(url)
        self._connection.heartbeat = 0  # a person in an editor does not answer it
        self._most = most
        self._channel: Any = None
        self._consumer: str | None = None
        self._waiting: deque[DeadLetter] = deque()
        self._settled = 0

    def __enter__(self) -> Self:
        try:
            self._connection.connect()
            self._channel = self._connection.channel()
            if not hasattr(self._channel, "basic_qos") or self._connection.transport.driver_type != "amqp":
                raise BrokerError("this broker keeps no dead letters; BROKER_URL should begin with amqp: or amqps:")
            self._channel.auto_decode = False  # bodies as they came, whatever encoding they claim
            self.standing = int(self._channel.queue_declare(DEAD_LETTERS, passive=True).message_count)
            self.held_count = min(self.standing, self._most)
            if self.held_count:
                self._channel.basic_qos(0, self.held_count, False)
                self._consumer = self._channel.basic_consume(DEAD_LETTERS, callback=self._on_letter)
        except BaseException:
            self._connection.collect(socket_timeout=1)
            raise
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                self.stop_consuming()
                self._channel.close()  # the answer tells that all acknowledgements have arrived
                self._see_the_others_back()
        finally:
            self._connection.collect(socket_timeout=1)

    def _see_the_others_back(self) -> None:
        """RabbitMQ puts them back after it has answered; who comes next would find the queue empty until then."""
        channel, ends_at = self._connection.channel(), time.monotonic() + BACK_WITHIN
        while time.monotonic() < ends_at and (left := self.held_count - self._settled):
            if channel.queue_declare(DEAD_LETTERS, passive=True).message_count >= left:
                return
            time.sleep(0.01)

    def __iter__(self) -> Iterator[DeadLetter]:
        for _ in range(self.held_count):
            while not self._waiting:
                try:
                    self._connection.drain_events(timeout=STILL_FOR)
                except TimeoutError:
                    if not self._more_stand():  # somebody else has taken them
                        return
            yield self._waiting.popleft()

    def _more_stand(self) -> bool:
        return bool(self._channel.queue_declare(DEAD_LETTERS, passive=True).message_count or self._waiting)

    def _on_letter(self, message: Any) -> None:
        if self._consumer is not None:
            self._waiting.append(_letter(message))

    def stop_consuming(self) -> None:
        """No letter comes any more; those that are held stay so."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            self._channel.basic_cancel(consumer)
        self._waiting.clear()

    def ack(self, letters: Iterable[DeadLetter]) -> None:
        """Removes letters from the queue for good."""
        for letter in letters:
            self._channel.basic_ack(letter.tag)
            self._settled += 1

    def ensure_still_held(self) -> None:
        """Raises the connection's error where the broker has taken the letters back (it does so after half an hour)."""
        self._channel.queue_declare(DEAD_LETTERS, passive=True)


def _letter(message: Any) -> DeadLetter:
    properties, headers = message.properties, message.headers
    headers = headers if isinstance(headers, dict) else {}
    code, detail, at = _why(headers)
    kept = {name: value for name in ("message_id", "correlation_id") if (value := _text(properties.get(name)))}
    body = message.body if isinstance(message.body, bytes) else str(message.body or "").encode()
    return DeadLetter(message.delivery_tag, body, code, detail, at, kept, _text(headers.get("traceparent")))


def _why(headers: dict[str, Any]) -> tuple[str, str, datetime | None]:
    """Code, detail and time. Those that RabbitMQ itself gave up bear no code of ours, or one of their publisher's."""
    code, deaths = headers.get("x-dead-letter-code"), headers.get("x-death")
    if isinstance(code, str) and code in DEAD_LETTER_CODES and not deaths:
        return code, printable(_text(headers.get("x-dead-letter-detail"), 2000) or "-"), _moment(headers)
    reason = _text(headers.get("x-first-death-reason"))
    first = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}
    time = first.get("time")
    at = time.replace(tzinfo=time.tzinfo or UTC) if isinstance(time, datetime) else None
    return "poison", f"RabbitMQ gave it up ({printable(reason)})" if reason else "it bears no reason", at


def _moment(headers: dict[str, Any]) -> datetime | None:
    try:
        at = datetime.fromisoformat(str(headers.get("x-dead-letter-at")))
        return at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _text(value: Any, most: int = 255) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= most and "\x00" not in value else None


def select_letters(letters: Iterable[DeadLetter], code: str | None, limit: int | None) -> Iterator[DeadLetter]:
    """The letters of a code, or all, up to a number."""
    return islice((letter for letter in letters if code in (None, letter.code)), limit)


def in_batches(letters: Iterable[DeadLetter]) -> Iterator[list[DeadLetter]]:
    """Batches that bound what is held in memory."""
    batch: list[DeadLetter] = []
    size = 0
    for letter in letters:
        batch.append(letter)
        size += len(letter.body)
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def job_message(letter: DeadLetter, body: bytes | None = None) -> Message:
    """The job that a letter was, without what made it a letter. body: in place of the letter's own."""
    return Message(
        key=letter.tag,
        body=letter.body if body is None else body,
        exchange=confirm_offer.name,
        routing_key=JOBS,
        properties=dict(letter.properties),
        headers={"traceparent": letter.traceparent} if letter.traceparent else {},
    )


def replay(letters: DeadLetterQueue, batch: list[DeadLetter], publisher: Publisher) -> int:
    """Puts a batch back on the jobs queue. Returns how many the broker took; the others stay letters."""
    taken = publisher.publish(job_message(letter) for letter in batch)
    letters.ack(letter for letter in batch if letter.tag in taken)
    return len(taken)

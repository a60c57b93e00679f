"""Bodies that are too large for a job: a worker keeps one at a time in memory.

RabbitMQ sends as many messages as prefetch allows, whatever their sizes. Of a second large body nothing is kept: the
message waits unacknowledged, and goes back to the head of its queue when the first has ended, to be delivered again.
To read no more meanwhile would not do: RabbitMQ then has them in its memory, and may block who publishes dead letters.
"""

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any

from amqp import method_framing, spec
from amqp.basic_message import Message

from models.job import MAX_BYTES


class LargeBodies:
    """Which message with a large body is kept, and those that wait for its end."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._arriving = False  # the kept body is not complete yet
        self._in_hand = False  # a task has it
        self._waiting: deque[Callable[[], Any]] = deque()

    def may_keep(self) -> bool:
        """A large body begins to arrive. Returns whether it is kept."""
        with self._lock:
            if self._arriving or self._in_hand:
                return False
            self._arriving = True
            return True

    def came(self) -> None:
        """The kept body is complete, and goes to its task."""
        with self._lock:
            self._arriving, self._in_hand = False, True

    def wait(self, put_back: Callable[[], Any]) -> None:
        """A message whose body was not kept has come. put_back: returns it to its queue."""
        with self._lock:
            if self._arriving or self._in_hand:
                self._waiting.append(put_back)
                return
        put_back()

    def ended(self) -> None:
        """The task of the kept body has ended."""
        with self._lock:
            self._in_hand = False
            put_back = self._waiting.popleft() if self._waiting else None
        if put_back is not None:
            put_back()

    def connection_lost(self) -> None:
        """RabbitMQ delivers all messages again. A task that has one goes on."""
        with self._lock:
            self._arriving = False
            self._waiting.clear()


large_bodies = LargeBodies()


def is_large(size: int) -> bool:
    """size: of a body, in bytes."""
    return size > MAX_BYTES


class _BoundedMessage(Message):  # type: ignore[misc]
    """A message of py-amqp. ``is_dropped``: its body was not kept, and it has none."""

    is_dropped: bool | None = None  # None: not decided yet
    body: Any
    body_received: int

    def inbound_body(self, buf: bytes) -> None:
        if self.frame_method != spec.Basic.Deliver or not is_large(self.body_size):  # the first: to a consumer
            super().inbound_body(buf)
            return
        if self.is_dropped is None:
            self.is_dropped = not large_bodies.may_keep()
            self.body = b"" if self.is_dropped else bytearray(self.body_size)  # joined from frames, it would need twice
        end = self.body_received + len(buf)
        if not self.is_dropped:
            self.body[self.body_received : end] = buf
        self.body_received = end
        self.ready = end == self.body_size


method_framing.Message = _BoundedMessage

"""A checkout and a consumer, as others would write them: on any node, with confirms, and never giving up."""

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import amqp
from amqp.exceptions import MessageNacked

from tests.cluster.checker import Job, Received
from tests.support.system import job
from worker.messaging import topology

EVENTS = "cluster-test.events"
PARTNERS = 20  # XONE lists bookings by partner, and each read-back reads the whole list
# One in ten is refused at first, and one in ten is booked, but without an answer. All are confirmed in the end.
SUFFIXES = ("", "", "", "~drop-after~1", "", "", "", "", "~http-503~1", "")


class _Client:
    """A channel to one of several nodes: to the next one after each error."""

    def __init__(self, ports: Sequence[int], **options: Any) -> None:
        self._ports = itertools.cycle(ports)
        self._options = {"connect_timeout": 2, "read_timeout": 5, "write_timeout": 5, **options}
        self._connection: amqp.Connection | None = None
        self._channel: amqp.Channel | None = None

    def attempt(self, use: Callable[[amqp.Channel], None]) -> bool:
        """Returns whether it succeeded, or the broker was away or refused: the caller then tries again."""
        try:
            if self._channel is None:
                self._connection = amqp.Connection(f"127.0.0.1:{next(self._ports)}", **self._options)
                self._connection.connect()
                self._channel = self._connection.channel()
            use(self._channel)
        except (OSError, amqp.AMQPError, MessageNacked):
            self.close()
            time.sleep(0.2)
            return False
        return True

    def close(self) -> None:
        if self._connection is not None:
            self._connection.collect()
        self._connection = self._channel = None


class _Thread(threading.Thread):
    """Runs ``work`` until ``is_over``. What it raises, ``join`` raises."""

    def __init__(self) -> None:
        super().__init__(name=type(self).__name__, daemon=True)
        self.is_over = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self._error = error

    def work(self) -> None:
        raise NotImplementedError

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self._error is not None:
            raise self._error


class Checkout(_Thread):
    """Publishes jobs at a rate a second, each again until the broker has confirmed it."""

    def __init__(self, ports: Sequence[int], prefix: str, rate: float) -> None:
        super().__init__()
        self.prefix, self.rate = prefix, rate
        self.jobs: list[Job] = []
        self._client = _Client(ports, confirm_publish=True)
        self._give_up_at = math.inf

    def work(self) -> None:
        started = time.monotonic()
        for number in itertools.count():
            if self.is_over.wait(max(0.0, started + number / self.rate - time.monotonic())):
                break
            self._publish(number)
        self._client.close()

    def _publish(self, number: int) -> None:
        offer = f"{self.prefix}{number}{SUFFIXES[number % len(SUFFIXES)]}"
        body = json.dumps(job(offer, partner_id=f"P-{number % PARTNERS}"))
        message = amqp.Message(body, content_type="application/json", delivery_mode=2)
        began, tries, is_confirmed = time.monotonic(), 0, False

        def publish(channel: amqp.Channel) -> None:
            nonlocal tries
            tries += 1
            channel.basic_publish(message, topology.confirm_offer.name, topology.JOBS, mandatory=True)

        while not is_confirmed and time.monotonic() < self._give_up_at:
            is_confirmed = self._client.attempt(publish)
        self.jobs.append(Job(offer, began, time.monotonic() if is_confirmed else None, max(tries, 1)))

    def stop(self, seconds: float = 60.0) -> None:
        """Publishes what is under way, for so many seconds at most."""
        self._give_up_at = time.monotonic() + seconds
        self.is_over.set()
        self.join()


class Consumer(_Thread):
    """Receives all events, and acknowledges each after it is noted."""

    def __init__(self, ports: Sequence[int], note: Callable[[Received], None]) -> None:
        super().__init__()
        self._client = _Client(ports)
        self._note = note

    def work(self) -> None:
        while not self.is_over.wait(0.05):
            self._client.attempt(self._receive)
        self._client.close()

    def _receive(self, channel: amqp.Channel) -> None:
        while message := channel.basic_get(EVENTS):
            self._note(_received(json.loads(message.body)))
            channel.basic_ack(message.delivery_tag)

    def stop(self) -> None:
        self.is_over.set()
        self.join()


def _received(event: dict[str, Any]) -> Received:
    data = event["data"]
    booking = data["booking"]["id"] if "booking" in data else None
    return Received(event["id"], data["offer_id"], event["type"], data["sequence"], booking, time.monotonic())

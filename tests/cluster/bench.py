"""The cluster with load on it: what runs, what fails, and what was seen meanwhile."""

import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self
from uuid import UUID

from cryptography.fernet import Fernet
from kombu import Queue
from sqlalchemy import Engine, func, select

from models.tables import Booking, Confirmation, OutboxEvent
from tests.cluster.checker import Call, Histories, Received, Row
from tests.cluster.clients import EVENTS, Checkout, Consumer
from tests.cluster.servers import DATABASE, BrokerCluster, DatabasePair, Worker
from tests.support.servers import free_port
from tests.support.system import until
from worker.messaging import broker, topology
from worker.sandbox.server import Sandbox
from worker.storage import database, migrator

SETTINGS = {
    "XONE_TIMEOUT": "5",  # a lease is 10 s
    "RETRY_BASE_DELAY": "0.2",
    "RETRY_MAX_DELAY": "2",
    "RETRY_MAX_ATTEMPTS": "100",
    "WORKER_CONCURRENCY": "16",
    "LOG_FORMAT": "json",
    "PYTHONWARNINGS": "ignore",  # Celery warns of running as root
}
WORKERS = 2
FLOWING = 10  # events that must have come before a fault
SETTLE = 180.0  # seconds after a fault within which all must have ended
QUIET = 5.0  # seconds without a change after which jobs whose rows are lost are not waited for


class Bench:
    """Three nodes, two databases, XONE's stand-in and the workers. ``with Bench(folder) as bench``."""

    def __init__(self, folder: Path, workers: int = WORKERS) -> None:
        self.folder = folder
        self.cluster = BrokerCluster(folder / "rabbitmq")
        self.databases = DatabasePair(folder / "postgresql")
        self.sandbox = Sandbox(port=free_port(), latency=0.05)
        self.sandbox.latency_jitter = 0.15
        self.events: list[Received] = []
        self.workers: list[Worker] = []
        self.held: set[str] = set()  # offers that a fault holds up on purpose
        self._incidents: list[str] = []
        self._read: Counter[Path] = Counter()  # characters of each log that were looked at
        self.environment = {
            **SETTINGS,
            "BROKER_URL": self.cluster.url,
            "DATABASE_URL": self.databases.url,
            "DATA_KEYS": Fernet.generate_key().decode(),
            "XONE_CLIENT_ID": self.sandbox.client_id,
            "XONE_CLIENT_SECRET": self.sandbox.client_secret,
            "XONE_BASE_URL": self.sandbox.url,
        }
        self._places = workers
        self._started = self._loads = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for part in (self.cluster, self.databases):
                stack.callback(part.close)
                part.start()
            stack.enter_context(self.sandbox)
            with self._engine() as engine:
                migrator.upgrade(engine)
            with broker.connect(f"amqp://guest:guest@127.0.0.1:{self.cluster.ports[0]}//") as connection:
                topology.declare(connection)
                Queue(EVENTS, topology.booking_events, "#", queue_arguments={"x-queue-type": "quorum"})(
                    connection.channel()
                ).declare()
            self.cluster.flush()
            stack.callback(self._kill_workers)
            self.workers = [self.start_worker() for _ in range(self._places)]
            consumer = Consumer(self.cluster.ports, self.events.append)
            consumer.start()
            stack.callback(consumer.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        """The database that is the primary now."""
        engine = database.connect(self.databases.primary.url(DATABASE))
        try:
            yield engine
        finally:
            engine.dispose()

    # --- Workers ---

    def start_worker(self, clock: float = 0.0, **settings: str) -> Worker:
        self._started += 1
        worker = Worker(self.folder / f"worker-{self._started}", {**self.environment, **settings}, clock)
        worker.start()
        return worker

    def _kill_workers(self) -> None:
        for worker in self.workers:
            worker.kill()

    def replace_worker(self, place: int, clock: float = 0.0, **settings: str) -> None:
        """Ends the worker of a place, if it lives, by a warm shutdown. Starts another one in its place."""
        if self.workers[place].processes and (code := self.workers[place].stop()) != 0:
            self._incidents.append(f"{self.workers[place].folder.name} ended with exit code {code} after SIGTERM")
        self.workers[place] = self.start_worker(clock, **settings)

    def reconcile(self) -> None:
        """Takes in the bookings of the last hour that XONE has and the database lost."""
        command = [sys.executable, "-m", "worker", "reconcile", "--since", "1h", "--yes", "--json"]
        done = subprocess.run(command, env={**os.environ, **self.environment}, cwd="/", capture_output=True, text=True)
        if done.returncode != 0:
            self._incidents.append(f"reconcile ended with exit code {done.returncode}: {done.stdout}{done.stderr}")

    # --- What is seen ---

    @contextmanager
    def load(self, rate: float) -> Iterator[Checkout]:
        """Publishes jobs meanwhile, so many a second. The first events have come when the block is entered."""
        self._loads += 1
        checkout = Checkout(self.cluster.ports, f"load-{self._loads}-", rate)
        checkout.start()
        try:
            until(lambda: sum(event.offer.startswith(checkout.prefix) for event in self.events) >= FLOWING, seconds=120)
            yield checkout
        finally:
            checkout.stop()

    def settle(self, checkout: Checkout, seconds: float = SETTLE) -> bool:
        """Waits until all jobs have ended and all events have come. Returns False where that takes too long.

        Once what is left does not change any more, there is nothing to wait for: rows are lost.
        """
        ends_at = time.monotonic() + seconds
        left, changed_at = -1, time.monotonic()
        while time.monotonic() < ends_at:
            seen = self.histories(checkout)
            before, left = left, len(seen.lost) + self._unpublished()
            if left == 0:
                return True
            if left != before:
                changed_at = time.monotonic()
            missing_rows = all(offer not in seen.row_of for offer in seen.lost) and not self._unpublished()
            if missing_rows and time.monotonic() > changed_at + QUIET and not self._waiting_messages():
                return True
            time.sleep(0.5)
        return False

    def _unpublished(self) -> int:
        with self._engine() as engine, engine.connect() as connection:
            query = select(func.count()).where(OutboxEvent.published_at.is_(None))
            return int(connection.execute(query).scalar_one())

    def _waiting_messages(self) -> int:
        """Messages in the queues that workers consume, whether they have them in hand or not."""
        table = self.cluster.nodes[0].ctl("list_queues", "--no-table-headers", "name", "messages")
        counts = dict(line.split("\t") for line in table.splitlines())
        return sum(int(counts[queue]) for queue in (topology.JOBS, topology.RESUME, EVENTS))

    def histories(self, checkout: Checkout) -> Histories:
        """All that was seen of a load."""
        prefix = checkout.prefix
        with self.sandbox.lock:
            calls = [
                Call(each.offer_id, each.idempotency_key, each.started, each.ended, each.status)
                for each in self.sandbox.calls
                if each.offer_id.startswith(prefix)
            ]
            bookings = [(offer, booking["id"]) for (_, offer), booking in self.sandbox.bookings.items()]
            in_flight_twice = frozenset(offer for _, offer in self.sandbox.overlapping)
        return Histories(
            jobs=tuple(checkout.jobs),
            calls=tuple(calls),
            bookings=tuple(bookings),
            in_flight_twice=in_flight_twice,
            rows=self._rows(prefix),
            events=tuple(self.events),
            held=frozenset(self.held),
        ).of(prefix)

    def _rows(self, prefix: str) -> tuple[Row, ...]:
        of_load = Confirmation.offer_id.startswith(prefix, autoescape=True)
        query = select(Confirmation.id, Confirmation.offer_id, Confirmation.state, Booking.id.label("booking"))
        query = query.outerjoin(Booking, Booking.confirmation_id == Confirmation.id).where(of_load)
        outbox = select(OutboxEvent.confirmation_id, OutboxEvent.sequence).order_by(OutboxEvent.sequence)
        outbox = outbox.join(Confirmation, Confirmation.id == OutboxEvent.confirmation_id).where(of_load)
        sequences: dict[UUID, list[int]] = defaultdict(list)
        with self._engine() as engine, engine.connect() as connection:
            for event in connection.execute(outbox):
                sequences[event.confirmation_id].append(event.sequence)
            return tuple(
                Row(each.offer_id, str(each.state), each.booking, tuple(sequences[each.id]))
                for each in connection.execute(query)
            )

    def dead_letters(self) -> tuple[str, ...]:
        """Removes the dead letters. Returns the offers in them, each with its code."""
        letters = []
        with broker.connect(f"amqp://guest:guest@127.0.0.1:{self.cluster.ports[0]}//") as connection:
            channel = connection.channel()
            while message := channel.basic_get(topology.DEAD_LETTERS, no_ack=True):
                letters.append(f"{json.loads(message.body)['offer_id']}: {message.headers['x-dead-letter-code']}")
        return tuple(letters)

    def incidents(self) -> tuple[str, ...]:
        """What must not happen at all, since the last call: workers that ended by themselves, defects in their logs."""
        incidents, self._incidents = self._incidents, []
        for worker in self.workers:
            if (code := worker.ended_by_itself) is not None:
                incidents.append(f"{worker.folder.name} ended by itself with exit code {code}")
        for log in sorted(self.folder.glob("worker-*/server.log")):
            new = log.read_text(errors="replace")[self._read[log] :]
            whole = new[: new.rfind("\n") + 1]
            self._read[log] += len(whole)
            incidents += [f"{log.parent.name}: {line}" for line in whole.splitlines() if _is_incident(line)]
        return tuple(incidents)


def _is_incident(line: str) -> bool:
    """Whether a line of a log reports a defect, or is not one of ours at all."""
    if not line.startswith("{"):
        return bool(line) and not line.startswith("worker: Warm shutdown")  # Celery's only line that is no JSON
    told = json.loads(line)
    return told.get("event") in ("defect", "second_booking") or told.get("level") == "critical"

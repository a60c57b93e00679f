"""The test rig of all benchmarks: private RabbitMQ and PostgreSQL, a cheap XONE, workers, a checkout, a consumer."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import amqp
import requests
from cryptography.fernet import Fernet
from kombu import Queue
from sqlalchemy import Engine

from tests.support.servers import PostgreSQL, RabbitMQ
from tests.support.system import PROJECT, WorkerProcess, job
from worker.messaging import broker, topology
from worker.storage import database, migrator

EVENTS = Queue("benchmark.events", topology.booking_events, routing_key="#", durable=True)
TICKS = os.sysconf("SC_CLK_TCK")
CLIENT = {"XONE_CLIENT_ID": "benchmark", "XONE_CLIENT_SECRET": "benchmark"}


class Rig:
    """A broker, a database with tables, and an XONE. latency: seconds until it answers a confirm."""

    def __init__(self, folder: Path, latency: float = 0.05) -> None:
        self.folder = folder
        self.rabbitmq = RabbitMQ(folder / "rabbitmq")
        self.postgresql = PostgreSQL(folder / "postgresql")
        self.latency = latency
        self.workers: list[WorkerProcess] = []
        self._upstreams: dict[float, tuple[subprocess.Popen[str], str]] = {}  # by latency, with its URL

    def __enter__(self) -> "Rig":
        self.rabbitmq.start()
        self.postgresql.start()
        self.postgresql.create_database("confirm_offer")
        self.postgresql.create_database("afternoon")
        self.afternoon_url = self.postgresql.url("afternoon")
        self.database_url = self.postgresql.url("confirm_offer")
        self.engine: Engine = database.connect(self.database_url)
        migrator.upgrade(self.engine)
        with broker.connect(self.rabbitmq.url) as connection:
            topology.declare(connection)
            EVENTS(connection.default_channel).declare()
        self.environment = {
            "BROKER_URL": self.rabbitmq.url,
            "DATABASE_URL": self.database_url,
            "XONE_BASE_URL": self.xone(self.latency),
            "DATA_KEYS": Fernet.generate_key().decode(),
            "PYTHONWARNINGS": "ignore",  # Celery warns of running as root
            **CLIENT,
        }
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        for upstream, _ in self._upstreams.values():
            upstream.kill()
            upstream.communicate()
        self.engine.dispose()
        self.rabbitmq.stop()
        self.postgresql.stop()

    def xone(self, latency: float) -> str:
        """The URL of an XONE with this latency in seconds; starts it at first use."""
        if latency not in self._upstreams:
            command = [sys.executable, "-m", "benchmarks.upstream", "--latency", str(latency)]
            upstream = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
            assert upstream.stdout is not None
            self._upstreams[latency] = upstream, upstream.stdout.readline().strip()
        return self._upstreams[latency][1]

    def start_worker(self, command: Iterable[str] = ("-m", "worker", "worker"), **settings: str) -> WorkerProcess:
        log = self.folder / f"worker-{len(self.workers) + 1}.log"
        self.workers.append(WorkerProcess({**self.environment, **settings}, log, command))
        return self.workers[-1]

    def connect(self) -> amqp.Connection:
        """A connection with confirms. Without them, RabbitMQ may lose what is published just before the close."""
        return amqp.Connection(f"127.0.0.1:{self.rabbitmq.port}", confirm_publish=True)

    def has_queue(self, name: str) -> bool:
        with self.connect() as connection:
            try:
                connection.channel().queue_declare(name, passive=True)
            except amqp.NotFound:
                return False
            return True

    def calls(self) -> dict[str, int]:
        """How many confirm calls XONE has received for each offer."""
        calls: dict[str, int] = requests.get(f"{self.xone(self.latency)}/calls", timeout=30).json()
        return calls

    @contextmanager
    def consumer(self) -> Iterator["Consumer"]:
        consumer = Consumer(self.rabbitmq)
        try:
            yield consumer
        finally:
            consumer.stop()


class Consumer:
    """Consumes all events, and records when the first event of each offer arrived."""

    def __init__(self, rabbitmq: RabbitMQ) -> None:
        self.arrived: dict[str, float] = {}  # time.time() by offer id
        self._stopping = Event()
        self._connection = amqp.Connection(f"127.0.0.1:{rabbitmq.port}")
        self._connection.connect()
        channel = self._connection.channel()
        channel.basic_qos(0, 500, False)
        channel.basic_consume(EVENTS.name, no_ack=True, callback=self._take)
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)
        self._connection.close()

    def _take(self, message: Any) -> None:
        now = time.time()
        self.arrived.setdefault(json.loads(message.body)["data"]["offer_id"], now)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._connection.drain_events(timeout=0.2)
            except TimeoutError:
                continue


class Checkout:
    """Publishes jobs with confirms, and records when each was published."""

    def __init__(self, rig: Rig) -> None:
        self.published: dict[str, float] = {}  # time.time() by offer id
        self._connection = rig.connect()
        self._connection.connect()
        self._channel = self._connection.channel()

    def publish(self, offers: Iterable[str]) -> None:
        for offer in offers:
            message = amqp.Message(
                json.dumps(job(offer)), content_type="application/json", content_encoding="utf-8", delivery_mode=2
            )
            self.published[offer] = time.time()
            self._channel.basic_publish(message, topology.confirm_offer.name, topology.JOBS)

    def publish_steadily(self, name: str, rate: float, is_running: Callable[[], bool]) -> None:
        """Publishes ``rate`` jobs per second while ``is_running()``."""
        started, number = time.monotonic(), 0
        while is_running():
            self.publish([f"{name}-{number}"])
            number += 1
            time.sleep(max(started + number / rate - time.monotonic(), 0.0))

    def close(self) -> None:
        self._connection.close()


def family(pid: int) -> list[int]:
    """The ids of a running process and of all its descendants."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return [pid, *(member for child in children for member in family(child))]


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process and its descendants have used."""
    fields = [Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split() for member in family(pid)]
    return sum(int(stat[11]) + int(stat[12]) for stat in fields) / TICKS


def memory_of(pid: int) -> float:
    """Resident memory, in MiB, of a process and its descendants."""
    sizes = [Path(f"/proc/{member}/status").read_text().partition("VmRSS:")[2].split() for member in family(pid)]
    return sum(int(words[0]) for words in sizes if words) / 1024  # a process that has just ended has none


def quantile(values: list[float], share: float) -> float:
    """share: 0.5 for the median."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

"""The system from outside: workers as subprocesses, jobs published like a checkout, events consumed like a consumer."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kombu import Connection, Producer, Queue
from sqlalchemy import Engine, func, select, text, update

from models.tables import Confirmation
from tests.support.messages import problems_of_event
from worker.messaging import topology
from worker.sandbox.server import Sandbox
from worker.storage import database
from worker.storage.database import now_plus

PROJECT = Path(__file__).parents[2]


def until(condition: Callable[[], Any], seconds: float = 30.0, every: float = 0.05) -> Any:
    """Waits until a condition is true, and returns its result. Fails after ``seconds``, far more than it needs."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        if result := condition():
            return result
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {condition.__name__}")


def cores_of(pid: int) -> set[frozenset[int]]:
    """The cores that each thread of a process may use."""
    cores = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):  # it has just ended
            cores.add(frozenset(os.sched_getaffinity(int(thread))))
    return cores


def terminal(command: list[str], environment: dict[str, str], folder: Path, answer: str) -> tuple[int, str]:
    """Runs a program on a terminal of 80 columns. Returns its exit code and output. answer: to its question."""
    our_end, program_end = pty.openpty()
    fcntl.ioctl(program_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    environment = {name: value for name, value in environment.items() if name != "COLUMNS"} | {"TERM": "xterm-256color"}
    program = subprocess.Popen(
        command, env=environment, cwd=folder, stdin=program_end, stdout=program_end, stderr=program_end
    )
    os.close(program_end)
    output = b""
    with suppress(OSError):  # the terminal closes when the program ends
        while part := os.read(our_end, 65536):
            output += part
            if output.endswith(b"[y/N]: "):
                os.write(our_end, answer.encode())
    os.close(our_end)
    return program.wait(30), output.decode()


def job(offer_id: str, **changes: Any) -> dict[str, Any]:
    """A job as a checkout publishes it."""
    return {
        "partner_id": "P-100",
        "offer_id": offer_id,
        "order_reference": f"SO-{offer_id.split('~')[0]}",
        "quotes": [{"id": f"quote-{offer_id.split('~')[0]}", "insured": [{"first_name": "Ada"}]}],
        "policyholder": {"first_name": "Ada", "last_name": "Lovelace", "country": "GB", "email": "ada@example.com"},
        "metadata": {"channel": "web"},
        **changes,
    }


class WorkerProcess:
    """``python -m worker worker`` as a subprocess that logs to a file. sources: the folder of its version."""

    def __init__(
        self,
        environment: dict[str, str],
        log: Path,
        command: Iterable[str] = ("-m", "worker", "worker"),
        sources: Path = PROJECT,
    ):
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command], env={**os.environ, **environment}, cwd=sources, stdout=output, stderr=output
            )

    def stop(self, seconds: float = 30.0) -> int:
        """Sends SIGTERM. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def logged(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


class System:
    """One broker, one database, one sandbox, and the workers of a test."""

    def __init__(
        self, broker_url: str, database_url: str, sandbox: Sandbox, environment: dict[str, str], folder: Path
    ) -> None:
        self.broker_url = broker_url
        self.database_url = database_url
        self.sandbox = sandbox
        self.environment = {**environment, "BROKER_URL": broker_url, "DATABASE_URL": database_url}
        self.folder = folder
        self.workers: list[WorkerProcess] = []
        self.engine: Engine = database.connect(database_url)
        self.connection = Connection(broker_url)
        self.events_queue = Queue("test.events", topology.booking_events, routing_key="#", durable=True)
        self.events: list[dict[str, Any]] = []
        self.event_messages: list[Any] = []

    def __enter__(self) -> "System":
        self.events_queue(self.connection.channel()).declare()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        self.engine.dispose()
        self.connection.release()

    def start_worker(
        self, command: Iterable[str] = ("-m", "worker", "worker"), sources: Path = PROJECT, **settings: str
    ) -> WorkerProcess:
        log = self.folder / f"worker-{len(self.workers) + 1}.log"
        worker = WorkerProcess({**self.environment, **settings}, log, command, sources)
        self.workers.append(worker)
        return worker

    def publish(self, jobs: Iterable[dict[str, Any] | bytes], **properties: Any) -> None:
        """Publishes jobs as plain JSON to the jobs queue."""
        producer = Producer(self.connection.channel(), on_return=None)
        for content in jobs:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            message = {
                "content_type": "application/json",
                "content_encoding": "utf-8",
                "delivery_mode": 2,
                **properties,
            }
            producer.publish(body, exchange=topology.confirm_offer.name, routing_key=topology.JOBS, **message)

    def drain(self, queue: str = "test.events") -> list[Any]:
        """Removes the messages of a queue. Returns them."""
        channel = self.connection.channel()
        messages = []
        while message := channel.basic_get(queue, no_ack=True):
            messages.append(message)
        channel.close()
        return messages

    def take_events(self) -> list[dict[str, Any]]:
        """All events so far. Asserts that each fits the published schemas."""
        messages = self.drain()
        for message in messages:
            assert problems_of_event(message.body) == []
        self.event_messages += messages
        self.events += [json.loads(message.body) for message in messages]
        return self.events

    def states(self) -> Counter[str]:
        with self.engine.connect() as connection:
            rows = connection.execute(select(Confirmation.state, func.count()).group_by(Confirmation.state))
            return Counter({str(state): count for state, count in rows})

    def count(self, table: Any) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(table)).scalar_one())

    def until_events(self, number: int, seconds: float = 60.0) -> list[dict[str, Any]]:
        def all_received() -> bool:
            return len(self.take_events()) >= number

        until(all_received, seconds)
        return self.events

    def reconnect(self) -> None:
        """Connects again after an outage of the broker."""
        self.connection.collect()
        self.connection = Connection(self.broker_url)
        self.connection.ensure_connection(max_retries=20, interval_start=0.2, interval_step=0.2)

    def end_leases(self) -> None:
        """Makes all leases expire."""
        with self.engine.begin() as connection:
            connection.execute(
                update(Confirmation).where(Confirmation.lease_token.is_not(None)).values(due_at=now_plus(-1.0))
            )

    def set_read_only(self, switch: str) -> None:
        """Makes the database read-only (``on``) or not (``off``), and closes existing connections."""
        name = self.engine.url.database
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f'alter database "{name}" set default_transaction_read_only = {switch}'))
            others = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
            connection.execute(text(f"{others} and datname = current_database()"))

    def queue_length(self, queue: str) -> int:
        channel = self.connection.channel()
        length = channel.queue_declare(queue, passive=True).message_count
        channel.close()
        return int(length)

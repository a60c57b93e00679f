"""The measurements: draining a backlog, single jobs at ease, a spike."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import text

from benchmarks.contenders import Contender, publish
from benchmarks.rig import Consumer, Rig, cpu_of, memory_of
from tests.support.system import WorkerProcess, until
from worker.messaging.publisher import Publisher

FROM, TO = 0.2, 0.9  # share of a backlog's jobs between which is measured, without start and end
TIMEOUT = 1200  # seconds


class Case(NamedTuple):
    """latency: seconds until XONE answers; in_flight: concurrent calls of each process."""

    latency: float
    in_flight: int
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.latency * 1000:.0f} ms, {self.in_flight} in flight, {self.processes} process" + "es" * (
            self.processes > 1
        )


@dataclass(frozen=True)
class Drained:
    """The measurements of a drained backlog.

    rate: confirmations per second; cpu, database: milliseconds of the workers' CPU and of PostgreSQL's active time for
    one confirmation; memory: MiB of the largest worker.
    """

    rate: float
    cpu: float
    database: float
    memory: float


@contextmanager
def running(rig: Rig, contender: Contender, case: Case) -> Iterator[list[WorkerProcess]]:
    """Runs the workers of a case."""
    workers = [contender.start(rig, case.latency, case.in_flight) for _ in range(case.processes)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def fill(rig: Rig, contender: Contender, name: str, jobs: int) -> list[str]:
    """Publishes jobs. Returns their offers."""
    offers = [f"{name}-{number}" for number in range(jobs)]
    with Publisher(rig.rabbitmq.url) as publisher:
        publish(publisher, contender, offers)
    return offers


def drain(rig: Rig, contender: Contender, case: Case, jobs: int, name: str) -> Drained:
    """Publishes jobs, starts the workers, and measures while they drain the backlog."""
    fill(rig, contender, name, jobs)
    with rig.consumer() as consumer, running(rig, contender, case) as workers:

        def sample(share: float) -> tuple[float, float, float]:
            wait_for(consumer, int(share * jobs))
            cpu = sum(cpu_of(worker.process.pid) for worker in workers)
            return time.monotonic(), cpu, database_time(rig)

        began, ended = sample(FROM), sample(TO)
        memory = max(memory_of(worker.process.pid) for worker in workers)
        wait_for(consumer, jobs)
    done = int(TO * jobs) - int(FROM * jobs)
    duration, cpu, database = (after - before for before, after in zip(began, ended, strict=True))
    return Drained(done / duration, cpu / done * 1000, database / done, memory)


def backlog(rig: Rig, contender: Contender, case: Case, jobs: int, parts: int) -> list[tuple[float, float]]:
    """Drains a long backlog in equal parts. Returns the rate of each, and a worker's memory in MiB at its end."""
    fill(rig, contender, "backlog", jobs)
    measured = []
    with rig.consumer() as consumer, running(rig, contender, case) as (worker, *_):
        wait_for(consumer, 1)
        for part in range(1, parts + 1):
            began, before = time.monotonic(), len(consumer.arrived)
            wait_for(consumer, part * jobs // parts)
            rate = (len(consumer.arrived) - before) / (time.monotonic() - began)
            measured.append((rate, memory_of(worker.process.pid)))
    return measured


def one_by_one(rig: Rig, contender: Contender, case: Case, rate: float, seconds: float, name: str) -> list[float]:
    """Publishes ``rate`` jobs per second. Returns the seconds from publish to event of each, less XONE's latency."""
    published: dict[str, float] = {}
    with Publisher(rig.rabbitmq.url) as publisher, rig.consumer() as consumer, running(rig, contender, case):
        publish(publisher, contender, [f"{name}-warm-{number}" for number in range(50)])
        wait_for(consumer, 50)
        started = time.monotonic()
        for number in range(int(seconds * rate)):
            offer = f"{name}-{number}"
            time.sleep(max(started + number / rate - time.monotonic(), 0.0))
            published[offer] = time.time()
            publish(publisher, contender, [offer])
        wait_for(consumer, 50 + len(published))
    return [consumer.arrived[offer] - sent - case.latency for offer, sent in published.items()]


def spike(rig: Rig, contender: Contender, case: Case, jobs: int) -> tuple[float, float]:
    """Publishes all jobs at once. Returns the seconds until they were published, and until the last event arrived."""
    with rig.consumer() as consumer, running(rig, contender, case):
        fill(rig, contender, "before", 20)
        wait_for(consumer, 20)
        began = time.monotonic()
        fill(rig, contender, "spike", jobs)
        published = time.monotonic() - began
        wait_for(consumer, 20 + jobs)
        return published, time.monotonic() - began


def wait_for(consumer: Consumer, events: int) -> None:
    until(lambda: len(consumer.arrived) >= events, TIMEOUT, every=0.005)


def database_time(rig: Rig) -> float:
    """Milliseconds that PostgreSQL has spent executing statements."""
    with rig.engine.connect() as connection:
        return float(connection.execute(text("select sum(active_time) from pg_stat_database")).scalar_one())

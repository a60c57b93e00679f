"""Rate, CPU and latency of confirm-offer beside its afternoon versions, each in turn on the same machine.

python -m benchmarks.throughput --quick
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import text

from benchmarks.contenders import Contender, publish
from benchmarks.rig import Rig, cpu_of, memory_of
from tests.system import WorkerProcess, until

FROM, TO = 0.2, 0.9  # of the jobs of a run: what is measured, without the start and the end


class Case(NamedTuple):
    """latency: of XONE, in seconds; in_flight: of each process."""

    latency: float
    in_flight: int
    processes: int


@dataclass(frozen=True)
class Drained:
    """A backlog worked off: confirmations a second, ms of a worker's CPU for one, ms of the database's time, MiB."""

    rate: float
    cpu: float
    database: float
    memory: float


@contextmanager
def running(rig: Rig, contender: Contender, case: Case) -> Iterator[list[WorkerProcess]]:
    workers = [contender.start(rig, case.latency, case.in_flight) for _ in range(case.processes)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def drain(rig: Rig, contender: Contender, case: Case, jobs: int, name: str) -> Drained:
    """Publishes jobs, then starts the workers and measures while they work on them."""
    offers = [f"{name}-{number}" for number in range(jobs)]
    with rig.connect() as connection:
        publish(connection.channel(), contender, offers)
    with rig.consumer() as consumer, running(rig, contender, case) as workers:

        def at(share: float) -> tuple[float, float, float]:
            until(lambda: len(consumer.arrived) >= share * jobs, 300, every=0.01)
            cpu = sum(cpu_of(worker.process.pid) for worker in workers)
            return time.monotonic(), cpu, database_time(rig)

        began, ended = at(FROM), at(TO)
        memory = max(memory_of(worker.process.pid) for worker in workers)
        until(lambda: len(consumer.arrived) >= jobs, 300)
    done = (TO - FROM) * jobs
    took, cpu, database = (after - before for before, after in zip(began, ended, strict=True))
    return Drained(done / took, cpu / done * 1000, database / done, memory)


def database_time(rig: Rig) -> float:
    """Milliseconds that PostgreSQL has spent on statements."""
    with rig.engine.connect() as connection:
        return float(connection.execute(text("select sum(active_time) from pg_stat_database")).scalar_one())


def at_ease(rig: Rig, contender: Contender, seconds: float, rate: float, name: str) -> list[float]:
    """Seconds from publish to event, less XONE's, of jobs that come one by one."""
    case = Case(0.05, 64, 1)
    published: dict[str, float] = {}
    with (
        rig.connect() as connection,
        rig.consumer() as consumer,
        running(rig, contender, case),
    ):
        channel = connection.channel()
        publish(channel, contender, [f"{name}-warm-{number}" for number in range(50)])
        until(lambda: len(consumer.arrived) >= 50)
        started = time.monotonic()
        for number in range(int(seconds * rate)):
            offer = f"{name}-{number}"
            time.sleep(max(started + number / rate - time.monotonic(), 0.0))
            published[offer] = time.time()
            publish(channel, contender, [offer])
        until(lambda: published.keys() <= consumer.arrived.keys())
    return [consumer.arrived[offer] - at - case.latency for offer, at in published.items()]

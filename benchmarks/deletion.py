"""Deletion beside live work, on a private PostgreSQL.

    python -m benchmarks.deletion --rows 2000000

Fills the tables with confirmations of a year, then stores live jobs and their bookings as fast as the database takes
them, in turns with and without a process beside it that deletes what is older than 30 days. Then days go by, of a few
seconds each, with as many new rows as are deleted, and the sizes of the tables are printed day by day.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event

import click
from cryptography.fernet import Fernet
from sqlalchemy import Connection, Engine, text
from uuid_utils.compat import uuid4

from benchmarks import seed as seeds
from models import booking as xone
from models.job import read_job
from tasks.accept import Delivery, NewJob, accept_new_batch
from tasks.decide import Decision, RetryPolicy, decide
from tasks.lease import History
from tasks.record import RecordedAttempt, record
from tests.support.servers import PostgreSQL
from tests.support.system import PROJECT, job
from worker.storage import database, migrator
from worker.storage.encryption import Encryption
from worker.xone.answers import BookingReceived

TABLES = ("confirmations", "attempts", "bookings", "policyholders", "policies", "outbox", "further_emails")
THREADS, GROUP = 4, 20  # of live work; jobs in one transaction
DELETES = """
import sys
from worker.runtime import current
from worker.services.deletion import Deletion
service = Deletion(current(), float(sys.argv[1]), float(sys.argv[1]))
service.start()
sys.stdin.read()
service.stop()
"""


def seed(engine: Engine, rows: int) -> None:
    """As benchmarks.seed, but ids grow with time, as in life."""
    original = seeds.ROWS
    seeds.ROWS = original.replace(seeds.ID, seeds.ID.replace("to_hex(n)", f"to_hex({rows} - n)"))
    try:
        seeds.seed(engine, rows)
    finally:
        seeds.ROWS = original


class LiveWork:
    """Accepts jobs and records their bookings, without the call between."""

    def __init__(self, engine: Engine, encryption: Encryption) -> None:
        self._engine, self._encryption = engine, encryption
        self._numbers = count(1)

    def rate(self, seconds: float) -> float:
        """Confirmations a second, over so many seconds."""
        stop, began = Event(), time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(self._run, stop) for _ in range(THREADS)]
            time.sleep(seconds)
            stop.set()
            total = sum(future.result() for future in futures)
        return total / (time.monotonic() - began)

    def _run(self, stop: Event) -> int:
        done = 0
        while not stop.is_set():
            offers = [f"live-{next(self._numbers)}" for _ in range(GROUP)]
            jobs = [NewJob.of(read_job(_body(offer)), Delivery(), self._encryption) for offer in offers]
            with self._engine.begin() as connection:
                leases = accept_new_batch(connection, jobs, uuid4(), 45.0)
            attempts = [RecordedAttempt(lease, _booked(lease.offer_id), 0.2) for lease in leases.values()]
            with self._engine.begin() as connection:
                record(connection, self._encryption, attempts, False)
            done += len(attempts)
        return done


def _body(offer_id: str) -> bytes:
    return json.dumps(job(offer_id)).encode()


def _booked(offer_id: str) -> Decision:
    answer = {"id": f"INS-{offer_id}", "offer_id": offer_id, "status": "CONFIRMED", "policies": [{"id": "p"}]}
    return decide(BookingReceived(xone.Booking.model_validate(answer), 201), History(), RetryPolicy(), 0.0)


@contextmanager
def deleting(url: str, keys: str, days: float) -> Iterator[None]:
    """A process that deletes what is older."""
    environment = {"DATABASE_URL": url, "DATA_KEYS": keys, "LOG_LEVEL": "WARNING", "PATH": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", DELETES, str(days)],
        cwd=PROJECT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def total(connection: Connection) -> int:
    return int(connection.execute(text("select count(*) from confirmations")).scalar_one())


def sizes(connection: Connection) -> list[float]:
    """MiB of the tables with their indexes."""
    return [
        connection.execute(text(f"select pg_total_relation_size('{table}')")).scalar_one() / 1024**2 for table in TABLES
    ]


def compare(engine: Engine, url: str, keys: str, seconds: float, rounds: int) -> None:
    live = LiveWork(engine, Encryption([keys]))
    live.rate(5.0)
    for _ in range(rounds):
        alone = live.rate(seconds)
        with engine.connect() as connection:
            before = total(connection)
        with deleting(url, keys, 30.0):
            time.sleep(2.0)  # its start
            began = time.monotonic()
            beside = live.rate(seconds)
            took = time.monotonic() - began
        with engine.connect() as connection:
            deleted = before + beside * took - total(connection)
        click.echo(f"live {alone:7.0f}/s alone, {beside:7.0f}/s beside deletion, which deletes {deleted / took:5.0f}/s")


def live_days(engine: Engine, url: str, keys: str, days: int, per_day: int, day: float) -> None:
    """Each day brings as many confirmations as end their third day. day: seconds of a day."""
    click.echo(f"day    rows  {'  '.join(f'{table:>14}' for table in TABLES)}   MiB")
    rows = seeds.ROWS.replace(seeds.AGE, "clock_timestamp()").replace(
        seeds.ID, "('01a00000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid"
    )
    rows = rows.replace("n % 1000", "n % 980")  # all confirmed
    with deleting(url, keys, 3 * day / 86400.0):
        for number in range(days):
            began = time.monotonic()
            first = number * per_day + 1
            for start in range(first, first + per_day, 500):
                with engine.begin() as connection:
                    for statement in rows.replace("seeded-", "day-").split(";")[:-1]:
                        connection.execute(text(statement), {"first": start, "last": start + 499})
                time.sleep(max(0.0, began + (start - first + 500) / per_day * day - time.monotonic()))
            with engine.connect() as connection:
                figures = "  ".join(f"{size:14.1f}" for size in sizes(connection))
                click.echo(f"{number + 1:3}  {total(connection):6}  {figures}")


@click.command(help=__doc__)
@click.option("--rows", default=2_000_000, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=30.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--days", default=30, show_default=True)
@click.option("--per-day", default=4000, show_default=True)
@click.option("--day", default=8.0, show_default=True, help="Seconds of a simulated day.")
def main(rows: int, seconds: float, rounds: int, days: int, per_day: int, day: float) -> None:
    folder, keys = Path(tempfile.mkdtemp(prefix="deletion-")), Fernet.generate_key().decode()
    server = PostgreSQL(folder)
    server.start()
    try:
        for name in ("year", "days"):
            server.create_database(name)
        engine = database.connect(server.url("year"))
        migrator.upgrade(engine)
        began = time.monotonic()
        seed(engine, rows)
        click.echo(f"{rows} confirmations in {time.monotonic() - began:.0f} s")
        compare(engine, server.url("year"), keys, seconds, rounds)
        engine.dispose()
        engine = database.connect(server.url("days"))
        migrator.upgrade(engine)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            # Days are shorter, and so must autovacuum's be.
            connection.execute(text("alter system set autovacuum_naptime = '1s'"))
            connection.execute(text("select pg_reload_conf()"))
        live_days(engine, server.url("days"), keys, days, per_day, day)
        engine.dispose()
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

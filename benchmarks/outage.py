"""After an outage: of 20,000 failed confirmations a group of 15,000 is reprocessed, while live jobs come in.

    python -m benchmarks.outage

Live jobs are published at 20 per second, first alone, then while ``confirm-offer reprocess --rate … --follow`` runs.
The batch is paused and resumed, and all workers are killed twice. Prints the result; exits with 1 unless each offer of
the batch was confirmed by exactly one more call.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import click
from sqlalchemy import insert
from uuid_utils.compat import uuid4, uuid7

from benchmarks.rig import Checkout, Consumer, Rig, quantile
from models.job import read_job
from models.states import Outcome, State
from models.tables import Attempt, Confirmation
from tests.support.system import PROJECT, job, until
from worker.storage.database import now
from worker.storage.encryption import Encryption

GROUPS = (  # of failed confirmations: share of the total, code, HTTP status, detail
    (0.75, "http-503", 503, "XONE answered 503 Service Unavailable"),
    (0.20, "connect", None, "XONE can't be reached"),
    (0.05, "http-422", 422, "XONE answered 422 Unprocessable Entity: This offer has expired."),
)
LIVE_RATE = 20.0  # jobs per second
CHUNK = 1000


def seed(rig: Rig, total: int) -> list[str]:
    """Stores failed confirmations of 50 partners in three groups. Returns the offers of the first group."""
    encryption = Encryption([rig.environment["DATA_KEYS"]])
    first_group: list[str] = []
    for share, code, status, detail in GROUPS:
        offers = [f"{code}-{number}" for number in range(round(share * total))]
        first_group = first_group or offers
        for at in range(0, len(offers), CHUNK):
            rows = [failed_row(encryption, offer, number) for number, offer in enumerate(offers[at : at + CHUNK])]
            error = {"error_code": code, "error_http_status": status, "error_detail": detail}
            with rig.engine.begin() as connection:
                connection.execute(
                    insert(Confirmation).values(queued_at=now(), created_at=now(), updated_at=now(), **error), rows
                )
                connection.execute(
                    insert(Attempt).values(started_at=now(), code=code, http_status=status, detail=detail),
                    [
                        {
                            "confirmation_id": row["id"],
                            "number": 1,
                            "outcome": Outcome.NOT_BOOKED,
                            "lease_token": uuid4(),
                        }
                        for row in rows
                    ],
                )
    return first_group


def failed_row(encryption: Encryption, offer: str, number: int) -> dict[str, Any]:
    parsed = read_job(json.dumps(job(offer, partner_id=f"P-{number % 50}")).encode())
    row_id = uuid7()
    return {
        "id": row_id,
        "partner_id": parsed.partner_id,
        "offer_id": offer,
        "order_reference": parsed.order_reference,
        "echo": parsed.metadata,
        "idempotency_key": uuid4(),
        "sealed_body": encryption.encrypt(row_id, "body", parsed.request_body()),
        "state": State.FAILED,
        "attempts": 1,
        "attempts_used": 1,
    }


class Live:
    """Publishes live jobs, and measures the time from publish to event of each."""

    def __init__(self, rig: Rig, consumer: Consumer) -> None:
        self.checkout = Checkout(rig)
        self.consumer = consumer

    @contextmanager
    def publishing(self, name: str) -> Iterator[None]:
        ended = Event()
        thread = Thread(target=self.checkout.publish_steadily, args=(name, LIVE_RATE, lambda: not ended.is_set()))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def durations(self, name: str, since: float = 0.0, before: float = float("inf")) -> list[float]:
        """Waits until all jobs of that name have events. Returns the seconds of those published in this period."""
        offers = [offer for offer in self.checkout.published if offer.startswith(f"{name}-")]
        until(lambda: all(offer in self.consumer.arrived for offer in offers), 120)
        published = self.checkout.published
        return [
            self.consumer.arrived[offer] - published[offer] for offer in offers if since <= published[offer] < before
        ]


def command(rig: Rig, *arguments: str) -> Any:
    """Runs a command of confirm-offer with --json. Returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "worker", *arguments, "--json"],
        env={**rig.environment, "PATH": "/usr/bin:/bin"}, cwd=PROJECT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def newest_batch(rig: Rig) -> dict[str, Any]:
    (newest,) = command(rig, "batches")["batches"]
    return dict(newest)


def in_ms(values: list[float]) -> str:
    p50, p99 = (quantile(values, share) * 1000 for share in (0.5, 0.99))
    return f"{p50:6.0f} ms {p99:6.0f} ms {max(values) * 1000:6.0f} ms   {len(values)} jobs"


def run(rig: Rig, total: int, seconds: float, workers: int, rate: float) -> bool:
    """Runs the scenario. Returns whether each offer of the batch was confirmed by exactly one more call."""
    offers_of_batch = seed(rig, total)
    click.echo(f"{total} failed confirmations in three groups; {workers} workers")

    def start() -> None:
        for _ in range(workers):
            rig.start_worker()

    def kill() -> None:
        for worker in rig.workers[-workers:]:
            worker.kill()

    start()
    with rig.consumer() as consumer:
        live = Live(rig, consumer)
        with live.publishing("warm"):
            until(lambda: sum(offer.startswith("warm-") for offer in list(consumer.arrived)) >= 40, 60)
        with live.publishing("alone"):
            time.sleep(seconds)
        alone = live.durations("alone")

        def confirmed() -> int:
            return sum(offer.startswith("http-503-") for offer in list(consumer.arrived))

        screen = rig.folder / "follow.txt"
        with screen.open("w") as output, live.publishing("beside"):
            began = time.time()
            options = f"--code http-503 --reason outage --rate {rate} --yes --follow".split()
            follower = subprocess.Popen(
                [sys.executable, "-m", "worker", "reprocess", *options],
                env={**rig.environment, "PATH": "/usr/bin:/bin", "COLUMNS": "80"},
                cwd=PROJECT, stdout=output, stderr=output,
            )  # fmt: skip
            until(lambda: confirmed() >= len(offers_of_batch) // 3, 600)
            first_third = time.time()
            command(rig, "batch", "pause", "1")
            until(lambda: newest_batch(rig)["running"] == 0, 60)
            confirmed_before, paused_at = confirmed(), time.time()
            until(lambda: time.time() - paused_at > 5, 10)
            while_paused = confirmed() - confirmed_before
            kill()
            start()
            command(rig, "batch", "resume", "1")
            until(lambda: confirmed() >= len(offers_of_batch) * 2 // 3, 600)
            kill()
            start()
            resumed = time.time()
            follower.wait(1200)
            ended = time.time()
        beside = live.durations("beside", began, first_third)
        with_interruptions = live.durations("beside")
        rate_reached = len(offers_of_batch) / 3 / (first_third - began)
    calls = rig.calls()
    calls_by_number = Counter(calls.get(offer, 0) for offer in offers_of_batch)
    newest = newest_batch(rig)
    click.echo(screen.read_text())
    click.echo(f"batch: {newest['confirmed']} of {newest['total']} confirmed, {newest['failed']} failed again; "
               f"{rate_reached:.0f} a second until it was paused, {ended - began:.0f} s in all")  # fmt: skip
    click.echo(
        f"while paused: {while_paused} confirmed in 5 s; last start of workers to the end {ended - resumed:.0f} s"
    )
    click.echo(f"more calls of XONE for an offer: {dict(calls_by_number)}")
    click.echo("live jobs, publish to event      p50       p99       max")
    click.echo(f"  alone                      {in_ms(alone)}")
    click.echo(f"  beside the batch           {in_ms(beside)}")
    click.echo(f"  with pauses and kills      {in_ms(with_interruptions)}")
    ratio = quantile(beside, 0.99) / quantile(alone, 0.99)
    click.echo(f"p99 beside the batch / alone: {ratio:.2f}")
    return newest["confirmed"] == len(offers_of_batch) and set(calls_by_number) == {1}


@click.command(help=__doc__)
@click.option("--total", default=20_000, show_default=True, type=click.IntRange(100))
@click.option("--seconds", default=30.0, show_default=True, help="Of live jobs alone.")
@click.option("--rate", default=200.0, show_default=True, help="Of the batch, a second.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1))
def main(total: int, seconds: float, rate: float, workers: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="confirm-offer-outage-"))
    with Rig(folder, latency=0.05) as rig:
        is_complete = run(rig, total, seconds, workers, rate)
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    main()

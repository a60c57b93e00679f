"""The demo: the whole system in one process. Real code on embedded parts: XONE's stand-in, in-memory broker, SQLite.

``worker.cli.demo`` shows it.
"""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, func, select

from models.states import ENDED, State
from models.tables import Confirmation
from tasks.operations.lookup import ConfirmationDetails, find
from worker.messaging import broker, topology
from worker.messaging.publisher import Message, Publisher
from worker.observability import logs
from worker.sandbox.server import Sandbox
from worker.settings import LogSettings, read
from worker.storage import database, migrator
from worker.storage.encryption import new_key

PARTNER = "P-100"
DEADLINE = 60.0  # seconds

OnProgress = Callable[[Counter[str]], None]  # called with the number of confirmations in each state


@dataclass(frozen=True)
class Scenario:
    """How the stand-in behaves for an offer (fault: the end of the offer's id), and the state that must result."""

    fault: str
    description: str
    expected: State


PLAIN = Scenario("", "books", State.CONFIRMED)
FAULTY = (
    Scenario("~http-503~2", "down twice, then books", State.CONFIRMED),
    Scenario("~drop-after~1", "books, answer gets lost", State.CONFIRMED),
    Scenario("~http-422", "refuses", State.FAILED),
    Scenario("~pending", "books, pending", State.PENDING),
    Scenario("~html~1", "books, shows a web page", State.CONFIRMED),
    Scenario("~busy~1", "too many requests, once", State.CONFIRMED),
)
MALFORMED = b'{"partner_id": "P-100", "offer_id": "demo-malformed", "quotes": [], "policyholder": {}, "offerid": 1}'


@dataclass
class Demo:
    """What the demo publishes (offers by id), and what has come back. seconds: how long it took."""

    folder: Path
    offers: dict[str, Scenario]
    events: list[dict[str, Any]] = field(default_factory=list)
    dead_letters: list[dict[str, Any]] = field(default_factory=list)
    confirmations: dict[str, ConfirmationDetails | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def database(self) -> Path:
        return self.folder / "confirm-offer.db"


def prepare(jobs: int) -> Demo:
    """A demo that has not run yet, in a new folder. jobs: how many offers."""
    return Demo(Path(tempfile.mkdtemp(prefix="confirm-offer-demo-")), plan(jobs))


def run(demo: Demo, on_progress: OnProgress) -> None:
    """Runs the demo until all confirmations have ended or DEADLINE has passed, and checks the result."""
    with Sandbox(latency=0.1) as sandbox:
        configure(demo, sandbox)
        engine = database.connect(os.environ["DATABASE_URL"])
        migrator.upgrade(engine)
        from worker.celery import embedded_worker  # reads the settings that ``configure`` has set

        started_at = time.monotonic()
        with inbox(demo) as drain, embedded_worker():
            publish(demo)
            follow(demo, engine, drain, on_progress)
            demo.seconds = time.monotonic() - started_at
        demo.confirmations = {offer: _details(engine, offer) for offer in demo.offers}
        double_bookings = sandbox.double_bookings + len(sandbox.overlapping)
        engine.dispose()
    demo.problems = check(demo, double_bookings)


def plan(jobs: int) -> dict[str, Scenario]:
    """Offers by id: every second one meets a fault, each fault in turn."""
    offers = {}
    for number in range(1, jobs + 1):
        scenario = FAULTY[(number - 1) // 2 % len(FAULTY)] if number % 2 == 0 else PLAIN
        offers[f"demo-{number:03}{scenario.fault}"] = scenario
    return offers


def configure(demo: Demo, sandbox: Sandbox) -> None:
    """Sets the settings of this process, in its environment, and sends its logs to a file."""
    os.environ.update(
        BROKER_URL="memory://",
        DATABASE_URL=f"sqlite:///{demo.database}",
        DATA_KEYS=new_key(),
        XONE_BASE_URL=sandbox.url,
        XONE_CLIENT_ID=sandbox.client_id,
        XONE_CLIENT_SECRET=sandbox.client_secret,
        XONE_TIMEOUT="5",
        RETRY_BASE_DELAY="0.3",
        RETRY_MAX_DELAY="2",
        WORKER_CONCURRENCY="16",
        WORKER_POOL="threads",
        WORKER_PARTS="tasks,scheduler,relay",
        METRICS_PORT="",
        EVENT_LINKS="off",
        SENTRY_DSN="",
        OTEL_SDK_DISABLED="true",
        LOG_LEVEL="INFO",
        LOG_FORMAT="json",
    )
    for name in ("XONE_TOKEN_PATH", "XONE_CONFIRM_PATH", "XONE_BOOKINGS_PATH", "XONE_AFTER_UNKNOWN"):
        os.environ.pop(name, None)
    log = (demo.folder / "worker.log").open("w", encoding="utf-8")
    logs.configure(read(LogSettings), log)


@contextmanager
def inbox(demo: Demo) -> Iterator[Callable[[], None]]:
    """A consumer of all events and of the dead letters. Yields a function that takes those that have come."""
    all_events = topology.events_queue("demo.events")
    with broker.connect("memory://") as connection:
        topology.declare(connection)
        all_events(connection.channel()).declare()
        channel = connection.channel()

        def drain() -> None:
            while message := channel.basic_get(all_events.name, no_ack=True):
                demo.events.append(json.loads(message.body))
            while message := channel.basic_get(topology.DEAD_LETTERS, no_ack=True):
                demo.dead_letters.append(dict(message.headers))

        yield drain


def publish(demo: Demo) -> None:
    """Publishes every job, the first one twice, and a malformed one, as a checkout would."""
    bodies = [json.dumps(job_for(offer)).encode() for offer in demo.offers]
    with Publisher("memory://") as publisher:
        publisher.publish(
            Message(number, body, topology.confirm_offer.name, topology.JOBS)
            for number, body in enumerate([*bodies, bodies[0], MALFORMED])
        )


def job_for(offer_id: str) -> dict[str, Any]:
    """A job as a checkout would send it."""
    number = offer_id.split("~")[0].removeprefix("demo-")
    return {
        "partner_id": PARTNER,
        "offer_id": offer_id,
        "order_reference": f"SO-{number}",
        "quotes": [{"id": f"quote-{number}", "insured": [{"first_name": "Ada", "last_name": "Lovelace"}]}],
        "policyholder": {
            "first_name": "Ada",
            "last_name": "Lovelace",
            "country": "GB",
            "email": "ada@example.com",
            "city": "London",
        },
        "metadata": {"channel": "demo"},
    }


def follow(demo: Demo, engine: Engine, drain: Callable[[], None], on_progress: OnProgress) -> None:
    """Returns when all confirmations have ended and all events and the dead letter have come, or at DEADLINE."""
    ends_at = time.monotonic() + DEADLINE
    while time.monotonic() < ends_at:
        drain()
        states = _states(engine)
        on_progress(states)
        if count_ended(states) == len(demo.offers) == len(demo.events) and demo.dead_letters:
            return
        time.sleep(0.1)


def count_ended(states: Counter[str]) -> int:
    """How many confirmations have ended."""
    return sum(states[state] for state in ENDED)


def check(demo: Demo, double_bookings: int) -> list[str]:
    """What is not as expected, in words."""
    problems = []
    for offer, scenario in demo.offers.items():
        details = demo.confirmations[offer]
        state = details.state if details is not None else "not stored"
        if state != scenario.expected:
            problems.append(f"{offer} is {state}, not {scenario.expected}")
    events = Counter(event["data"]["offer_id"] for event in demo.events)
    problems += [f"{offer} has {events[offer]} events" for offer in demo.offers if events[offer] != 1]
    if [headers.get("x-dead-letter-code") for headers in demo.dead_letters] != ["invalid-job"]:
        problems.append("the malformed job is not among the dead letters")
    if double_bookings:
        problems.append(f"{double_bookings} offers were booked twice, or called twice at once")
    return problems


def _states(engine: Engine) -> Counter[str]:
    with engine.connect() as connection:
        rows = connection.execute(select(Confirmation.state, func.count()).group_by(Confirmation.state))
        return Counter({str(state): count for state, count in rows})


def _details(engine: Engine, offer_id: str) -> ConfirmationDetails | None:
    found = find(engine, offer_id, PARTNER)
    return found[0].details if found else None

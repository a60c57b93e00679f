"""The demo: the whole system in one process. Real code on embedded parts: XONE's stand-in, in-memory broker, SQLite."""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import click
from celery.worker import WorkController
from celery.worker import state as celery_state
from cryptography.fernet import Fernet
from kombu import Connection, Queue
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine, func, select

from models.states import ENDED, State
from models.tables import Confirmation
from tasks.operations.lookup import find
from worker.cli.ui.confirmation_screen import STYLE_OF
from worker.messaging import topology
from worker.messaging.publisher import Message, Publisher
from worker.observability import logs
from worker.sandbox.server import Sandbox
from worker.settings import LogSettings, read
from worker.storage import database, migrator

PARTNER = "P-100"
DEADLINE = 60.0  # seconds


@dataclass(frozen=True)
class Kind:
    """A kind of job: how its offer id makes the stand-in behave, and the state that the confirmation must end in."""

    fault: str
    says: str
    ends: State


PLAIN = Kind("", "books", State.CONFIRMED)
FAULTY = (
    Kind("~http-503~2", "down twice, then books", State.CONFIRMED),
    Kind("~drop-after~1", "books, answer gets lost", State.CONFIRMED),
    Kind("~http-422", "refuses", State.FAILED),
    Kind("~pending", "books, pending", State.PENDING),
    Kind("~html~1", "books, shows a web page", State.CONFIRMED),
    Kind("~busy~1", "too many requests, once", State.CONFIRMED),
)
MALFORMED = b'{"partner_id": "P-100", "offer_id": "demo-malformed", "quotes": [], "policyholder": {}, "offerid": 1}'


@dataclass
class Run:
    """What the demo published and what came back."""

    folder: Path
    offers: dict[str, Kind]
    events: list[dict[str, Any]] = field(default_factory=list)
    dead_letters: list[dict[str, Any]] = field(default_factory=list)
    took: float = 0.0

    @property
    def database(self) -> Path:
        return self.folder / "confirm-offer.db"


def run(jobs: int, as_json: bool, out: Console) -> int:
    """Runs the demo and prints what came of it. Returns the exit code: 0 where every job ended as it should."""
    demo = Run(Path(tempfile.mkdtemp(prefix="confirm-offer-demo-")), plan(jobs))
    with Sandbox(latency=0.1) as sandbox:
        configure(demo, sandbox)
        engine = database.connect(os.environ["DATABASE_URL"])
        migrator.upgrade(engine)
        started = time.monotonic()
        with inbox(demo) as drain, worker():
            publish(demo)
            quiet = as_json or not out.is_terminal
            with Live(console=out, transient=True, auto_refresh=False) if not quiet else _no_display() as live:
                follow(demo, engine, drain, live, out if quiet and not as_json else None)
            demo.took = time.monotonic() - started
        found = {offer: _told_of(engine, offer) for offer in demo.offers}
        double = sandbox.double_bookings + len(sandbox.overlapping)
        engine.dispose()
    problems = check(demo, found, double)
    if as_json:
        click.echo(json.dumps(summary(demo, found, problems)))
    else:
        tell(demo, found, problems, out)
    return 1 if problems else 0


def plan(jobs: int) -> dict[str, Kind]:
    """Offer ids with their kind: every second one goes through a fault, each fault in turn."""
    offers = {}
    for number in range(1, jobs + 1):
        kind = FAULTY[(number - 1) // 2 % len(FAULTY)] if number % 2 == 0 else PLAIN
        offers[f"demo-{number:03}{kind.fault}"] = kind
    return offers


def configure(demo: Run, sandbox: Sandbox) -> None:
    """The settings of this process, in the environment as everywhere."""
    os.environ.update(
        BROKER_URL="memory://",
        DATABASE_URL=f"sqlite:///{demo.database}",
        DATA_KEYS=Fernet.generate_key().decode(),
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
def worker() -> Iterator[None]:
    """A Celery worker in a thread of this process, the same as ``confirm-offer worker`` runs."""
    from worker.celery import app

    running = WorkController(app=app, pool_cls="threads")
    thread = Thread(target=running.start, name="worker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        celery_state.should_stop = 0
        thread.join(15)


@contextmanager
def inbox(demo: Run) -> Iterator[Any]:
    """A consumer of all events and of the dead letters. Yields what takes those that have come."""
    everything = Queue("demo.events", topology.booking_events, routing_key="#")
    with Connection("memory://", transport_options={"polling_interval": 0.01}) as connection:
        topology.declare(connection)
        everything(connection.channel()).declare()
        channel = connection.channel()

        def drain() -> None:
            while message := channel.basic_get(everything.name, no_ack=True):
                demo.events.append(json.loads(message.body))
            while message := channel.basic_get(topology.DEAD_LETTERS, no_ack=True):
                demo.dead_letters.append(dict(message.headers))

        yield drain


def publish(demo: Run) -> None:
    """Every job, the first one twice, and one that is malformed; as a checkout would."""
    bodies = [json.dumps(job_for(offer)).encode() for offer in demo.offers]
    with Publisher("memory://") as publisher:
        publisher.publish(
            Message(number, body, topology.confirm_offer.name, topology.JOBS)
            for number, body in enumerate([*bodies, bodies[0], MALFORMED])
        )


def job_for(offer_id: str) -> dict[str, Any]:
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


def follow(demo: Run, engine: Engine, drain: Any, live: Live | None, lines: Console | None) -> None:
    """Shows the states until all have ended, with their events and the dead letter, or the time is up."""
    ends_at = time.monotonic() + DEADLINE
    shown: Counter[str] = Counter()
    while time.monotonic() < ends_at:
        drain()
        states = _states(engine)
        if live is not None:
            live.update(_progress(states, len(demo.offers)), refresh=True)
        elif lines is not None and states != shown:
            lines.print(", ".join(f"{state} {count}" for state, count in sorted(states.items())))
            shown = states
        ended = sum(states[state] for state in ENDED)
        if ended == len(demo.offers) == len(demo.events) and demo.dead_letters:
            return
        time.sleep(0.1)


def check(demo: Run, found: dict[str, Any], double: int) -> list[str]:
    """What is not as it should be, in words."""
    problems = []
    for offer, kind in demo.offers.items():
        state = found[offer]["state"] if found[offer] else "not stored"
        if state != kind.ends:
            problems.append(f"{offer} is {state}, not {kind.ends}")
    told = Counter(event["data"]["offer_id"] for event in demo.events)
    problems += [f"{offer} has {told[offer]} events" for offer in demo.offers if told[offer] != 1]
    if [letter.get("x-dead-letter-code") for letter in demo.dead_letters] != ["invalid-job"]:
        problems.append("the malformed job is not with the dead letters")
    if double:
        problems.append(f"{double} offers were called or booked twice at once")
    return problems


def summary(demo: Run, found: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    return {
        "confirmations": [
            {"offer_id": offer, "state": one["state"], "attempts": len(one["attempts"])}
            for offer, one in found.items()
            if one
        ],
        "events": dict(Counter(event["type"] for event in demo.events)),
        "dead_letters": [letter.get("x-dead-letter-code") for letter in demo.dead_letters],
        "seconds": round(demo.took, 1),
        "database": str(demo.database),
        "problems": problems,
    }


def tell(demo: Run, found: dict[str, Any], problems: list[str], out: Console) -> None:
    """The result for a person."""
    out.print()
    out.print(_result_table(demo, found))
    events = Counter(event["type"] for event in demo.events)
    out.print()
    told = ", ".join(f"{count} {name}" for name, count in sorted(events.items()))
    out.print(Text.assemble(("Events: ", "bold"), told))
    for letter in demo.dead_letters:
        why = f"{letter.get('x-dead-letter-code')} - {letter.get('x-dead-letter-detail')}"
        out.print(Text.assemble(("Dead letter: ", "bold"), why))
    out.print(Text.assemble(("Published twice: ", "bold"), f"{next(iter(demo.offers))} - one booking, one event"))
    out.print()
    for problem in problems:
        out.print(f"not as it should be: {problem}", style="red")
    if not problems:
        out.print(f"All {len(demo.offers)} confirmations ended as they should, in {demo.took:.1f} s.", style="green")
    out.print(f"\nDatabase and log: {demo.folder}", soft_wrap=True)
    out.print("Look at one:")
    offer = next((offer for offer in demo.offers if "~" in offer), next(iter(demo.offers)))
    out.print(f"  DATABASE_URL=sqlite:///{demo.database} \\\n    confirm-offer show {offer}", soft_wrap=True)
    out.print("Play XONE by yourself:  confirm-offer sandbox")
    out.print("Run it for real:        README.md, from 'Run a worker' on")


def _result_table(demo: Run, found: dict[str, Any], most: int = 40) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("offer", "XONE", "tries", "state", "booking"):
        table.add_column(column, justify="right" if column == "tries" else "left", no_wrap=True)
    for offer, kind in list(demo.offers.items())[:most]:
        one = found[offer]
        if one is None:
            table.add_row(offer, kind.says, "-", Text("not stored", style="red"), "-")
            continue
        state = Text(one["state"], style=STYLE_OF.get(State(one["state"]), ""))
        booking = one["booking"]["id"] if one["booking"] else one["error"]["code"] if one["error"] else "-"
        table.add_row(offer, kind.says, str(len(one["attempts"])), state, booking)
    if len(demo.offers) > most:
        table.add_row(f"… {len(demo.offers) - most} more", "", "", "", "")
    return table


def _progress(states: Counter[str], total: int) -> Group:
    lines = Table.grid(padding=(0, 1))
    ended = sum(states[state] for state in ENDED)
    counts = "  ".join(f"{count} {state}" for state, count in sorted(states.items()))
    lines.add_row(ProgressBar(total=total, completed=ended, width=24), f"{ended}/{total}")
    return Group(lines, Text(counts, style="dim", no_wrap=True, overflow="ellipsis"))


def _states(engine: Engine) -> Counter[str]:
    with engine.connect() as connection:
        rows = connection.execute(select(Confirmation.state, func.count()).group_by(Confirmation.state))
        return Counter({str(state): count for state, count in rows})


def _told_of(engine: Engine, offer_id: str) -> dict[str, Any] | None:
    found = find(engine, offer_id, PARTNER)
    return found[0].told if found else None


@contextmanager
def _no_display() -> Iterator[None]:
    yield None

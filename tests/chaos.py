"""Chaos: jobs with mixed outcomes, while workers, RabbitMQ, PostgreSQL and the sandbox fail at random.

    python -m tests.chaos --jobs 2000 --workers 2 --seed 1 --every 2

A checkout publishes jobs steadily and keeps each until the broker has confirmed it. A consumer acknowledges each event
that it has received. Both survive outages of the broker. Faults occur until most confirmations have ended. Then all
confirmations must end, and the promises are checked: one booking for an offer, the same upstream, in the database and
in events, and nothing lost. If a promise is broken, the exit code is 1 and the logs are kept.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from subprocess import TimeoutExpired
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

import click
from cryptography.fernet import Fernet
from kombu import Queue
from sqlalchemy import Engine, Row, func, select, update

from models.states import Outcome, State
from models.tables import Attempt, Booking, Confirmation, OutboxEvent
from tests.support.servers import PostgreSQL, RabbitMQ, free_port
from tests.support.system import WorkerProcess, job
from worker.messaging import broker, topology
from worker.messaging.publisher import Message, Publisher
from worker.sandbox.server import Sandbox
from worker.storage import database, migrator
from worker.storage.database import now

DATABASE = "confirm_offer"
EVENTS = Queue("chaos.events", topology.booking_events, routing_key="#", queue_arguments={"x-queue-type": "quorum"})
PERSON = {
    "first_name": "Philippa",
    "last_name": "Featherstonehaugh",
    "country": "GB",
    "email": "p.featherstonehaugh@example.com",
}
SETTINGS = {
    "XONE_TIMEOUT": "2",
    "RETRY_BASE_DELAY": "0.2",
    "RETRY_MAX_DELAY": "2",
    "RETRY_MAX_ATTEMPTS": "50",
    "LOG_LEVEL": "INFO",
    "LOG_FORMAT": "json",
    "PYTHONWARNINGS": "ignore",  # Celery warns of running as root
}
ENDED = (State.CONFIRMED, State.PENDING, State.CANCELLED, State.FAILED, State.NEEDS_REVIEW)
BOOKED_EVENTS = ("booking.confirmed", "booking.pending")
EVENT_OF = {
    State.CONFIRMED: "booking.confirmed",
    State.PENDING: "booking.pending",
    State.FAILED: "confirmation.failed",
    State.NEEDS_REVIEW: "confirmation.needs_review",
}
PARTNERS = 20  # XONE lists bookings by partner, and each read-back reads the whole list
REPEATED, MALFORMED = 0.1, 0.03  # share of jobs that are published twice, and of additional malformed jobs
ENOUGH = 0.8  # share of confirmations that must have ended before faults stop
FAULTS_END = 120.0  # seconds after twice the time of publishing, at the latest
SETTLE = 300.0  # seconds after the last fault within which all must end
SHUTDOWN = 90.0  # seconds within which a worker must end after SIGTERM
SAY_INTERVAL = 10.0  # seconds between lines on what is left
CELERY_LINE = "worker: Warm shutdown"  # its only line that is no JSON
SHOWN = 8  # problems shown of each promise


class Fate(NamedTuple):
    """The fault of the sandbox for an offer id with this suffix, and the state in which the confirmation must end."""

    suffix: str
    share: int
    ends: State = State.CONFIRMED


FATES = (
    Fate("", 46),
    Fate("~http-503~2", 8),
    Fate("~drop-after~1", 8),
    Fate("~drop-before~1", 7),
    Fate("~html~1", 6),
    Fate("~truncated~1", 6),
    Fate("~busy~1", 2),
    Fate("~http-422", 7, State.FAILED),
    Fate("~pending", 5, State.PENDING),
    Fate("~booked-text", 5),
)


@dataclass(frozen=True)
class Plan:
    """The parameters of a run.

    every: average seconds between faults; rate: jobs per second; hurry: whether the work of dead workers is dispatched
    again directly after the last fault, instead of after a minute; longest: maximum seconds of faults.
    """

    jobs: int = 2000
    workers: int = 2
    seed: int = 1
    every: float = 2.0
    rate: float = 20.0
    hurry: bool = False
    longest: float = 1200.0


@dataclass(frozen=True)
class Work:
    """What is published: offers with their fates, the messages in order, and the malformed ones among them."""

    offers: dict[str, Fate]
    messages: list[bytes]
    malformed: frozenset[bytes]


def plan_work(plan: Plan, dice: random.Random) -> Work:
    fates = dice.choices(FATES, [fate.share for fate in FATES], k=plan.jobs)
    offers = {f"chaos-{number}{fate.suffix}": fate for number, fate in enumerate(fates, 1)}
    due: list[tuple[float, bytes]] = []
    for position, offer in enumerate(offers):
        due.append((position, content_of(offer)))
        if dice.random() < REPEATED:
            due.append((position + dice.choice((0.0, 10.0, 100.0)), content_of(offer)))
    malformed = [malformed_job(number, dice) for number in range(max(4, round(plan.jobs * MALFORMED)))]
    due += [(dice.uniform(0, plan.jobs), body) for body in malformed]
    messages = [body for _, body in sorted(due, key=lambda message: message[0])]
    return Work(offers, messages, frozenset(malformed))


def content_of(offer: str) -> bytes:
    name = offer.split("~")[0]
    partner = f"P-{int(name.split('-')[1]) % PARTNERS}"
    quotes = [{"id": f"quote-{name}", "insured": [PERSON]}]
    return json.dumps(job(offer, partner_id=partner, quotes=quotes, policyholder=PERSON)).encode()


def malformed_job(number: int, dice: random.Random) -> bytes:
    good = content_of(f"malformed-{number}")
    broken = (
        good[:-2],
        good.replace(b'"P-', b'"P\xff'),
        good.replace(b'"policyholder"', b'"policyhodler"'),
        good.replace(b'"P-', b'"no / path'),
        good.replace(b"@", b" at "),
    )
    return dice.choice(broken)


# --- The parts of the system ---


@dataclass
class Parts:
    """All running parts, and the received events."""

    rabbitmq: RabbitMQ
    postgresql: PostgreSQL
    sandbox: Sandbox
    engine: Engine
    worker_pool: "WorkerPool"
    events: list[dict[str, Any]] = field(default_factory=list)  # in order of arrival, with repeats


class WorkerPool:
    """The workers. Each place has one worker at a time."""

    def __init__(self, places: int, environment: dict[str, str], folder: Path) -> None:
        self.environment = environment
        self.folder = folder
        self.workers: list[WorkerProcess] = []  # also those that have ended
        self.failures: list[str] = []
        self.longest_shutdown = 0.0
        self._lock = Lock()
        self._leaving: list[Thread] = []
        self.places = [self._new() for _ in range(places)]

    def _new(self) -> WorkerProcess:
        with self._lock:
            worker = WorkerProcess(self.environment, self.folder / f"worker-{len(self.workers) + 1}.log")
            self.workers.append(worker)
            return worker

    def refill(self, place: int) -> None:
        self.places[place] = self._new()

    def kill(self, place: int) -> None:
        """Sends SIGKILL to the worker of a place."""
        self._must_live(self.places[place])
        self.places[place].kill()

    def stop(self, place: int) -> None:
        """Sends SIGTERM. A thread checks that the worker ends in time, with exit code 0."""
        worker = self.places[place]
        if self._must_live(worker):
            worker.process.terminate()
            self._leaving.append(Thread(target=self._await_end, args=(worker,), daemon=True))
            self._leaving[-1].start()

    def close(self) -> None:
        """Dismisses all workers, and waits until they have ended."""
        for place in range(len(self.places)):
            self.stop(place)
        for thread in self._leaving:
            thread.join()

    def kill_all(self) -> None:
        for worker in self.workers:
            worker.kill()

    def _must_live(self, worker: WorkerProcess) -> bool:
        code = worker.process.poll()
        if code is not None:
            self.failures.append(f"{worker.log.name} ended by itself with exit code {code}")
        return code is None

    def _await_end(self, worker: WorkerProcess) -> None:
        started = time.monotonic()
        try:
            code = worker.process.wait(SHUTDOWN)
        except TimeoutExpired:
            worker.kill()
            self.failures.append(f"{worker.log.name} had not ended {SHUTDOWN:.0f} s after SIGTERM")
        else:
            self.longest_shutdown = max(self.longest_shutdown, time.monotonic() - started)
            was_starting = code == -SIGTERM and not worker.log.read_text()  # the worker had no signal handler yet
            if code != 0 and not was_starting:
                self.failures.append(f"{worker.log.name} ended with exit code {code} after SIGTERM")


@contextmanager
def running(plan: Plan, folder: Path) -> Iterator[Parts]:
    """Starts servers, sandbox and workers."""
    with ExitStack() as stack:
        rabbitmq, postgresql = RabbitMQ(folder / "rabbitmq"), PostgreSQL(folder / "postgresql")
        for server in (rabbitmq, postgresql):
            stack.callback(server.kill)
            server.start()
        postgresql.create_database(DATABASE)
        engine = database.connect(postgresql.url(DATABASE))
        stack.callback(engine.dispose)
        migrator.upgrade(engine)
        with broker.connect(rabbitmq.url) as connection:
            topology.declare(connection)
            EVENTS(connection.channel()).declare()
        rabbitmq.flush()
        sandbox = stack.enter_context(Sandbox(port=free_port(), latency=0.05))
        sandbox.latency_jitter = 0.25
        environment = {
            **SETTINGS,
            "BROKER_URL": rabbitmq.url,
            "DATABASE_URL": postgresql.url(DATABASE),
            "DATA_KEYS": Fernet.generate_key().decode(),
            "XONE_BASE_URL": sandbox.url,
            "XONE_CLIENT_ID": sandbox.client_id,
            "XONE_CLIENT_SECRET": sandbox.client_secret,
        }
        worker_pool = WorkerPool(plan.workers, environment, folder)
        stack.callback(worker_pool.kill_all)
        yield Parts(rabbitmq, postgresql, sandbox, engine, worker_pool)


def publish(url: str, messages: Sequence[bytes], rate: float, over: Event) -> None:
    """The checkout: publishes jobs at a rate per second, and keeps each until the broker has confirmed it."""
    started = time.monotonic()
    waiting: dict[int, Message] = {}
    published_count = 0
    with Publisher(url, confirm_timeout=10) as publisher:
        while (waiting or published_count < len(messages)) and not over.wait(0.1):
            due = min(int((time.monotonic() - started) * rate) + 1, len(messages))
            waiting |= {
                number: Message(number, messages[number], topology.confirm_offer.name, topology.JOBS)
                for number in range(published_count, due)
            }
            published_count = due
            with ignore_outages():
                for number in publisher.publish(waiting.values()):
                    del waiting[number]


def consume(parts: Parts, over: Event) -> None:
    """The consumer: acknowledges an event after it is stored."""
    while not over.is_set():
        with ignore_outages(), broker.connect(parts.rabbitmq.url) as connection:
            channel = connection.channel()
            while not over.wait(0.05):
                while message := channel.basic_get(EVENTS.name):
                    parts.events.append(json.loads(message.body))
                    channel.basic_ack(message.delivery_tag)
        over.wait(0.2)


@contextmanager
def ignore_outages() -> Iterator[None]:
    """Ignores that broker or database is unavailable: the caller tries again."""
    try:
        yield
    except Exception as error:
        if not (broker.is_away(error) or database.is_away(error)):
            raise


# --- Faults ---


class Fault(NamedTuple):
    """A fault. Two faults of one target never overlap.

    ``strike(parts, place, seconds)`` returns when the target works again. place: of the worker; seconds: how long.
    """

    share: int
    target: str
    strike: Callable[[Parts, int, float], None]


def kill_worker(parts: Parts, place: int, seconds: float) -> None:
    parts.worker_pool.kill(place)
    time.sleep(seconds / 2)
    parts.worker_pool.refill(place)


def stop_worker(parts: Parts, place: int, seconds: float) -> None:
    parts.worker_pool.stop(place)
    time.sleep(seconds / 2)
    parts.worker_pool.refill(place)


def restart_rabbitmq(parts: Parts, _place: int, seconds: float) -> None:
    parts.rabbitmq.stop()
    time.sleep(seconds / 2)
    parts.rabbitmq.start()


def kill_rabbitmq(parts: Parts, _place: int, seconds: float) -> None:
    parts.rabbitmq.kill()
    time.sleep(seconds / 2)
    parts.rabbitmq.start()


def kill_postgresql(parts: Parts, _place: int, seconds: float) -> None:
    parts.postgresql.kill()
    time.sleep(seconds)
    parts.postgresql.start()


def hang_up(parts: Parts, _place: int, seconds: float) -> None:
    parts.sandbox.down = True
    time.sleep(seconds)
    parts.sandbox.down = False


def close_port(parts: Parts, _place: int, seconds: float) -> None:
    parts.sandbox.stop()
    time.sleep(seconds)
    parts.sandbox.start()


def answer_only(status: int) -> Callable[[Parts, int, float], None]:
    def strike(parts: Parts, _place: int, seconds: float) -> None:
        parts.sandbox.status_for_all = status
        time.sleep(seconds)
        parts.sandbox.status_for_all = None

    return strike


def revoke_tokens(parts: Parts, _place: int, _seconds: float) -> None:
    parts.sandbox.revoke_tokens()


FAULTS = {
    "worker killed": Fault(20, "worker", kill_worker),
    "worker stopped": Fault(20, "worker", stop_worker),
    "RabbitMQ restarted": Fault(6, "RabbitMQ", restart_rabbitmq),
    "RabbitMQ killed": Fault(10, "RabbitMQ", kill_rabbitmq),
    "PostgreSQL killed": Fault(16, "PostgreSQL", kill_postgresql),
    "XONE hangs up": Fault(5, "XONE", hang_up),
    "XONE is gone": Fault(5, "XONE", close_port),
    "XONE answers 500": Fault(4, "XONE", answer_only(500)),
    "XONE answers 503": Fault(4, "XONE", answer_only(503)),
    "tokens revoked": Fault(10, "tokens", revoke_tokens),
}


def strike_until(
    calm: Event, parts: Parts, plan: Plan, dice: random.Random, say: Callable[[str], None]
) -> Counter[str]:
    """Causes random faults until ``calm``. Returns their numbers by name, when all targets work again."""
    struck: Counter[str] = Counter()
    under_way: dict[str, Future[None]] = {}
    with ThreadPoolExecutor() as pool:
        while not calm.wait(dice.uniform(0.5, 1.5) * plan.every):
            (name,) = dice.choices(list(FAULTS), [fault.share for fault in FAULTS.values()])
            place, seconds = dice.randrange(plan.workers), dice.uniform(0.5, 4)
            target = FAULTS[name].target
            target = f"worker {place + 1}" if target == "worker" else target
            if target in under_way:
                if not under_way[target].done():
                    continue
                under_way[target].result()
            struck[name] += 1
            say(f"{name}" + (f" ({target})" if target.startswith("worker") else ""))
            under_way[target] = pool.submit(FAULTS[name].strike, parts, place, seconds)
    for strike in under_way.values():
        strike.result()
    return struck


# --- The end ---


@dataclass(frozen=True)
class Evidence:
    """The final state, upstream, in the database, in the broker and in the logs."""

    work: Work
    left: list[str]  # what had not ended in time
    sandbox: Sandbox
    confirmations: dict[str, Row[Any]]  # by offer
    attempts: dict[str, list[Row[Any]]]  # by offer
    stored: dict[str, str]  # booking ids by offer
    outbox: list[Row[Any]]
    events: list[dict[str, Any]]
    dead_letters: list[Any]
    logs: dict[str, list[str]]
    failures: list[str]

    @property
    def offers(self) -> dict[str, Fate]:
        return self.work.offers

    def booking_events(self, *types: str) -> dict[str, set[tuple[str, str]]]:
        """Event ids and booking ids of received events of these types, by offer."""
        published: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        for event in self.events:
            if event["type"] in types:
                published[event["data"]["offer_id"]].add((event["id"], event["data"]["booking"]["id"]))
        return published

    def describe(self, offer: str) -> str:
        """A confirmation and its attempts, as text for a problem."""
        row = self.confirmations.get(offer)
        if row is None:
            return "no confirmation"
        attempts = ", ".join(f"{each.number} {each.outcome} {each.code or ''}".strip() for each in self.attempts[offer])
        return f"{row.state} {row.error_code or ''} {row.error_detail or ''} attempts: {attempts}"


def gather(parts: Parts, work: Work, left: list[str]) -> Evidence:
    """Collects the evidence after the workers have ended."""
    attempts: dict[str, list[Row[Any]]] = defaultdict(list)
    with parts.engine.connect() as connection:
        confirmations = {row.offer_id: row for row in connection.execute(select(Confirmation.__table__))}
        query = select(Confirmation.offer_id, Attempt.__table__).join(
            Attempt, Attempt.confirmation_id == Confirmation.id
        )
        for row in connection.execute(query.order_by(Attempt.number)):
            attempts[row.offer_id].append(row)
        query = select(Confirmation.offer_id, Booking.id).join(Booking, Booking.confirmation_id == Confirmation.id)
        stored = {row.offer_id: row.id for row in connection.execute(query)}
        outbox = list(connection.execute(select(OutboxEvent.__table__).order_by(OutboxEvent.sequence)))
    dead_letters = []
    with broker.connect(parts.rabbitmq.url) as connection:
        channel = connection.channel()
        while message := channel.basic_get(topology.DEAD_LETTERS, no_ack=True):
            dead_letters.append(message)
    return Evidence(
        work,
        left,
        parts.sandbox,
        confirmations,
        attempts,
        stored,
        outbox,
        parts.events,
        dead_letters,
        {worker.log.name: worker.log.read_text(errors="replace").splitlines() for worker in parts.worker_pool.workers},
        parts.worker_pool.failures,
    )


def find_left(parts: Parts, work: Work) -> list[str]:
    """What has not ended yet."""
    with parts.engine.connect() as connection:
        states = states_of(connection.execute(select(Confirmation.state, func.count()).group_by(Confirmation.state)))
        dispatched = connection.execute(
            select(func.count()).select_from(Confirmation).where(Confirmation.dispatched_until > now())
        ).scalar_one()
        outbox = {
            str(row.id): row.published_at
            for row in connection.execute(select(OutboxEvent.id, OutboxEvent.published_at))
        }
    received = {event["id"] for event in list(parts.events)}
    counts = {
        "jobs are no confirmations": len(work.offers) - states.total(),
        **{f"confirmations are {state}": states[state] for state in State if state not in ENDED},
        "events are not published": sum(published_at is None for published_at in outbox.values()),
        "events were not received": len(outbox.keys() - received),
    }
    left = [f"{count} {problem}" for problem, count in counts.items() if count]
    if left and dispatched:
        left.append(f"{dispatched} resume messages count as under way")
    return left or queues_left(parts.rabbitmq)


def states_of(rows: Any) -> Counter[State]:
    return Counter({State(state): count for state, count in rows})


def queues_left(rabbitmq: RabbitMQ) -> list[str]:
    """The queues, except dead letters, with messages that wait or are not acknowledged."""
    table = rabbitmq.ctl("list_queues", "--no-table-headers", "name", "messages_ready", "messages_unacknowledged")
    rows = [line.split("\t") for line in table.splitlines()]
    return [
        f"{name} holds {ready} messages, {unacknowledged} are not acknowledged"
        for name, ready, unacknowledged in rows
        if name != topology.DEAD_LETTERS and (ready, unacknowledged) != ("0", "0")
    ]


# --- The promises ---


def expected_ends(evidence: Evidence) -> Iterator[str]:
    for offer, fate in evidence.offers.items():
        row = evidence.confirmations.get(offer)
        if row is None or (row.state != fate.ends and not is_explained(evidence, offer)):
            yield f"{offer}: {evidence.describe(offer)}"
    yield from (f"{offer} was never published" for offer in evidence.confirmations.keys() - evidence.offers.keys())


def is_explained(evidence: Evidence, offer: str) -> bool:
    """Whether a refusal led to needs_review because an earlier attempt is unknown: XONE may have booked."""
    earlier = evidence.attempts[offer][:-1]
    needs_review = evidence.confirmations[offer].state == State.NEEDS_REVIEW
    was_unknown = any(attempt.outcome == Outcome.UNKNOWN for attempt in earlier)
    return needs_review and evidence.offers[offer].ends == State.FAILED and was_unknown


def same_bookings(evidence: Evidence) -> Iterator[str]:
    upstream = {offer: booking["id"] for (_, offer), booking in evidence.sandbox.bookings.items()}
    published = {
        offer: {booking for _, booking in pairs} for offer, pairs in evidence.booking_events(*BOOKED_EVENTS).items()
    }
    for offer in sorted(upstream.keys() | evidence.stored.keys() | published.keys()):
        ids = {upstream.get(offer)}, {evidence.stored.get(offer)}, published.get(offer, {None})
        if not ids[0] == ids[1] == ids[2]:
            yield f"{offer}: upstream {ids[0]}, stored {ids[1]}, published {ids[2]}; {evidence.describe(offer)}"


def no_double_call(evidence: Evidence) -> Iterator[str]:
    if evidence.sandbox.double_bookings:
        yield f"{evidence.sandbox.double_bookings} double bookings"
    yield from (
        f"{offer} was called twice at once; {evidence.describe(offer)}" for _, offer in evidence.sandbox.overlapping
    )


def published_once(evidence: Evidence) -> Iterator[str]:
    for offer, events in evidence.booking_events(*BOOKED_EVENTS).items():
        if len(events) > 1:
            yield f"{offer}: events {sorted(events)}; {evidence.describe(offer)}"


def sequences(evidence: Evidence) -> Iterator[str]:
    outbox: dict[str, list[tuple[int, str]]] = defaultdict(list)
    received: dict[str, dict[str, int]] = defaultdict(dict)
    for row in evidence.outbox:
        outbox[row.aggregateid.split("/")[1]].append((row.sequence, row.type))
    for event in evidence.events:
        received[event["data"]["offer_id"]].setdefault(event["id"], event["data"]["sequence"])
    for offer, row in evidence.confirmations.items():
        written = outbox[offer]
        whole = list(range(1, len(written) + 1))
        if not whole or [number for number, _ in written] != whole or written[-1][1] != EVENT_OF.get(row.state):
            yield f"{offer}: outbox {written}; {evidence.describe(offer)}"
        if list(received[offer].values()) != whole:
            yield f"{offer}: received {list(received[offer].values())}, outbox {written}"


def dead_letters(evidence: Evidence) -> Iterator[str]:
    bodies = {bytes_of(message.body): message for message in evidence.dead_letters}
    yield from (f"not there: {body!r}" for body in evidence.work.malformed - bodies.keys())
    for body, message in bodies.items():
        if body not in evidence.work.malformed or message.headers.get("x-dead-letter-code") == "poison":
            yield f"{message.headers} {body!r}"


def bytes_of(body: Any) -> bytes:
    return body if isinstance(body, bytes) else str(body).encode()


def all_received(evidence: Evidence) -> Iterator[str]:
    received = {event["id"] for event in evidence.events}
    for row in evidence.outbox:
        if str(row.id) not in received:
            yield f"{row.type} of {row.aggregateid}, published at {row.published_at}"
    yield from (
        f"event {unknown} is not in the outbox" for unknown in received - {str(row.id) for row in evidence.outbox}
    )


def no_defect(evidence: Evidence) -> Iterator[str]:
    for name, lines in evidence.logs.items():
        for line in lines:
            is_defect = line.startswith("{") and json.loads(line).get("event") in ("defect", "second_booking")
            is_foreign = line and not line.startswith(("{", CELERY_LINE))
            if is_defect or is_foreign:
                yield f"{name}: {line}"


def no_personal_data(evidence: Evidence) -> Iterator[str]:
    for log, lines in evidence.logs.items():
        for line in lines:
            if any(PERSON[name] in line for name in ("first_name", "last_name", "email")):
                yield f"{log}: {line}"


PROMISES: dict[str, Callable[[Evidence], Iterator[str]]] = {
    "all ended in time, and the queues are empty": lambda evidence: iter(evidence.left),
    "every job has a confirmation that ended in the expected state": expected_ends,
    "bookings upstream, stored and published are the same": same_bookings,
    "no offer was booked twice or called twice at once": no_double_call,
    "no booking was published in two events": published_once,
    "events are numbered without a gap and arrive in order": sequences,
    "every malformed job is a dead letter, and nothing else is": dead_letters,
    "every event of the outbox was received": all_received,
    "the logs of workers have no defect": no_defect,
    "the logs of workers have no personal data": no_personal_data,
    "no worker ended by itself, or did not end when asked": lambda evidence: iter(evidence.failures),
}


@dataclass(frozen=True)
class Report:
    """The result of a run: problems by promise, and further facts."""

    problems: dict[str, list[str]]
    facts: dict[str, Any]

    @property
    def broken(self) -> dict[str, list[str]]:
        return {promise: problems for promise, problems in self.problems.items() if problems}


def run(plan: Plan, folder: Path, say: Callable[[str], None] = lambda _: None) -> Report:
    """Makes a whole run. folder: for data of servers and logs of workers; say: called with a line for each fault."""
    dice = random.Random(plan.seed)
    work = plan_work(plan, dice)
    with running(plan, folder) as parts, ThreadPoolExecutor() as pool:
        calm, over = Event(), Event()
        started = time.monotonic()

        def say_with_time(line: str) -> None:
            say(f"{time.monotonic() - started:7.1f} s  {line}")

        try:
            consuming = pool.submit(consume, parts, over)
            publishing = pool.submit(publish, parts.rabbitmq.url, work.messages, plan.rate, over)
            striking = pool.submit(strike_until, calm, parts, plan, dice, say_with_time)
            until_enough(parts, plan, [consuming, publishing, striking])
            calm.set()
            struck = striking.result()
            calm_since = time.monotonic()
            say_with_time("no more faults")
            parts.engine.dispose()  # connections from before the last fault
            if plan.hurry:
                forget_dispatches(parts)
            left = until_settled(parts, work, publishing, say_with_time)
            ended = time.monotonic()
            say_with_time("settled" if not left else f"not settled: {'; '.join(left)}")
            parts.worker_pool.close()
        finally:
            calm.set()
            over.set()
        for thread in (publishing, consuming):
            thread.result()
        evidence = gather(parts, work, left)
        problems = {promise: list(check(evidence)) for promise, check in PROMISES.items()}
    states = Counter(row.state for row in evidence.confirmations.values())
    slowest = max(evidence.confirmations.values(), key=duration_of, default=None)
    facts = {
        "seed": plan.seed,
        "jobs": f"{plan.jobs}, {len(work.messages)} messages, {len(work.malformed)} malformed",
        "confirmations": ", ".join(f"{count} {state}" for state, count in states.most_common()),
        "needs review": ", ".join(
            offer for offer, row in evidence.confirmations.items() if row.state == "needs_review"
        ),
        "calls of XONE": f"{len(parts.sandbox.calls)} for {len(parts.sandbox.bookings)} bookings",
        "events": f"{len(evidence.outbox)} written, {len(evidence.events)} received",
        "dead letters": len(evidence.dead_letters),
        "workers started": len(parts.worker_pool.workers),
        "longest shutdown": f"{parts.worker_pool.longest_shutdown:.1f} s",
        "faults": ", ".join(f"{count} {name}" for name, count in sorted(struck.items())) + f"; {struck.total()} in all",
        "took": f"{ended - started:.1f} s, of which {ended - calm_since:.1f} s after the last fault",
        "slowest confirmation": f"{duration_of(slowest):.1f} s, {slowest.offer_id}, {slowest.attempts} attempts"
        if slowest
        else "none",
    }
    return Report(problems, facts)


def duration_of(row: Row[Any]) -> float:
    """Seconds from the acceptance of a job to its end."""
    return float((row.updated_at - row.created_at).total_seconds())


def until_enough(parts: Parts, plan: Plan, threads: Sequence[Future[Any]]) -> None:
    """Waits until most confirmations have ended, or the maximum time of faults is over."""
    ends_at = time.monotonic() + min(2 * plan.jobs / plan.rate + FAULTS_END, plan.longest)
    while time.monotonic() < ends_at:
        for thread in threads:
            if thread.done():
                thread.result()
        with ignore_outages(), parts.engine.connect() as connection:
            states = states_of(
                connection.execute(select(Confirmation.state, func.count()).group_by(Confirmation.state))
            )
            if threads[1].done() and sum(states[state] for state in ENDED) >= ENOUGH * plan.jobs:
                return
        time.sleep(0.3)


def forget_dispatches(parts: Parts) -> None:
    """Ends the minute for which resume messages and events count as under way. They may be sent twice."""
    with parts.engine.begin() as connection:
        connection.execute(update(Confirmation).values(dispatched_until=None))
        connection.execute(update(OutboxEvent).where(OutboxEvent.published_at.is_(None)).values(claimed_until=None))


def until_settled(parts: Parts, work: Work, publishing: Future[None], say: Callable[[str], None]) -> list[str]:
    """Waits until all has ended, for SETTLE seconds at most. Returns what is left."""
    ends_at = time.monotonic() + SETTLE
    said_at = time.monotonic()
    left = ["nothing is known"]
    while time.monotonic() < ends_at:
        with ignore_outages():
            left = find_left(parts, work)
            if not publishing.done():
                left.append("not all jobs are published")
            if not left:
                break
        if time.monotonic() > said_at + SAY_INTERVAL:
            said_at = time.monotonic()
            say(f"left: {'; '.join(left)}")
        time.sleep(0.3)
    return left


@click.command(help=__doc__)
@click.option("--jobs", default=2000, show_default=True, type=click.IntRange(1))
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--seed", type=int, help="Repeats the jobs and the faults of an earlier run; else one at random.")
@click.option("--every", default=2.0, show_default=True, type=click.FloatRange(0.1), help="Seconds between faults.")
@click.option("--rate", default=20.0, show_default=True, type=click.FloatRange(0.1), help="Jobs a second.")
@click.option("--hurry", is_flag=True, help="Dispatch the work of dead workers at once.")
@click.option("--keep", is_flag=True, help="Keep the logs in any case.")
def main(jobs: int, workers: int, seed: int | None, every: float, rate: float, hurry: bool, keep: bool) -> None:
    plan = Plan(jobs, workers, random.randrange(1_000_000) if seed is None else seed, every, rate, hurry)
    folder = Path(tempfile.mkdtemp(prefix="confirm-offer-chaos-"))
    click.echo(f"seed {plan.seed}, logs in {folder}")
    report = run(plan, folder, click.echo)
    for promise, problems in report.problems.items():
        click.echo(f"{'WRONG' if problems else 'ok':5}  {promise}" + (f": {len(problems)} not" if problems else ""))
        for problem in problems[:SHOWN]:
            click.echo(f"         {problem[:1000]}")
    for name, fact in report.facts.items():
        click.echo(f"{name:>22}  {fact}")
    if report.broken:
        sys.exit(1)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

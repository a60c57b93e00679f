"""Checks the work that the database holds: clock, data keys, what is overdue, what waits for a person."""

import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, select

from models.states import PURGEABLE, BatchState, State
from models.tables import Batch, Confirmation, OutboxEvent, Pause
from tasks.operations import failures, workers
from tasks.operations.failures import PendingCount, in_literally
from tasks.operations.pauses import paused_scope, resume_command
from tasks.operations.workers import StoppedCalls
from worker.doctor.finding import Finding
from worker.errors import DecryptionError
from worker.formatting import duration, pluralize
from worker.settings import EncryptionSettings
from worker.storage.database import now, now_plus, oldest_transaction, seconds_since
from worker.storage.encryption import Encryption
from worker.storage.pause_cache import ALL

MAX_SKEW = 5.0  # seconds
LATE = 60.0  # seconds; Scheduler and Relay run several times a second
OLD_TRANSACTION = 600.0  # seconds
PENDING_FOR_LONG = 86400.0  # seconds
MAX_ROWS = 100_000  # counted at most
KEYS = "data keys"


def check(connection: Connection, encryption: EncryptionSettings | None) -> Iterator[Finding]:
    yield _clock(connection)
    if (ahead := _ahead(connection)) > MAX_SKEW:
        yield Finding.warning(
            "stored times",
            f"the newest confirmation was stored {duration(ahead)} after now: the database's clock was set back",
            "let it keep time by NTP (timedatectl); workers bring due times back by themselves",
        )
    if encryption is not None:
        yield _keys(connection, Encryption(encryption.keys))
    paused = list(connection.execute(select(Pause.partner_id).order_by(Pause.partner_id)).scalars())
    if paused:
        scopes, commands = list(map(paused_scope, paused)), list(map(resume_command, paused))
        yield Finding.warning("calls", f"paused by a person for {_first_few(scopes)}", _first_few(commands))
    running = workers.running(connection)
    yield Finding.ok("workers", workers.summary(running) if running else "none runs with this database just now")
    for stop in workers.stopped_calls(running):
        yield Finding.warning("calls", str(stop), _remedy_of_stop(stop))
    oldest = oldest_transaction(connection)
    if oldest is not None and oldest.seconds > OLD_TRANSACTION:
        session = f"{oldest.application or 'a session without a name'}, process {oldest.pid}"
        yield Finding.warning(
            "transactions",
            f"one has been open for {duration(oldest.seconds)} ({session}): PostgreSQL keeps all that has ended since",
            f"end that session, or: select pg_terminate_backend({oldest.pid})",
        )
    yield _due(connection, paused)
    yield _events(connection)
    if reviews := _count(connection, in_literally(State.NEEDS_REVIEW)):
        message = f"{pluralize(reviews, 'confirmation waits', 'confirmations wait')} for a person"
        yield Finding.warning("review", message, "confirm-offer failed --list --include-needs-review")
    if (pending := failures.pending(connection, None)) is not None:
        yield _pending(connection, pending)
    batches = list(connection.execute(select(Batch.id).where(Batch.state == BatchState.PAUSED)).scalars())
    if batches:
        message = f"{pluralize(len(batches), 'batch is', 'batches are')} paused"
        yield Finding.warning("batches", message, _first_few([f"confirm-offer batch resume {id_}" for id_ in batches]))


def _pending(connection: Connection, pending: PendingCount) -> Finding:
    age = (connection.execute(select(now())).scalar_one() - pending.since).total_seconds()
    message = (
        f"{pluralize(pending.count, 'booking is', 'bookings are')} pending at XONE, the oldest for {duration(age)}"
    )
    if age < PENDING_FOR_LONG:
        return Finding.ok("pending", message)
    return Finding.warning("pending", message, 'docs/runbook.md, "Bookings stay pending"; confirm-offer refresh OFFER')


def _remedy_of_stop(stop: StoppedCalls) -> str:
    if stop.code == "credentials":
        return "check XONE_CLIENT_ID and XONE_CLIENT_SECRET; jobs wait, and go on by themselves"
    if stop.code == "path":
        return "set XONE_CONFIRM_PATH: on XONE's newer page it ends in /confirm; then restart the workers"
    return "jobs wait, and go on by themselves: docs/runbook.md has what to ask XONE"


def _clock(connection: Connection) -> Finding:
    """Due times follow the database's clock. Logs, and filters of commands (--since 3h), follow this machine's."""
    before = time.time()
    database_time = connection.execute(select(now())).scalar_one().timestamp()
    local_time = (before + time.time()) / 2
    if abs(database_time - local_time) > MAX_SKEW:
        relation = "behind" if database_time > local_time else "ahead of"
        return Finding.warning(
            "clock",
            f"this machine is {duration(abs(database_time - local_time))} {relation} the database",
            "let both keep time by NTP (timedatectl)",
        )
    return Finding.ok("clock", f"within {MAX_SKEW:g} s of the database's")


def _ahead(connection: Connection) -> float:
    """Seconds by which the times of the newest confirmations are ahead of the database's clock; 0 if they are not."""
    newest = select(Confirmation.created_at, Confirmation.updated_at).order_by(Confirmation.id.desc()).limit(10)
    times = [moment for row in connection.execute(newest) for moment in row]
    at = connection.execute(select(now())).scalar_one()
    return max((moment - at).total_seconds() for moment in times) if times else 0.0


def _keys(connection: Connection, encryption: Encryption) -> Finding:
    """Decrypts the newest body, and the one that has not been changed for longest."""
    bodies = select(Confirmation.id, Confirmation.sealed_body).where(Confirmation.sealed_body.is_not(None)).limit(1)
    ended = in_literally(*PURGEABLE)
    rows = [
        *connection.execute(bodies.order_by(Confirmation.id.desc())),
        *connection.execute(bodies.where(ended, Confirmation.purged_at.is_(None)).order_by(Confirmation.updated_at)),
    ]
    if not rows:
        return Finding.ok(KEYS, "valid; nothing is stored yet that they would have to open")
    for row in rows:
        try:
            encryption.decrypt(row.id, "body", row.sealed_body)
        except DecryptionError:
            which = "newest" if row is rows[0] else "oldest"
            return Finding.error(
                KEYS,
                f"the {which} that is stored opens with none of DATA_KEYS",
                "add the key that was in use when it was stored, behind the others",
            )
    if not all(encryption.is_current(row.sealed_body) for row in rows):
        message = "something stored opens with an older key only"
        return Finding.warning(KEYS, message, "keep all keys, or: confirm-offer rekey")
    return Finding.ok(KEYS, "the first opens the newest and the oldest that is stored")


def _due(connection: Connection, paused: list[str]) -> Finding:
    is_late = Confirmation.due_at <= now_plus(-LATE)
    late = 0 if ALL in paused else _count(connection, is_late, Confirmation.partner_id.not_in(paused))
    if not late:
        return Finding.ok("due", "nothing that is due waits")
    oldest = connection.execute(select(func.max(seconds_since(Confirmation.due_at))).where(is_late)).scalar_one()
    return Finding.warning(
        "due",
        f"{_counted(late)} should have been tried before, the oldest {duration(oldest)} ago",
        "confirm-offer failed names what they wait for; confirm-offer health, where workers run, whether they are well",
    )


def _events(connection: Connection) -> Finding:
    is_late = (OutboxEvent.published_at.is_(None), OutboxEvent.created_at <= now_plus(-LATE))
    oldest = connection.execute(
        select(seconds_since(OutboxEvent.created_at)).where(*is_late).order_by(OutboxEvent.created_at).limit(1)
    ).scalar()
    if oldest is None:
        return Finding.ok("outbox", "no event waits to be published")
    late = connection.execute(_limited(select(OutboxEvent.id).where(*is_late))).scalar_one()
    what = "event waits" if late == 1 else "events wait"
    return Finding.warning(
        "outbox",
        f"{_counted(late)} {what} to be published, the oldest for {duration(oldest)}",
        "fix the broker if it is wrong; else run a worker with the part relay, and see its log",
    )


def _count(connection: Connection, *conditions: ColumnElement[bool]) -> int:
    return int(connection.execute(_limited(select(Confirmation.id).where(*conditions))).scalar_one())


def _limited(query: Select[Any]) -> Select[Any]:
    return select(func.count()).select_from(query.limit(MAX_ROWS).subquery())


def _counted(number: int) -> str:
    return f"{number:,}" + (" or more" if number == MAX_ROWS else "")


def _first_few(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (" …" if len(texts) > 3 else "")

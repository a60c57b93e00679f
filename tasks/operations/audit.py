"""The audit: every command that changes something leaves a row."""

import os
import pwd
import socket
import time
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from sqlalchemy import Connection, Engine, insert, select, update

from models.tables import AuditEntry
from worker.setting_types import person
from worker.settings import OperatorSettings, read
from worker.storage.database import now

WRITE_EVERY = 1.0  # seconds between two writes of a count that grows

_claimed: ContextVar[str | None] = ContextVar("claimed", default=None)


def claim(name: str | None) -> None:
    """Who a person says to be (``--by``), for this command. Raises ValueError if it is no name.

    None for whom CONFIRM_OFFER_USER names, if anyone.
    """
    _claimed.set(person(name) or read(OperatorSettings).CONFIRM_OFFER_USER)


def claimed() -> str | None:
    """Whom ``claim`` named."""
    return _claimed.get()


def who() -> str:
    """``user@host``, by the system's user id and not by variables such as LOGNAME; beside it, whom ``claim`` named."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user without a name
        user = f"uid-{os.geteuid()}"
    on_system = f"{user}@{socket.gethostname()}"
    name = claimed()
    return f"{name} ({on_system})" if name else on_system


def audit(connection: Connection, command: str, by: str, reason: str | None, count: int, **details: Any) -> int:
    """Writes an audit row and returns its id.

    by: of who(); count: confirmations, letters or events that were changed; details: ids, filters and numbers, no
    personal data.
    """
    return connection.execute(
        insert(AuditEntry)
        .values(at=now(), by=by, command=command, reason=reason, count=count, details=details)
        .returning(AuditEntry.id)
    ).scalar_one()


@dataclass(frozen=True)
class AuditRow:
    """A row of the audit, as JSON shows it."""

    id: int
    at: datetime
    by: str
    command: str
    reason: str | None
    count: int
    details: dict[str, Any]


def entries(
    connection: Connection, limit: int, since: datetime | None = None, by: str | None = None, command: str | None = None
) -> list[AuditRow]:
    """The newest rows, newest first. by: a part of who it was, in any case; command: how it begins."""
    query = select(AuditEntry.__table__).order_by(AuditEntry.id.desc()).limit(limit)
    if since is not None:
        query = query.where(AuditEntry.at >= since)
    if by is not None:
        query = query.where(AuditEntry.by.icontains(by, autoescape=True))
    if command is not None:
        query = query.where(AuditEntry.command.startswith(command, autoescape=True))
    return [AuditRow(**row._mapping) for row in connection.execute(query)]


class Tally:
    """An audit row whose count grows with the work.

    It is written before the first change, so a command that is killed leaves it too.
    """

    def __init__(self, engine: Engine, command: str, reason: str | None = None, **details: Any) -> None:
        self._engine = engine
        self._count = 0
        self._written_at = time.monotonic()
        with engine.begin() as connection:
            self._id = audit(connection, command, who(), reason, 0, **details)

    def add(self, number: int) -> None:
        """Counts so many more; writes the row at most once in WRITE_EVERY seconds."""
        self._count += number
        if time.monotonic() - self._written_at >= WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Writes the count."""
        with self._engine.begin() as connection:
            connection.execute(update(AuditEntry).where(AuditEntry.id == self._id).values(count=self._count))
        self._written_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self.write()
        else:
            with suppress(Exception):  # the first error is the one to report
                self.write()

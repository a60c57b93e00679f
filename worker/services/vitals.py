"""Vitals: each worker notes in the database how it is and what keeps its calls to XONE from passing.

All commands can then say why nothing moves, wherever they run. A process of the prefork pool has calls of its own, and
a row of its own while they are stopped.
"""

import os
import socket
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from typing import Any

from sqlalchemy import Connection, bindparam, delete
from sqlalchemy.exc import SQLAlchemyError
from uuid_utils.compat import uuid4

from models.exact_json import moment
from models.tables import WorkerVitals
from tasks.operations import pauses, workers
from tasks.operations.pauses import paused_scope, resume_command
from worker.formatting import local_time
from worker.runtime import Runtime
from worker.services.service import Service
from worker.storage.database import insert_or_update, now, now_once

WORKER_ID = uuid4()  # of the worker that this process is, or whose pool it is of: a child has its parent's
FORGOTTEN_AFTER = 86400.0  # seconds since a worker that died was last seen
MAX_STOPS = 20  # noted of one process: a list of bookings each
MAX_NOTED = 5  # of what the health file says


class Vitals(Service):
    """Writes the row of this process every few seconds, and removes it in the end."""

    name = "vitals"
    interval = 3.0

    def __init__(self, runtime: Runtime, is_child: bool = False) -> None:
        """is_child: whether this is a process of the prefork pool."""
        super().__init__()
        self._runtime = runtime
        self._id = uuid4()
        self._is_child = is_child
        self._is_noted = False
        self.notes: list[dict[str, str]] = []  # what keeps calls of this worker from passing, for its health file
        self.unwell: list[str] = []  # the parts of the worker that are not well, as Health sets them

    def run_once(self) -> bool:
        stops = self._runtime.xone.calls.stops()[:MAX_STOPS] if "xone" in self._runtime.__dict__ else []
        if self._is_child and not stops:
            self._forget()
            return False
        with self._runtime.engine.begin() as connection:
            self._note(connection, {"unwell": self.unwell, "stops": [asdict(stop) for stop in stops]})
        if not self._is_child:
            with self._runtime.engine.connect() as connection:
                self.notes = self._what_stops_calls(connection)
        return False

    def stop(self, timeout: float = 3.0) -> None:
        """Waits only shortly: a row that stays because the database hangs does no harm."""
        super().stop(timeout)

    def _run(self) -> None:
        super()._run()
        with suppress(SQLAlchemyError):
            self._forget()

    def _note(self, connection: Connection, vitals: dict[str, Any]) -> None:
        row = {
            "id": self._id,
            "worker_id": WORKER_ID,
            "host": socket.gethostname()[:255],
            "pid": os.getpid(),
            "version": version("confirm-offer")[:64],
            "started_at": now(),
            "seen_at": now(),
            "vitals": {"concurrency": self._runtime.worker_settings.WORKER_CONCURRENCY, **vitals},
        }
        connection.execute(insert_or_update(connection.dialect.name, WorkerVitals, row, "id", "seen_at", "vitals"))
        if not self._is_noted:
            connection.execute(delete(WorkerVitals).where(WorkerVitals.seen_at < now_once(-FORGOTTEN_AFTER)))
        self._is_noted = True

    def _forget(self) -> None:
        if self._is_noted:
            with self._runtime.engine.begin() as connection:
                connection.execute(_FORGET, {"of": self._id})
            self._is_noted = False

    def _what_stops_calls(self, connection: Connection) -> list[dict[str, str]]:
        of_worker = [row for row in workers.running(connection) if row.worker_id == WORKER_ID]
        stopped = [_noted(stop.code, stop.since, str(stop)) for stop in workers.stopped_calls(of_worker)]
        paused = [
            _noted(
                "paused",
                pause.created_at,
                f"calls to XONE paused for {paused_scope(pause.partner_id)} since {local_time(pause.created_at)}: "
                f"{resume_command(pause.partner_id)}",
            )
            for pause in pauses.active(connection)
        ]
        return (paused + stopped)[:MAX_NOTED]


def _noted(code: str, since: datetime, text: str) -> dict[str, str]:
    return {"code": code, "since": moment(since), "text": text}


_FORGET = delete(WorkerVitals).where(WorkerVitals.id == bindparam("of"))

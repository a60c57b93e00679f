"""The workers that run, as they note it themselves, and what keeps their calls to XONE from passing."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, select

from models.call_stop import CallStop
from models.tables import WorkerVitals
from worker.formatting import local_time, pluralize
from worker.storage.database import now_once

SEEN_WITHIN = 30.0  # seconds; a worker notes its vitals every few


@dataclass(frozen=True)
class StoppedCalls:
    """What keeps calls of workers from passing, as JSON shows it.

    lookups, partner_id, probe_every: as in CallStop; until: the end of a throttle. workers: in how many of those that
    run it holds.
    """

    code: str
    since: datetime
    until: datetime | None
    probe_every: float | None
    lookups: bool
    partner_id: str | None
    workers: int
    running_workers: int

    @property
    def is_total(self) -> bool:
        """Whether no worker makes confirm calls for this reason."""
        return not self.lookups and self.workers == self.running_workers

    def concerns(self, partner_id: str) -> bool:
        return self.partner_id in (None, partner_id)

    def __str__(self) -> str:
        what = "calls to XONE stopped" if not self.lookups else "lists of bookings not read"
        whose = f" for partner {self.partner_id}" if self.partner_id is not None else ""
        until = f", until {local_time(self.until)}" if self.until is not None else ""
        probes = f", one probe every {self.probe_every:g} s" if self.probe_every is not None else ""
        where = "" if self.workers == self.running_workers else f", in {self.workers} of {self.running_workers} workers"
        return f"{what}{whose} since {local_time(self.since)} ({self.code}){until}{probes}{where}"


def running(connection: Connection) -> list[Row[Any]]:
    """The rows of worker processes that have been seen lately, the oldest first."""
    is_seen = WorkerVitals.seen_at > now_once(-SEEN_WITHIN)
    return list(connection.execute(select(WorkerVitals.__table__).where(is_seen).order_by(WorkerVitals.started_at)))


def stopped_calls(rows: list[Row[Any]]) -> list[StoppedCalls]:
    """What keeps calls from passing, the longest first. rows: as ``running`` returns them."""
    found: dict[tuple[str, bool, str | None], list[tuple[CallStop, Row[Any]]]] = defaultdict(list)
    for row in rows:
        for stop in (CallStop(**content) for content in row.vitals["stops"]):
            found[stop.code, stop.lookups, stop.partner_id].append((stop, row))
    of = len(worker_ids(rows))
    return sorted((_combined(stops, of) for stops in found.values()), key=lambda stopped: stopped.since)


def worker_ids(rows: list[Row[Any]]) -> set[UUID]:
    """Of the workers that these processes are of."""
    return {row.worker_id for row in rows}


def _combined(stops: list[tuple[CallStop, Row[Any]]], running_workers: int) -> StoppedCalls:
    first = stops[0][0]
    ends = [row.seen_at + timedelta(seconds=stop.ends_in) for stop, row in stops if stop.ends_in is not None]
    return StoppedCalls(
        first.code,
        since=min(row.seen_at - timedelta(seconds=stop.seconds) for stop, row in stops),
        until=max(ends, default=None),
        probe_every=max((stop.probe_every for stop, _ in stops if stop.probe_every is not None), default=None),
        lookups=first.lookups,
        partner_id=first.partner_id,
        workers=len(worker_ids([row for _, row in stops])),
        running_workers=running_workers,
    )


def summary(rows: list[Row[Any]]) -> str:
    """How many workers run, and where."""
    hosts = sorted({row.host for row in rows})
    places = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
    return f"{pluralize(len(worker_ids(rows)), 'worker runs', 'workers run')} on {places}"

"""Following up: what became of stored bookings, by their partner's list of bookings.

One reading of the list serves all pending bookings of a partner. A lease in the database lets one worker at a time read
a partner's list; its token decides who may record what a reading showed, so an older one changes nothing.

A booking that is not listed stays as it is, and a list that can't be read shows nothing.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog
from pydantic import ValidationError
from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    bindparam,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.orm import aliased
from uuid_utils.compat import uuid4

from models import booking as xone
from models.event import EventType, booking_data, error_data
from models.exact_json import write_exact
from models.same import canonical_id, differs_in_case_only, is_same_id, spellings
from models.states import BookingStatuses, State
from models.tables import Booking, Confirmation, FollowUp, Policy, is_pending
from tasks.record import EVENT_OF, lock_for_decision, lock_rows, next_sequence, write_event
from tasks.stored_booking import replace_booking
from worker.errors import DecryptionError
from worker.formatting import duration
from worker.observability import metrics
from worker.observability.sentry import report
from worker.runtime import Runtime
from worker.storage.database import StatementBatch, insert_if_absent, locked, now, now_plus, seconds_since
from worker.storage.rate_limiter import MAX_WAIT, reserve_slot
from worker.xone.booking_list import Listed
from worker.xone.circuit_breaker import CallsSuspended
from worker.xone.read_back import offer_named_by

log = structlog.get_logger(__name__)

MAX_INTERVAL = 3600.0  # seconds between two readings of a partner's list
GROWTH = 0.1  # the interval grows with the time for which the youngest booking has been pending: a tenth of it
SPREAD = 0.2  # share of the interval that is left to chance, so that partners do not come all at once
SLACK = 60.0  # seconds by which a time may be ahead of what it can be, until it is not believed
MAX_WANTED = 100_000  # ids of pending bookings that a reading keeps; with more, each listed booking is compared
CHUNK = 25  # listed bookings that are compared together, or recorded
# What has changed is recorded when the list is closed, so that XONE does not wait for our database.
MAX_CHANGED, MAX_CHANGED_BYTES = 500, 8 * 1024 * 1024
MAX_REVIEWS = 100  # bookings that stay pending, in one transaction
STILL_PENDING = "still-pending"


class FollowUpLost(Exception):
    """The lease on a partner's list has expired and another worker has it."""


# --- What a look means ---


@dataclass(frozen=True)
class Statuses:
    """What is compared. policies: by id; None if they were not told."""

    booking: str | None
    policies: tuple[tuple[str | None, str | None], ...] | None

    @classmethod
    def of(cls, booking: xone.Booking) -> "Statuses":
        policies = tuple(sorted(((p.id, p.status) for p in booking.policies), key=str))
        return cls(booking.status, policies if "policies" in booking.model_fields_set else None)

    def differs_from(self, before: "Statuses") -> bool:
        return self.booking != before.booking or self.policies not in (None, before.policies)


@dataclass(frozen=True)
class Change:
    """The state that a confirmation gets, or keeps, and the event that says so."""

    state: State
    event_type: EventType


def decide_change(state: State, before: Statuses, seen: Statuses, statuses: BookingStatuses) -> Change | None:
    """What a look at a booking changes. state: of its confirmation; before: as stored.

    The state follows the status, with two exceptions: what was confirmed stays so unless it is cancelled, and what
    needs review does so while it is pending.
    """
    follows = statuses.state_of(seen.booking)
    stays = state is State.CONFIRMED or state is State.NEEDS_REVIEW
    if follows is not state and not (follows is State.PENDING and stays):
        return Change(follows, EVENT_OF[follows])
    return Change(state, EventType.BOOKING_UPDATED) if seen.differs_from(before) else None


# --- Which lists are due ---


@dataclass(frozen=True)
class DuePartner:
    """A partner whose list is due. read_at: when its last reading began."""

    partner_id: str
    read_at: datetime | None


def due_partners(connection: Connection, interval: float) -> list[DuePartner]:
    """Partners with pending bookings whose list is due, the most overdue first. interval: FOLLOW_UP_INTERVAL."""
    overdue = [(_overdue(row, interval), row) for row in connection.execute(_PARTNERS) if row.partner_id is not None]
    due = sorted((item for item in overdue if item[0] >= 0), key=lambda item: -item[0])
    return [DuePartner(row.partner_id, row.read_at) for _, row in due]


def _overdue(row: Row[Any], interval: float) -> float:
    """Seconds since the list was due; negative if it will be. What became pending since waits for no longer one."""
    if row.is_ahead:  # the clock was set back
        return 0.0
    overdue: float = row.overdue
    return max(overdue, row.new_for - interval) if row.new_for is not None else overdue


def interval_of(youngest: float, interval: float, dice: float) -> float:
    """Seconds to the next reading. youngest: seconds for which the youngest booking is pending; dice: in [0, 1)."""
    grown = min(max(interval, youngest * GROWTH), max(MAX_INTERVAL, interval))
    return grown * (1 - SPREAD / 2 + SPREAD * dice)


# --- The lease on a partner's list ---


@dataclass
class ListLease:
    """The right to read a partner's list and to record what it shows. began_at: by the database's clock."""

    partner_id: str
    token: UUID
    began_at: datetime
    leased_at: float  # monotonic seconds


def lease_list(runtime: Runtime, partner_id: str, due: DuePartner | None = None) -> ListLease | None:
    """Leases a partner's list; None if another worker reads it. due: unless another has read it since."""
    token, asked_at = uuid4(), time.monotonic()
    lease_seconds = runtime.xone_settings.lease_seconds

    def acquire(connection: Connection) -> datetime | None:
        first = insert_if_absent(connection.dialect.name, FollowUp, "partner_id")
        connection.execute(first.values(partner_id=partner_id, due_at=now()))
        is_free = or_(
            FollowUp.lease_token.is_(None),
            FollowUp.leased_until <= now(),
            FollowUp.leased_until > now_plus(lease_seconds + SLACK),  # the clock was set back
        )
        is_unread = [FollowUp.read_at.is_not_distinct_from(due.read_at)] if due is not None else []
        return connection.execute(
            update(FollowUp)
            .where(FollowUp.partner_id == partner_id, is_free, *is_unread)
            .values(lease_token=token, leased_until=now_plus(lease_seconds))
            .returning(now())
        ).scalar_one_or_none()

    began_at = runtime.commit_once(acquire)
    return ListLease(partner_id, token, began_at, asked_at) if began_at is not None else None


def keep_list(lease: ListLease, runtime: Runtime) -> None:
    """Renews the lease if too little of it is left for a call. Raises FollowUpLost."""
    settings = runtime.xone_settings
    asked_at = time.monotonic()
    if asked_at - lease.leased_at < (settings.lease_seconds - settings.XONE_TIMEOUT) / 2:
        return
    values = {"leased_until": now_plus(settings.lease_seconds)}
    runtime.commit_once(lambda connection: _update_lease(connection, lease, values))
    lease.leased_at = asked_at


def release_list(lease: ListLease, runtime: Runtime, next_in: float | None) -> None:
    """Ends the lease. next_in: seconds to the next reading; None if the list was not read. Raises FollowUpLost."""
    values: dict[str, Any] = {"lease_token": None, "leased_until": None}
    if next_in is not None:
        values |= {"read_at": lease.began_at, "due_at": now_plus(next_in)}
    runtime.commit_once(lambda connection: _update_lease(connection, lease, values))


def _update_lease(connection: Connection, lease: ListLease, values: dict[str, Any]) -> None:
    """Also locks the lease until the transaction ends: nobody else takes it over before."""
    is_ours = FollowUp.partner_id == lease.partner_id, FollowUp.lease_token == lease.token
    if connection.execute(update(FollowUp).where(*is_ours).values(values)).rowcount != 1:
        raise FollowUpLost


# --- Reading ---


@dataclass
class Look:
    """What a reading showed. changed: what was recorded, by offer id; listed: ids of the wanted bookings it held.

    is_cut: it ended early, for so much had changed.
    """

    changed: list[tuple[str, Change]]
    listed: set[str]
    is_cut: bool = False


def pending_bookings(connection: Connection, partner_id: str) -> list[str] | None:
    """The ids of a partner's pending bookings; None if they are more than MAX_WANTED."""
    query = select(Booking.id).join(Confirmation, Confirmation.id == Booking.confirmation_id)
    ids = connection.execute(query.where(*_is_pending(partner_id)).limit(MAX_WANTED + 1)).scalars().all()
    return list(ids) if len(ids) <= MAX_WANTED else None


def read_list(
    runtime: Runtime,
    lease: ListLease,
    wanted: Collection[str] | None,
    states: Collection[State],
    is_stopping: Any = lambda: False,
    gets_behind: bool = False,
) -> Look:
    """Reads the list until all wanted bookings were seen, and records what has changed.

    wanted: ids of bookings; None for all that are stored. states: of the confirmations that may change. A booking with
    a cancelled status is compared also if it is not wanted. gets_behind: waits for no slot under the rate limit that a
    confirm call may need. Raises XoneError, CallsSuspended and FollowUpLost.
    """
    statuses = runtime.xone_settings.booking_statuses
    missing = {canonical_id(id_) for id_ in wanted} if wanted is not None else None
    look, chunk, changed = Look([], set()), list[Listed](), list[Listed]()
    changed_bytes = 0

    def before_call() -> None:
        rate = runtime.xone_settings.XONE_RATE_LIMIT
        if rate is not None:
            _wait_for_slot(runtime, rate, 0.0 if gets_behind else MAX_WAIT)
        go_on()

    def go_on() -> None:
        if runtime.shutting_down.is_set() or is_stopping():
            raise CallsSuspended(0.0)
        with runtime.engine.connect() as connection:
            is_paused = runtime.pauses.is_paused(connection, lease.partner_id)
        if is_paused:
            raise CallsSuspended(MAX_WAIT)
        keep_list(lease, runtime)

    def compare() -> None:
        nonlocal changed_bytes
        differing = _differing(runtime, lease, chunk, states)
        changed.extend(differing)
        changed_bytes += sum(len(write_exact(listed)) for listed in differing)
        chunk.clear()

    with closing(runtime.xone.list_bookings(lease.partner_id, before_call, go_on, go_on)) as listing:
        for listed in listing:
            id_ = canonical_id(str(listed.get("id")))
            is_wanted = missing is None or id_ in missing
            if is_wanted or statuses.state_of(_text(listed.get("status"))) is State.CANCELLED:
                chunk.append(listed)
            if is_wanted and missing is not None:
                missing.discard(id_)
                look.listed.add(id_)
            if len(chunk) >= CHUNK:
                compare()
            look.is_cut = len(changed) >= MAX_CHANGED or changed_bytes >= MAX_CHANGED_BYTES
            if look.is_cut or (missing is not None and not missing):
                break
    compare()
    for start in range(0, len(changed), CHUNK):
        go_on()
        look.changed += _record_listed(runtime, lease, changed[start : start + CHUNK], states)
    return look


def _wait_for_slot(runtime: Runtime, rate: float, max_wait: float) -> None:
    wait = runtime.commit_once(lambda connection: reserve_slot(connection, rate, max_wait=max_wait))
    if wait is None:
        raise CallsSuspended(MAX_WAIT)
    if wait > 0 and runtime.shutting_down.wait(wait):
        raise CallsSuspended(0.0)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


# --- Recording ---


def _differing(runtime: Runtime, lease: ListLease, listed: Iterable[Listed], states: Collection[State]) -> list[Listed]:
    """The listed bookings that differ from what is stored. Looks without a lock: most do not."""
    by_id = _by_id(listed)
    if not by_id:
        return []
    with runtime.engine.connect() as connection:
        rows: Sequence[Any] = connection.execute(_STORED.where(*_are_listed(lease, by_id, states))).all()
        return [by_id[canonical_id(row.booking_id)] for row, _ in _changes(connection, runtime, rows, by_id)]


def _by_id(listed: Iterable[Listed]) -> dict[str, Listed]:
    ids = ((_id_of(booking), booking) for booking in listed)
    return {canonical_id(id_): booking for id_, booking in ids if id_ is not None}


def _are_listed(lease: ListLease, by_id: Collection[str], states: Collection[State]) -> tuple[ColumnElement[bool], ...]:
    ids = sorted({form for id_ in by_id for form in spellings(id_)})
    return Confirmation.partner_id == lease.partner_id, Confirmation.state.in_(states), Booking.id.in_(ids)


def _record_listed(
    runtime: Runtime, lease: ListLease, listed: Iterable[Listed], states: Collection[State]
) -> list[tuple[str, Change]]:
    """Records what has changed of listed bookings, in one transaction. Returns the offers and their changes."""
    by_id = _by_id(listed)

    def store(connection: Connection) -> list[tuple[str, Change]]:
        _update_lease(connection, lease, {"leased_until": FollowUp.leased_until})
        theirs = _LOCKED.where(*_are_listed(lease, by_id, states)).order_by(Confirmation.id)
        rows = lock_rows(connection, theirs)
        done = []
        for row, (booking, change) in _changes(connection, runtime, rows, by_id):
            try:
                _record(connection, runtime, row, booking, change)
            except DecryptionError as error:  # of what is stored; nothing of it was written
                if not runtime.was_reported(row.id):
                    report(error, confirmation=str(row.id))
            else:
                done.append((row.offer_id, change))
        return done

    done = runtime.commit_once(store)
    for _, change in done:
        metrics.booking_changed(change.event_type)
    if done:
        runtime.events_waiting.set()
    return done


def _changes(
    connection: Connection, runtime: Runtime, rows: Iterable[Any], by_id: dict[str, Listed]
) -> list[tuple[Row[Any], tuple[xone.Booking, Change]]]:
    """Those rows whose listed booking differs from what is stored."""
    rows = list(rows)
    policies: dict[UUID, list[tuple[str | None, str | None]]] = {row.id: [] for row in rows}
    columns = select(Policy.confirmation_id, Policy.id, Policy.status)
    for policy in connection.execute(columns.where(Policy.confirmation_id.in_(policies))):
        policies[policy.confirmation_id].append((policy.id, policy.status))
    changes = []
    for row in rows:
        before = Statuses(row.booking_status, tuple(sorted(policies[row.id], key=str)))
        booking = _read(by_id[canonical_id(row.booking_id)], row)
        if booking is None:
            continue
        if row.state == State.NEEDS_REVIEW and row.error_code != STILL_PENDING:
            continue
        change = decide_change(State(row.state), before, Statuses.of(booking), runtime.xone_settings.booking_statuses)
        if change is not None:
            changes.append((row, (booking, change)))
    return changes


def _read(listed: Listed, row: Row[Any]) -> xone.Booking | None:
    """The listed booking of a stored one; None if it is another offer's, older than what is stored, or unreadable."""
    offer = offer_named_by(listed)
    if offer is not None and not (is_same_id(offer, row.offer_id) or differs_in_case_only(offer, row.offer_id)):
        log.error("booking_of_another_offer", offer_id=row.offer_id, booking=row.booking_id, listed_under=offer[:128])
        return None
    if (reason := xone.excess(listed)) is not None:
        log.warning("booking_too_large", offer_id=row.offer_id, booking=row.booking_id, reason=reason)
        return None
    try:
        booking = xone.Booking.model_validate({**listed, "id": row.booking_id, "offer_id": row.offer_id})
    except ValidationError:
        return None
    if "status" not in booking.model_fields_set:
        return None
    times = booking.updated_at, row.booking_updated_at
    return None if None not in times and times[0] < times[1] else booking


def _id_of(listed: Listed) -> str | None:
    id_ = listed.get("id")
    text = str(id_) if isinstance(id_, str | int) and not isinstance(id_, bool) else ""
    return text if xone.is_id(text) else None


def _record(connection: Connection, runtime: Runtime, row: Row[Any], booking: xone.Booking, change: Change) -> None:
    batch = StatementBatch(connection)
    is_blank = row.purged_at is not None
    stored = replace_booking(connection, batch, runtime.encryption, row, booking, stays_blank=is_blank)
    batch.add(
        _KEEP if change.state == row.state else _MOVE,
        {"row_id": row.id, "new_state": change.state, "at": next_sequence(row)},
    )
    with_links = runtime.event_links and not is_blank
    write_event(batch, row, change.event_type, booking_data(stored, with_links))
    batch.flush()


def review_still_pending(runtime: Runtime, lease: ListLease, max_age: float) -> int:
    """Lets a person look at bookings that are pending for longer than ``max_age`` seconds. Returns how many."""

    def store(connection: Connection) -> int:
        _update_lease(connection, lease, {"leased_until": FollowUp.leased_until})
        is_old = *_is_pending(lease.partner_id), Confirmation.updated_at <= now_plus(-max_age)
        rows = lock_rows(connection, _LOCKED.where(*is_old).order_by(Confirmation.id).limit(MAX_REVIEWS))
        batch = StatementBatch(connection)
        age = f"{max_age / 86400:.0f} days" if max_age >= 2 * 86400 else duration(max_age)
        for row in rows:
            status = f"the status {row.booking_status}" if row.booking_status else "no status"
            detail = f"booking {row.booking_id} has had {status} for more than {age}"
            batch.add(_REVIEW, {"row_id": row.id, "detail": detail, "at": next_sequence(row)})
            content = error_data(STILL_PENDING, None, detail, row.attempts)
            write_event(batch, row, EventType.CONFIRMATION_NEEDS_REVIEW, content)
        batch.flush()
        return len(rows)

    total = 0
    while count := runtime.commit_once(store):
        total += count
        runtime.events_waiting.set()
        log.warning("still_pending", partner_id=lease.partner_id, count=count)
    return total


def youngest_age(connection: Connection, partner_id: str) -> float:
    """Seconds for which the youngest pending booking of a partner has been so; 0.0 if there is none."""
    youngest = select(func.max(Confirmation.updated_at)).where(*_is_pending(partner_id)).scalar_subquery()
    return max(connection.execute(select(seconds_since(youngest))).scalar() or 0.0, 0.0)


def _is_pending(partner_id: Any, row: Any = Confirmation) -> tuple[ColumnElement[bool], ...]:
    return is_pending(row), row.partner_id == partner_id


def _partners() -> Select[Any]:
    """A row for each partner with pending bookings, found by one step in the index each; the last one is null."""
    first, following, new = aliased(Confirmation), aliased(Confirmation), aliased(Confirmation)
    partners = select(func.min(first.partner_id).label("partner_id")).where(is_pending(first)).cte("p", recursive=True)
    after = select(func.min(following.partner_id)).where(is_pending(following), following.partner_id > partners.c[0])
    partners = partners.union_all(select(after.scalar_subquery()).where(partners.c.partner_id.is_not(None)))
    is_new = or_(FollowUp.read_at.is_(None), new.updated_at > FollowUp.read_at)
    first_new = (
        select(func.min(new.updated_at)).where(*_is_pending(partners.c.partner_id, new), is_new).scalar_subquery()
    )
    is_ahead = FollowUp.due_at > now_plus(MAX_INTERVAL * (1 + SPREAD) + SLACK)
    return (
        select(
            partners.c.partner_id,
            FollowUp.read_at,
            func.coalesce(seconds_since(FollowUp.due_at), -1.0).label("overdue"),
            seconds_since(first_new).label("new_for"),
            is_ahead.label("is_ahead"),
        )
        .select_from(partners)
        .outerjoin(FollowUp, FollowUp.partner_id == partners.c.partner_id)
    )


# Built once: building a statement costs more than executing it.
_PARTNERS = _partners()
_of_booking = (
    Booking.id.label("booking_id"), Booking.status.label("booking_status"),
    Booking.updated_at.label("booking_updated_at"),
)  # fmt: skip
_of_confirmation = (Confirmation.id, Confirmation.offer_id, Confirmation.state, Confirmation.error_code)
_STORED = select(*_of_confirmation, *_of_booking).join(Booking, Booking.confirmation_id == Confirmation.id)
_LOCKED = locked(
    lock_for_decision().add_columns(*_of_booking).join(Booking, Booking.confirmation_id == Confirmation.id),
    of=Confirmation.__table__,
)
_row = Confirmation.__table__.c
_KEEP = (
    update(Confirmation.__table__)
    .where(_row.id == bindparam("row_id"), _row.state == bindparam("new_state"))
    .values(sequence=bindparam("at"))
)
_MOVE = (
    update(Confirmation.__table__)
    .where(_row.id == bindparam("row_id"))
    .values(
        state=bindparam("new_state"),
        error_code=None,
        error_http_status=None,
        error_detail=None,
        sequence=bindparam("at"),
        updated_at=now(),
    )
)
_REVIEW = (
    update(Confirmation.__table__)
    .where(_row.id == bindparam("row_id"))
    .values(
        state=State.NEEDS_REVIEW,
        error_code=STILL_PENDING,
        error_http_status=None,
        error_detail=bindparam("detail"),
        sequence=bindparam("at"),
        updated_at=now(),
    )
)

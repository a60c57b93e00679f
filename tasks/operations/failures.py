"""Failed confirmations: selecting them, and counting them by cause.

The conditions contain the states literally, not as parameters. Otherwise PostgreSQL, in a plan for any parameters, and
SQLite can't prove that the partial index ``ix_confirmations_ended_badly`` holds all rows that are asked for.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, func, not_, or_, select

from models.same import as_uuid, canonical_id, spellings
from models.states import State
from models.tables import Confirmation, is_pending
from worker.errors import ORDER_ENDED
from worker.storage import database

MAX_OFFERS = 1000  # in one statement

_COLUMNS: tuple[Any, ...] = (
    Confirmation.id,
    Confirmation.partner_id,
    Confirmation.offer_id,
    Confirmation.order_reference,
    Confirmation.state,
    Confirmation.error_code.label("code"),
    Confirmation.error_http_status.label("http_status"),
    Confirmation.error_detail.label("detail"),
    Confirmation.attempts,
    Confirmation.created_at,
    Confirmation.updated_at,
    Confirmation.purged_at,
)


@dataclass(frozen=True)
class Selection:
    """Which failed confirmations are meant.

    since, until: when it failed, the first included, the second not; limit: at most so many, those that failed first;
    purged: whether the personal data was purged, None for both (a purged confirmation can't be tried again: there is
    nothing left to send); order_ended: whether it failed because its order ended before, None for both (it is not tried
    again); offers: pairs of partner (None: any) and offer id, in place of filters.
    """

    partner: str | None = None
    code: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    limit: int | None = None
    include_needs_review: bool = False
    purged: bool | None = None
    order_ended: bool | None = None
    offers: tuple[tuple[str | None, str], ...] | None = None

    @property
    def states(self) -> tuple[State, ...]:
        """The states that are meant."""
        return (State.FAILED, State.NEEDS_REVIEW) if self.include_needs_review else (State.FAILED,)

    def conditions(self, *states: State) -> list[ColumnElement[bool]]:
        """Conditions on confirmations, without ``limit`` and ``offers``. states: in place of those of the selection."""
        chosen = [in_literally(State.FAILED, State.NEEDS_REVIEW), in_literally(*(states or self.states))]
        if self.partner is not None:
            chosen.append(Confirmation.partner_id == self.partner)
        if self.code is not None:
            chosen.append(Confirmation.error_code == self.code)
        if self.since is not None:
            chosen.append(Confirmation.updated_at >= self.since)
        if self.until is not None:
            chosen.append(Confirmation.updated_at < self.until)
        if self.purged is not None:
            chosen.append(Confirmation.purged_at.is_not(None) if self.purged else Confirmation.purged_at.is_(None))
        if self.order_ended is not None:
            chosen.append(order_has_ended() if self.order_ended else not_(order_has_ended()))
        return chosen

    def facts(self) -> dict[str, Any]:
        """The filters that are set, for the audit; of offers only their number."""
        facts = {name: value for name, value in asdict(self).items() if value not in (None, False) and name != "offers"}
        facts |= {"offers": len(self.offers)} if self.offers is not None else {}
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in facts.items()}


def order_has_ended() -> ColumnElement[bool]:
    """A condition that a confirmation has failed because its order had ended: it expired, or was withdrawn."""
    code = func.coalesce(Confirmation.error_code, "")
    return and_(Confirmation.state == State.FAILED, code.in_(tuple(ORDER_ENDED)))


def in_literally(*states: State) -> ColumnElement[bool]:
    """A condition that a confirmation has one of these states, with the states literally in it."""
    return database.in_literally(Confirmation.state, states)


@dataclass(frozen=True)
class FailedConfirmation:
    """A failed confirmation, as JSON shows it. code, http_status, detail: of its last error."""

    partner_id: str
    offer_id: str
    order_reference: str | None
    state: State
    code: str | None
    http_status: int | None
    detail: str | None
    attempts: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class LeftOut:
    """An offer that was asked for and does not match. state: None if there is no such confirmation.

    code: ``expired`` or ``withdrawn``, if it has failed because its order had ended.
    """

    partner_id: str | None
    offer_id: str
    state: State | None
    purged_at: datetime | None = None
    code: str | None = None


@dataclass(frozen=True)
class Matched:
    """What a selection matches. ids: of the confirmations, in their order."""

    ids: list[UUID]
    confirmations: list[FailedConfirmation]
    left_out: list[LeftOut]


def match(connection: Connection, selection: Selection) -> Matched:
    """The confirmations that a selection matches now, in the order in which they failed or in that of its offers."""
    if selection.offers is not None:
        return _match_offers(connection, selection, selection.offers)
    return _matched(connection.execute(rows_query(selection)), [])


def _matched(rows: Iterable[Row[Any]], left_out: list[LeftOut]) -> Matched:
    rows = list(rows)
    return Matched([row.id for row in rows], [_confirmation(row) for row in rows], left_out)


def _confirmation(row: Row[Any]) -> FailedConfirmation:
    columns = {field.name: row._mapping[field.name] for field in fields(FailedConfirmation)}
    return FailedConfirmation(**columns | {"state": State(row.state)})


def rows_query(selection: Selection) -> Select[Any]:
    """The rows that the filters of a selection match."""
    query: Select[Any] = select(*_COLUMNS).where(*selection.conditions())
    return query.order_by(Confirmation.updated_at, Confirmation.id).limit(selection.limit)


def _match_offers(connection: Connection, selection: Selection, offers: Sequence[tuple[str | None, str]]) -> Matched:
    by_offer: dict[str, list[Row[Any]]] = defaultdict(list)
    offer_ids = list(dict.fromkeys(offer for _, written in offers for offer in spellings(written)))
    for start in range(0, len(offer_ids), MAX_OFFERS):
        page = offer_ids[start : start + MAX_OFFERS]
        uuids = {uuid for offer in page if (uuid := as_uuid(offer))}
        is_meant = or_(Confirmation.offer_id.in_(page), Confirmation.offer_uuid.in_(uuids))
        for row in connection.execute(select(*_COLUMNS).where(is_meant if uuids else Confirmation.offer_id.in_(page))):
            same = by_offer[canonical_id(row.offer_id)]
            if row not in same:
                same.append(row)
    matching: dict[UUID, Row[Any]] = {}
    left_out = []
    for partner, offer in dict.fromkeys(offers):
        candidates = [row for row in by_offer[canonical_id(offer)] if partner in (None, row.partner_id)]
        fit = {row.id: row for row in candidates if row.state in selection.states and not _is_kept_out(row, selection)}
        matching |= fit
        if not fit:
            left_out.append(_left_out(partner, offer, candidates))
    return _matched(list(matching.values())[: selection.limit], left_out)


def _left_out(partner: str | None, offer: str, candidates: Sequence[Row[Any]]) -> LeftOut:
    if not candidates:
        return LeftOut(partner, offer, None)
    first = candidates[0]
    code = first.code if _has_ended_order(first) else None
    return LeftOut(partner, offer, State(first.state), first.purged_at, code)


def _is_kept_out(row: Row[Any], selection: Selection) -> bool:
    is_purged = selection.purged is False and row.purged_at is not None
    return is_purged or (selection.order_ended is False and _has_ended_order(row))


def _has_ended_order(row: Row[Any]) -> bool:
    return row.state == State.FAILED and row.code in ORDER_ENDED


@dataclass(frozen=True)
class FailureCount:
    """How many confirmations of one partner failed with one cause. offer_id: an example."""

    code: str | None
    http_status: int | None
    detail: str | None
    partner_id: str
    count: int
    first_seen: datetime
    last_seen: datetime
    offer_id: str


@dataclass(frozen=True)
class Sample:
    """A confirmation as an example."""

    partner_id: str
    offer_id: str


@dataclass(frozen=True)
class FailureGroup:
    """The failures of one cause, as JSON shows them. partners: their ids, sorted."""

    code: str | None
    http_status: int | None
    detail: str | None
    count: int
    partners: tuple[str, ...]
    first_seen: datetime
    last_seen: datetime
    sample: Sample


def groups(connection: Connection, selection: Selection) -> list[FailureGroup]:
    """Failures by cause, the most frequent first. limit of the selection: at most so many causes."""
    return by_cause(FailureCount(*row) for row in connection.execute(groups_query(selection)))[: selection.limit]


def groups_query(selection: Selection) -> Select[Any]:
    """A row for each cause and partner, with the columns of FailureCount."""
    cause: tuple[Any, ...] = (Confirmation.error_code, Confirmation.error_http_status, Confirmation.error_detail)
    query: Select[Any] = select(
        *cause,
        Confirmation.partner_id,
        func.count(),
        func.min(Confirmation.updated_at),
        func.max(Confirmation.updated_at),
        func.min(Confirmation.offer_id),
    )
    return query.where(*selection.conditions()).group_by(*cause, Confirmation.partner_id)


def groups_of(confirmations: Iterable[FailedConfirmation]) -> list[FailureGroup]:
    """As ``groups``, of confirmations that ``match`` returned."""
    return by_cause(
        FailureCount(c.code, c.http_status, c.detail, c.partner_id, 1, c.updated_at, c.updated_at, c.offer_id)
        for c in confirmations
    )


def by_cause(counts: Iterable[FailureCount]) -> list[FailureGroup]:
    """Groups by cause, the most frequent first. Details that differ only in ids and numbers are one cause."""
    causes: dict[tuple[Any, ...], list[FailureCount]] = defaultdict(list)
    for count in counts:
        causes[count.code, count.http_status, without_ids(count.detail)].append(count)
    found = [_group(counts, general_detail) for (_, _, general_detail), counts in causes.items()]
    return sorted(found, key=lambda group: (-group.count, group.code or "", group.detail or ""))


def _group(counts: Sequence[FailureCount], general_detail: str | None) -> FailureGroup:
    largest = min(counts, key=lambda count: (-count.count, count.partner_id, count.offer_id))
    details = {count.detail for count in counts}
    return FailureGroup(
        code=largest.code,
        http_status=largest.http_status,
        detail=largest.detail if len(details) == 1 else general_detail,
        count=sum(count.count for count in counts),
        partners=tuple(sorted({count.partner_id for count in counts})),
        first_seen=min(count.first_seen for count in counts),
        last_seen=max(count.last_seen for count in counts),
        sample=Sample(largest.partner_id, largest.offer_id),
    )


_ID = re.compile(r"\b(?=[\w-]*\d)[\w-]{6,}")


def without_ids(detail: str | None) -> str | None:
    """A detail with … in place of words of six or more characters with a digit: ids of offers, quotes, bookings."""
    return _ID.sub("…", detail) if detail is not None else None


@dataclass(frozen=True)
class WaitingCount:
    """How many confirmations wait to be tried after the same error. code: None before the first answer; since: when the
    oldest was queued."""

    code: str | None
    count: int
    since: datetime


def waiting(connection: Connection, partner: str | None) -> list[WaitingCount]:
    """Confirmations that wait for their first or next attempt, by their last error, the most frequent first."""
    return [WaitingCount(*row) for row in connection.execute(waiting_query(partner))]


def waiting_query(partner: str | None) -> Select[Any]:
    """A row for each code, with the columns of WaitingCount."""
    columns: tuple[Any, ...] = (Confirmation.error_code, func.count(), func.min(Confirmation.queued_at))
    query: Select[Any] = select(*columns)
    waits = (in_literally(State.QUEUED, State.RETRYING), Confirmation.due_at.is_not(None))
    if partner is not None:
        query = query.where(Confirmation.partner_id == partner)
    return query.where(*waits).group_by(Confirmation.error_code).order_by(func.count().desc(), Confirmation.error_code)


@dataclass(frozen=True)
class PendingCount:
    """How many confirmations are pending, and since when the oldest is."""

    count: int
    since: datetime


def pending(connection: Connection, partner: str | None) -> PendingCount | None:
    """Bookings whose status may still change; None if there are none."""
    count, since = connection.execute(pending_query(partner)).one()
    return PendingCount(count, since) if count else None


def pending_query(partner: str | None) -> Select[Any]:
    """One row, with the columns of PendingCount."""
    columns: tuple[Any, ...] = (func.count(), func.min(Confirmation.updated_at))
    query: Select[Any] = select(*columns).where(is_pending())
    return query if partner is None else query.where(Confirmation.partner_id == partner)


def waiting_for_review(connection: Connection, selection: Selection) -> int:
    """How many confirmations that the filters match are in ``needs_review``."""
    return int(connection.execute(review_query(selection)).scalar_one())


def review_query(selection: Selection) -> Select[Any]:
    """The number that ``waiting_for_review`` returns."""
    query: Select[Any] = select(func.count()).select_from(Confirmation)
    return query.where(*selection.conditions(State.NEEDS_REVIEW))


def order_ended(connection: Connection, selection: Selection) -> int:
    """How many confirmations that the filters match have failed because their order had ended."""
    return int(connection.execute(order_ended_query(selection)).scalar_one())


def order_ended_query(selection: Selection) -> Select[Any]:
    """The number that ``order_ended`` returns."""
    query: Select[Any] = select(func.count()).select_from(Confirmation)
    return query.where(*replace(selection, order_ended=True, purged=None).conditions())


def purged(connection: Connection, selection: Selection) -> int:
    """How many confirmations that the filters match were purged."""
    return int(connection.execute(purged_query(selection)).scalar_one())


def purged_query(selection: Selection) -> Select[Any]:
    """The number that ``purged`` returns."""
    query: Select[Any] = select(func.count()).select_from(Confirmation)
    return query.where(*replace(selection, purged=True, order_ended=None).conditions())

"""What has ended badly: a selection of confirmations, what it matches, and the causes with their counts.

The states stand literally in the conditions. Only then can PostgreSQL, in a plan for any parameters, and SQLite prove
that the partial index ``ix_confirmations_ended_badly`` holds all that is looked for.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Select, func, select

from models.states import State
from models.tables import Confirmation
from worker.storage import database

OFFERS_AT_ONCE = 1000  # of a file, in one statement

_ROW: tuple[Any, ...] = (
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
    """Which failed confirmations. ``offers``: pairs of partner (None: any) and offer id, in place of filters.

    since, until: when it failed, the first included, the second not; limit: those that failed first; purged: whether
    their personal data was, None for both. What was purged can't be tried again: there is nothing left to send.
    """

    partner: str | None = None
    code: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    limit: int | None = None
    include_needs_review: bool = False
    purged: bool | None = None
    offers: tuple[tuple[str | None, str], ...] | None = None

    @property
    def states(self) -> tuple[State, ...]:
        return (State.FAILED, State.NEEDS_REVIEW) if self.include_needs_review else (State.FAILED,)

    def conditions(self, *states: State) -> list[ColumnElement[bool]]:
        """For a WHERE over confirmations, all but ``limit`` and ``offers``. states: other ones than its own."""
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
        return chosen

    def facts(self) -> dict[str, Any]:
        """For the audit."""
        facts = {name: value for name, value in asdict(self).items() if value not in (None, False) and name != "offers"}
        facts |= {"offers": len(self.offers)} if self.offers is not None else {}
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in facts.items()}


def in_literally(*states: State) -> ColumnElement[bool]:
    return database.in_literally(Confirmation.state, states)


class LeftOut(NamedTuple):
    """An offer that was asked for and is not taken. state: None where it is unknown."""

    partner_id: str | None
    offer_id: str
    state: State | None
    purged_at: datetime | None = None


class Matched(NamedTuple):
    """What a selection matches: rows with the columns of ``failed --list --json``, and their ids."""

    rows: list[Row[Any]]
    left_out: list[LeftOut]


def match(connection: Connection, selection: Selection) -> Matched:
    """The confirmations that a selection matches now, in the order in which they failed, or of its offers."""
    if selection.offers is not None:
        return _match_offers(connection, selection, selection.offers)
    return Matched(list(connection.execute(rows_query(selection))), [])


def rows_query(selection: Selection) -> Select[Any]:
    """The rows that the filters of a selection match."""
    query: Select[Any] = select(*_ROW).where(*selection.conditions())
    return query.order_by(Confirmation.updated_at, Confirmation.id).limit(selection.limit)


def _match_offers(connection: Connection, selection: Selection, offers: Sequence[tuple[str | None, str]]) -> Matched:
    by_offer: dict[str, list[Row[Any]]] = defaultdict(list)
    offer_ids = list(dict.fromkeys(offer for _, offer in offers))
    for start in range(0, len(offer_ids), OFFERS_AT_ONCE):
        some = offer_ids[start : start + OFFERS_AT_ONCE]
        query: Select[Any] = select(*_ROW).where(Confirmation.offer_id.in_(some))
        for row in connection.execute(query):
            by_offer[row.offer_id].append(row)
    rows: dict[Any, Row[Any]] = {}
    left_out = []
    for partner, offer in dict.fromkeys(offers):
        found = [row for row in by_offer[offer] if partner in (None, row.partner_id)]
        fit = {row.id: row for row in found if row.state in selection.states and not _is_purged(row, selection)}
        rows |= fit
        if not fit:
            first = found[0] if found else None
            left_out.append(
                LeftOut(partner, offer, State(first.state), first.purged_at)
                if first is not None
                else LeftOut(partner, offer, None)
            )
    return Matched(list(rows.values())[: selection.limit], left_out)


def _is_purged(row: Row[Any], selection: Selection) -> bool:
    return selection.purged is False and row.purged_at is not None


@dataclass(frozen=True)
class Seen:
    """So many failures of one cause and one partner; offer_id: one of them."""

    code: str | None
    http_status: int | None
    detail: str | None
    partner_id: str
    count: int
    first_seen: datetime
    last_seen: datetime
    offer_id: str


def groups(connection: Connection, selection: Selection) -> list[dict[str, Any]]:
    """Failures by cause, the most frequent first, in the shape of ``failed --json`` (times as datetime)."""
    return by_cause(Seen(*row) for row in connection.execute(groups_query(selection)))[: selection.limit]


def groups_query(selection: Selection) -> Select[Any]:
    """A row for each cause and partner, with the columns of Seen."""
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


def of_rows(rows: Iterable[Row[Any]]) -> Iterator[Seen]:
    """Rows of ``match`` one by one, for ``by_cause``."""
    for row in rows:
        yield Seen(
            row.code, row.http_status, row.detail, row.partner_id, 1, row.updated_at, row.updated_at, row.offer_id
        )


def by_cause(seen: Iterable[Seen]) -> list[dict[str, Any]]:
    """Puts together what differs only in the ids and numbers that its detail names."""
    causes: dict[tuple[Any, ...], list[Seen]] = defaultdict(list)
    for one in seen:
        causes[one.code, one.http_status, without_ids(one.detail)].append(one)
    found = [_group(several, detail) for (_, _, detail), several in causes.items()]
    return sorted(found, key=lambda group: (-group["count"], group["code"] or "", group["detail"] or ""))


def _group(several: list[Seen], general_detail: str | None) -> dict[str, Any]:
    most = min(several, key=lambda one: (-one.count, one.partner_id, one.offer_id))
    details = {one.detail for one in several}
    return {
        "code": most.code,
        "http_status": most.http_status,
        "detail": most.detail if len(details) == 1 else general_detail,
        "count": sum(one.count for one in several),
        "partners": sorted({one.partner_id for one in several}),
        "first_seen": min(one.first_seen for one in several),
        "last_seen": max(one.last_seen for one in several),
        "sample": {"partner_id": most.partner_id, "offer_id": most.offer_id},
    }


_ID = re.compile(r"\b(?=[\w-]*\d)[\w-]{6,}")


def without_ids(detail: str | None) -> str | None:
    """A detail with … for words of six characters or more that hold a digit: ids of offers, quotes, bookings."""
    return _ID.sub("…", detail) if detail is not None else None


@dataclass(frozen=True)
class Waiting:
    """So many that wait to be tried. code: of their last answer, None where there was none yet; since: the oldest."""

    code: str | None
    count: int
    since: datetime


def waiting(connection: Connection, partner: str | None) -> list[Waiting]:
    """What waits for its turn or its next attempt, by the last answer, the most frequent first."""
    return [Waiting(*row) for row in connection.execute(waiting_query(partner))]


def waiting_query(partner: str | None) -> Select[Any]:
    columns: tuple[Any, ...] = (Confirmation.error_code, func.count(), func.min(Confirmation.queued_at))
    query: Select[Any] = select(*columns)
    waits = (in_literally(State.QUEUED, State.RETRYING), Confirmation.due_at.is_not(None))
    if partner is not None:
        query = query.where(Confirmation.partner_id == partner)
    return query.where(*waits).group_by(Confirmation.error_code).order_by(func.count().desc(), Confirmation.error_code)


def waiting_for_review(connection: Connection, selection: Selection) -> int:
    """How many confirmations that the filters match are in ``needs_review``."""
    return int(connection.execute(review_query(selection)).scalar_one())


def purged(connection: Connection, selection: Selection) -> int:
    """How many of what the filters match were purged."""
    return int(connection.execute(purged_query(selection)).scalar_one())


def purged_query(selection: Selection) -> Select[Any]:
    query: Select[Any] = select(func.count()).select_from(Confirmation)
    return query.where(*replace(selection, purged=True).conditions())


def review_query(selection: Selection) -> Select[Any]:
    query: Select[Any] = select(func.count()).select_from(Confirmation)
    return query.where(*selection.conditions(State.NEEDS_REVIEW))

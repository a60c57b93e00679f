"""Reprocessing in batches. A batch's items are fixed when it is made; the scheduler feeds them in at the batch's rate.

An item is fed in by putting its confirmation back to ``queued``. If the confirmation is no longer failed by then,
because another batch, a corrected job or a person came first, the item is skipped: no work is done twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    case,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from models.states import BatchState, State
from models.tables import Batch, BatchItem, Confirmation
from tasks.due_times import is_dispatched
from tasks.operations.audit import audit
from tasks.operations.failures import Selection
from worker.storage.database import locked, now, now_plus, seconds_since

SKIPPED = "skipped"
CANCELLED = "cancelled"
MIN_RATE, MAX_RATE = 0.0001, 10_000.0  # a second; a rate that a command of an older version stored may be any number
MAX_CATCH_UP = 1.0  # seconds of its rate that a batch may catch up on
MAX_OPEN = 2000  # items of all batches that were fed in and have not ended, including those that wait for a retry


@dataclass(frozen=True)
class BatchProgress:
    """A batch and how many of its items are where, as JSON shows it. rate: items a second, None for no limit."""

    id: int
    state: BatchState
    reason: str | None
    by: str
    created_at: datetime
    ended_at: datetime | None
    total: int
    waiting: int  # not fed in yet, or not tried because the batch was cancelled
    running: int
    confirmed: int  # or pending
    failed: int  # or in need of review
    skipped: int
    rate: float | None

    @property
    def ended(self) -> int:
        """How many items have ended."""
        return self.total - self.waiting - self.running


@dataclass(frozen=True)
class ItemOutcome:
    """An item of a batch, as JSON shows it.

    outcome: the state its confirmation reached, or ``waiting``, ``running``, ``skipped``, ``cancelled``; code: of the
    error, if the confirmation is still in that state.
    """

    partner_id: str
    offer_id: str
    outcome: str
    code: str | None
    fed_at: datetime | None
    ended_at: datetime | None


def create(
    connection: Connection, ids: Sequence[UUID], selection: Selection, reason: str | None, by: str, rate: float | None
) -> int:
    """Makes a batch of confirmations, which runs from now on. Returns its id.

    ids: in the order in which they are tried; selection: how they were chosen, for the audit; rate: items a second,
    None for no limit.
    """
    batch_id = connection.execute(
        insert(Batch)
        .values(
            state=BatchState.RUNNING,
            reason=reason,
            by=by,
            include_needs_review=selection.include_needs_review,
            rate=rate,
            total=len(ids),
            fed_until=now(),
            created_at=now(),
        )
        .returning(Batch.id)
    ).scalar_one()
    rows = [{"batch_id": batch_id, "position": position, "confirmation_id": id_} for position, id_ in enumerate(ids)]
    if rows:
        connection.execute(insert(BatchItem), rows)
    audit(connection, "reprocess", by, reason, len(ids), batch=batch_id, rate=rate, **selection.facts())
    return batch_id


def move(connection: Connection, batch_id: int, to: BatchState, by: str, reason: str | None = None) -> bool:
    """Pauses, resumes or cancels a batch. Returns False if it has ended or does not exist."""
    moved = connection.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.state.in_([BatchState.RUNNING, BatchState.PAUSED]))
        .values(state=to, fed_until=now(), ended_at=now() if to is BatchState.CANCELLED else None)
    ).rowcount
    if moved:
        audit(connection, f"batch {to}", by, reason, 1, batch=batch_id)
    return bool(moved)


def running(connection: Connection) -> list[int]:
    """The ids of the batches that are being fed in, the oldest first."""
    return list(connection.execute(_RUNNING).scalars())


class UnderWay(NamedTuple):
    """Items of all batches that were fed in and have not ended."""

    open: int
    at_work: int  # those of them that a worker has, or will have at once; the others wait for a retry


def under_way(connection: Connection) -> UnderWay:
    """How much the batches have under way now."""
    return UnderWay(*connection.execute(_UNDER_WAY).one())


_RUNNING = select(Batch.id).where(Batch.state == BatchState.RUNNING).order_by(Batch.id)
_is_at_work = or_(Confirmation.state == State.CONFIRMING, is_dispatched())
_UNDER_WAY = (
    select(func.count(), func.coalesce(func.sum(case((_is_at_work, 1), else_=0)), 0))
    .select_from(BatchItem)
    .join(Confirmation, Confirmation.id == BatchItem.confirmation_id)
    .where(BatchItem.fed_at.is_not(None), BatchItem.ended_at.is_(None))
)


def feed(connection: Connection, batch_id: int, limit: int, paused: Sequence[str], dispatch_lease: float) -> list[UUID]:
    """Puts the next items of a batch back to ``queued``, marked as dispatched. Returns the ids of their confirmations.

    limit: how many more may be under way; paused: partners whose items wait; dispatch_lease: seconds. Does nothing
    while another scheduler feeds the batch. Sets a batch whose items have all ended to done.
    """
    batch = connection.execute(
        locked(
            select(Batch.__table__, seconds_since(Batch.fed_until).label("unused"), now().label("now")).where(
                Batch.id == batch_id, Batch.state == BatchState.RUNNING
            ),
            skip_locked=True,
        )
    ).one_or_none()
    if batch is None:
        return []
    if batch.unused < 0:  # the clock was set back: the rate counts from now on
        connection.execute(update(Batch).where(Batch.id == batch_id).values(fed_until=now()))
    credit = float(limit) if batch.rate is None else _credit(batch.rate, batch.unused)
    allowed = min(limit, int(credit))
    items = _waiting(connection, batch_id, allowed, paused) if allowed > 0 else []
    if not items:
        if allowed > 0:
            _end_if_done(connection, batch_id)
        return []
    if batch.rate is not None:
        left = timedelta(seconds=(credit - len(items)) / _bounded(batch.rate))
        connection.execute(update(Batch).where(Batch.id == batch_id).values(fed_until=batch.now - left))
    fed = _put_back(connection, batch, items, dispatch_lease)
    was_fed = BatchItem.confirmation_id.in_(fed)
    connection.execute(
        update(BatchItem)
        .where(BatchItem.batch_id == batch_id, BatchItem.confirmation_id.in_(items))
        .values(
            fed_at=now(),
            ended_at=case((was_fed, None), else_=now()),
            outcome=case((was_fed, None), else_=literal(SKIPPED)),
        )
    )
    return fed


def _bounded(rate: float) -> float:
    return max(min(rate, MAX_RATE), MIN_RATE) if not math.isnan(rate) else MIN_RATE


def _credit(rate: float, unused: float) -> float:
    """Items that a rate allows now. unused: seconds that no item was fed for. At least one item can be saved up."""
    rate = _bounded(rate)
    return min(max(unused, 0.0) * rate, max(MAX_CATCH_UP * rate, 1.0))


def _waiting(connection: Connection, batch_id: int, limit: int, paused: Sequence[str]) -> list[UUID]:
    query: Select[Any] = (
        select(BatchItem.confirmation_id)
        .where(BatchItem.batch_id == batch_id, BatchItem.fed_at.is_(None))
        .order_by(BatchItem.position)
        .limit(limit)
    )
    if paused:
        query = query.join(Confirmation, Confirmation.id == BatchItem.confirmation_id)
        query = query.where(Confirmation.partner_id.not_in(paused))
    return list(connection.execute(query).scalars())


def _put_back(connection: Connection, batch: Row[Any], items: Sequence[UUID], dispatch_lease: float) -> list[UUID]:
    states = Selection(include_needs_review=batch.include_needs_review).states
    return list(
        connection.execute(
            update(Confirmation)
            .where(
                Confirmation.id.in_(items),
                Confirmation.state.in_(states),
                Confirmation.purged_at.is_(None),
                Confirmation.sealed_body.is_not(None),  # without one, only its booking was ever known: see reconcile
            )
            .values(
                state=State.QUEUED,
                due_at=now(),
                dispatched_until=now_plus(dispatch_lease),
                batch_id=batch.id,
                attempts_used=0,
                read_backs=0,
                crashes=0,
                queued_at=now(),
                updated_at=now(),
            )
            .returning(Confirmation.id)
        ).scalars()
    )


def _end_if_done(connection: Connection, batch_id: int) -> None:
    open_items = select(BatchItem.position).where(BatchItem.batch_id == batch_id, BatchItem.ended_at.is_(None))
    connection.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.state == BatchState.RUNNING, ~open_items.exists())
        .values(state=BatchState.DONE, ended_at=now())
    )


def skip_everywhere(connection: Connection, confirmation_id: UUID) -> None:
    """Makes all batches skip a confirmation that they have not fed in yet: a person came first.

    Call it before the confirmation is locked: ``feed`` locks batch and confirmation in this order too.
    """
    waits = (BatchItem.confirmation_id == confirmation_id, BatchItem.fed_at.is_(None))
    has_item = select(BatchItem.position).where(BatchItem.batch_id == Batch.id, *waits).exists()
    is_open = Batch.state.in_([BatchState.RUNNING, BatchState.PAUSED])
    batches = connection.execute(locked(select(Batch.id).where(is_open, has_item).order_by(Batch.id))).scalars().all()
    connection.execute(
        update(BatchItem)
        .where(BatchItem.batch_id.in_(batches), *waits)
        .values(fed_at=now(), ended_at=now(), outcome=SKIPPED)
    )


def overview(connection: Connection, limit: int = 50) -> list[BatchProgress]:
    """The newest batches with their progress, the newest first."""
    batches = connection.execute(select(Batch.__table__).order_by(Batch.id.desc()).limit(limit)).all()
    return [_progress(connection, batch) for batch in batches]


def progress(connection: Connection, batch_id: int) -> BatchProgress | None:
    """A batch with its progress; None if there is none of this id."""
    batch = connection.execute(select(Batch.__table__).where(Batch.id == batch_id)).one_or_none()
    return _progress(connection, batch) if batch is not None else None


def _progress(connection: Connection, batch: Row[Any]) -> BatchProgress:
    def count(condition: ColumnElement[bool]) -> ColumnElement[int]:
        return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)

    counts = connection.execute(
        select(
            count(BatchItem.fed_at.is_(None)).label("waiting"),
            count(and_(BatchItem.fed_at.is_not(None), BatchItem.ended_at.is_(None))).label("running"),
            count(BatchItem.outcome.in_([State.CONFIRMED, State.PENDING])).label("confirmed"),
            count(BatchItem.outcome.in_([State.FAILED, State.NEEDS_REVIEW])).label("failed"),
            count(BatchItem.outcome == SKIPPED).label("skipped"),
        ).where(BatchItem.batch_id == batch.id)
    ).one()
    return BatchProgress(
        id=batch.id,
        state=BatchState(batch.state),
        reason=batch.reason,
        by=batch.by,
        created_at=batch.created_at,
        ended_at=batch.ended_at,
        total=batch.total,
        rate=batch.rate,
        **{name: int(number) for name, number in counts._mapping.items()},
    )


def items(connection: Connection, batch_id: int) -> list[ItemOutcome]:
    """Every item of a batch with its outcome so far, in the batch's order."""
    rows = connection.execute(
        select(
            Confirmation.partner_id,
            Confirmation.offer_id,
            case(
                (BatchItem.outcome.is_not(None), BatchItem.outcome),
                (BatchItem.fed_at.is_not(None), "running"),
                (Batch.state == BatchState.CANCELLED, CANCELLED),
                else_="waiting",
            ).label("outcome"),
            case((BatchItem.outcome == Confirmation.state, Confirmation.error_code)).label("code"),
            BatchItem.fed_at,
            BatchItem.ended_at,
        )
        .join(Batch, Batch.id == BatchItem.batch_id)
        .join(Confirmation, Confirmation.id == BatchItem.confirmation_id)
        .where(BatchItem.batch_id == batch_id)
        .order_by(BatchItem.position)
    )
    return [ItemOutcome(**row._mapping) for row in rows]

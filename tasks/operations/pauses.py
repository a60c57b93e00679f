"""Pauses: a person stops calls to XONE, for all partners or one, until they are resumed. Jobs wait in the database."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, bindparam, case, delete, or_, select, update

from models.tables import Confirmation, Pause
from tasks.operations.audit import audit
from worker.formatting import shell_word
from worker.storage.database import insert_if_absent, locked, now, now_plus, seconds_since
from worker.storage.pause_cache import ALL


@dataclass(frozen=True)
class ActivePause:
    """A pause that has not ended, as JSON shows it. partner_id: None where it holds for all partners."""

    partner_id: str | None
    reason: str
    by: str
    created_at: datetime


def pause(connection: Connection, partner_id: str, reason: str, by: str) -> bool:
    """Pauses calls for a partner, or for ALL. Returns False if they were paused already; the first reason stays."""
    paused = connection.execute(
        insert_if_absent(connection.dialect.name, Pause, "partner_id")
        .values(partner_id=partner_id, reason=reason, by=by, created_at=now())
        .returning(Pause.partner_id)
    ).all()
    audit(connection, "pause", by, reason, len(paused), partner=partner_id or None)
    return bool(paused)


def resume_calls(connection: Connection, partner_id: str | None, by: str, reason: str | None = None) -> list[str]:
    """Ends the pause of one partner or of ALL; None ends every pause. Returns the partners whose pause has ended.

    The time of a pause does not count against RETRY_MAX_AGE.
    """
    chosen = delete(Pause).returning(Pause.partner_id, Pause.created_at)
    if partner_id is not None:
        chosen = chosen.where(Pause.partner_id == partner_id)
    pauses = connection.execute(chosen).all()
    ended = [pause.partner_id for pause in pauses]
    for pause in pauses:
        connection.execute(_LEAVE_OUT, {"partner": pause.partner_id, "began_at": pause.created_at})
    audit(connection, "resume", by, reason, len(ended), partners=ended)
    return ended


def active(connection: Connection) -> list[ActivePause]:
    """All pauses that have not ended, the oldest first."""
    rows = connection.execute(select(Pause.__table__).order_by(Pause.created_at))
    return [ActivePause(row.partner_id or None, row.reason, row.by, row.created_at) for row in rows]


def paused_scope(partner_id: str | None) -> str:
    """Whose calls are paused, in words. partner_id: None or ALL for all partners."""
    return f"partner {partner_id}" if partner_id else "all partners"


def resume_command(partner_id: str | None) -> str:
    """The command line that ends a pause. partner_id: as in paused_scope."""
    return "confirm-offer resume" + (f" --partner {shell_word(partner_id)}" if partner_id else "")


# Built once: to build a statement costs more than to execute it.
_partner = bindparam("partner", type_=Confirmation.partner_id.type)
_paused = locked(  # in the order in which attempts are recorded
    select(Confirmation.id)
    .where(Confirmation.due_at.is_not(None), or_(_partner == ALL, Confirmation.partner_id == _partner))
    .order_by(Confirmation.id)
).cte("paused")
_began_at = bindparam("began_at", type_=Pause.created_at.type)
_age_at_pause = seconds_since(Confirmation.queued_at) - seconds_since(_began_at)
_LEAVE_OUT = (
    update(Confirmation.__table__)
    .where(Confirmation.id.in_(select(_paused.c.id)))
    .values(queued_at=now_plus(case((_age_at_pause > 0, -_age_at_pause), else_=0.0)))
)

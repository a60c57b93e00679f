"""Pauses: a person stops calls to XONE, for all or one partner, until they are resumed. Jobs wait as rows."""

from sqlalchemy import Connection, Row, delete, select

from models.tables import Pause
from tasks.operations.audit import audit
from worker.storage.database import insert_if_absent, now
from worker.storage.pause_cache import ALL


def pause(connection: Connection, partner_id: str, reason: str, by: str) -> bool:
    """Pauses a partner, or ALL. Returns False where it was paused already (the first reason stays)."""
    made = connection.execute(
        insert_if_absent(connection.dialect.name, Pause, "partner_id")
        .values(partner_id=partner_id, reason=reason, by=by, created_at=now())
        .returning(Pause.partner_id)
    ).all()
    audit(connection, "pause", by, reason, len(made), partner=partner_id or None)
    return bool(made)


def resume_calls(connection: Connection, partner_id: str | None, by: str, reason: str | None = None) -> list[str]:
    """Ends the pause of one partner or ALL, or with None every pause. Returns those that ended."""
    chosen = delete(Pause).returning(Pause.partner_id)
    if partner_id is not None:
        chosen = chosen.where(Pause.partner_id == partner_id)
    ended = list(connection.execute(chosen).scalars())
    audit(connection, "resume", by, reason, len(ended), partners=ended)
    return ended


def standing(connection: Connection) -> list[Row[tuple[Pause]]]:
    """All pauses, the oldest first."""
    return list(connection.execute(select(Pause.__table__).order_by(Pause.created_at)))


__all__ = ["ALL", "pause", "resume_calls", "standing"]


def paused_scope(partner_id: str) -> str:
    """Who is paused."""
    return "all partners" if partner_id == ALL else f"partner {partner_id}"

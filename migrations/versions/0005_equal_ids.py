"""Ids that are written differently and mean the same: one confirmation of an offer, one confirmation of a booking

Of the rows that are there, only those get a UUID whose offer id is not in the usual form: the others are found by the
offer id as it is. Of two confirmations of one offer, it goes to the one with a booking, else to the older one. The
rest is filled by ``rekey``, in small steps.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

HAS_UUID = sa.text("offer_uuid is not null")
HAS_PARTNER = sa.text("partner_id is not null")
IS_OPEN = sa.text("due_at is not null")


def upgrade() -> None:
    op.add_column("confirmations", sa.Column("offer_uuid", sa.Uuid(), nullable=True))
    op.add_column("confirmations", sa.Column("quote_ids", sa.Text(), nullable=True))
    op.add_column("bookings", sa.Column("partner_id", sa.String(128), nullable=True))
    op.execute(_uuids_of_offers())
    op.create_index(
        "ix_confirmations_offer_uuid_partner_id",
        "confirmations",
        ["offer_uuid", "partner_id"],
        unique=True,
        postgresql_where=HAS_UUID,
        sqlite_where=HAS_UUID,
    )
    op.create_index(
        "ix_bookings_partner_id_id",
        "bookings",
        ["partner_id", "id"],
        unique=True,
        postgresql_where=HAS_PARTNER,
        sqlite_where=HAS_PARTNER,
    )
    op.create_index(  # for the Scheduler, which serves each partner
        "ix_confirmations_partner_id_due_at",
        "confirmations",
        ["partner_id", "due_at"],
        unique=False,
        postgresql_where=IS_OPEN,
        sqlite_where=IS_OPEN,
    )


def downgrade() -> None:
    op.drop_index("ix_confirmations_partner_id_due_at", "confirmations")
    op.drop_index("ix_bookings_partner_id_id", "bookings")
    op.drop_index("ix_confirmations_offer_uuid_partner_id", "confirmations")
    op.drop_column("bookings", "partner_id")
    op.drop_column("confirmations", "quote_ids")
    op.drop_column("confirmations", "offer_uuid")


def _uuids_of_offers() -> sa.Update:
    c = sa.table(
        "confirmations",
        sa.column("id", sa.Uuid()),
        sa.column("partner_id", sa.Text()),
        sa.column("offer_id", sa.Text()),
        sa.column("state", sa.Text()),
        sa.column("created_at", sa.DateTime(timezone=True)),
        sa.column("offer_uuid", sa.Uuid()),
    )
    digits = sa.func.lower(sa.func.replace(c.c.offer_id, "-", ""))
    is_uuid = (
        sa.or_(sa.func.length(c.c.offer_id) == 32, c.c.offer_id.like("________-____-____-____-____________")),
        sa.func.length(digits) == 32,
        sa.func.trim(digits, "0123456789abcdef") == "",
    )
    has_booking = sa.case((c.c.state.in_(("confirmed", "pending")), 0), else_=1)
    place = sa.func.row_number().over(
        partition_by=(c.c.partner_id, digits), order_by=(has_booking, c.c.created_at, c.c.id)
    )
    is_usual = sa.and_(sa.func.length(c.c.offer_id) == 36, c.c.offer_id == sa.func.lower(c.c.offer_id))
    unusual = sa.select(digits).where(*is_uuid, sa.not_(is_usual))
    ranked = sa.select(c.c.id, place.label("place")).where(*is_uuid, digits.in_(unusual)).subquery()
    first = sa.select(ranked.c.id).where(ranked.c.place == 1)
    return sa.update(c).where(c.c.id.in_(first)).values(offer_uuid=sa.cast(digits, sa.Uuid()))

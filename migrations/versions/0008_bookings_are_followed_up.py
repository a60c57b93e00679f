"""Bookings are followed up: the state cancelled, readings of partners' lists, and what bookings were before

The conditions on states grow by one.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

STATES = "'queued', 'confirming', 'retrying', 'confirmed', 'pending', 'failed', 'needs_review'"
NEW_STATES = "'queued', 'confirming', 'retrying', 'confirmed', 'pending', 'cancelled', 'failed', 'needs_review'"
CHECK = "ck_confirmations_state"
TO_PURGE = "ix_confirmations_to_purge"


def upgrade() -> None:
    _change_check(STATES, NEW_STATES)
    _index_to_purge("'confirmed', 'pending', 'cancelled', 'failed'")
    is_pending = sa.text("state = 'pending'")
    op.create_index(
        "ix_confirmations_pending",
        "confirmations",
        ["partner_id", "updated_at"],
        unique=False,
        postgresql_where=is_pending,
        sqlite_where=is_pending,
    )
    op.create_table(
        "follow_ups",
        sa.Column("partner_id", sa.String(128), nullable=False),
        sa.Column("read_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_token", sa.Uuid(), nullable=True),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("partner_id", name=op.f("pk_follow_ups")),
    )
    op.create_table(
        "earlier_bookings",
        sa.Column("confirmation_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("status", sa.Text(), nullable=True),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sealed_booking", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(
            ["confirmation_id"],
            ["bookings.confirmation_id"],
            name=op.f("fk_earlier_bookings_confirmation_id_bookings"),
        ),
        sa.PrimaryKeyConstraint("confirmation_id", "number", name=op.f("pk_earlier_bookings")),
    )


def downgrade() -> None:
    """Bookings that are cancelled become pending, as they were in the version before."""
    op.drop_table("earlier_bookings")
    op.drop_table("follow_ups")
    op.drop_index("ix_confirmations_pending", "confirmations")
    op.execute("update confirmations set state = 'pending' where state = 'cancelled'")
    _index_to_purge("'confirmed', 'pending', 'failed'")
    _change_check(NEW_STATES, STATES)


def _change_check(before: str, after: str) -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint(op.f(CHECK), "confirmations", type_="check")
        op.create_check_constraint(op.f(CHECK), "confirmations", f"state in ({after})")
        return
    # SQLite's documentation describes this way for constraints that no stored row can break: lang_altertable, 7.
    version = op.get_bind().exec_driver_sql("PRAGMA schema_version").scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    op.get_bind().exec_driver_sql(
        "update sqlite_master set sql = replace(sql, ?, ?) where type = 'table' and name = 'confirmations'",
        (f"state in ({before})", f"state in ({after})"),
    )
    op.execute(f"PRAGMA schema_version = {version + 1}")
    op.execute("PRAGMA writable_schema = OFF")


def _index_to_purge(states: str) -> None:
    is_to_purge = sa.text(f"state in ({states}) and purged_at is null")
    op.drop_index(TO_PURGE, "confirmations")
    op.create_index(
        TO_PURGE,
        "confirmations",
        ["updated_at"],
        unique=False,
        postgresql_where=is_to_purge,
        sqlite_where=is_to_purge,
    )

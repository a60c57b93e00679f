"""Batches, pauses and audit"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("by", sa.String(length=255), nullable=False),
        sa.Column("command", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("by", sa.String(length=255), nullable=False),
        sa.Column("include_needs_review", sa.Boolean(), nullable=False),
        sa.Column("rate", sa.Double(), nullable=True),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("fed_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state in ('running', 'paused', 'cancelled', 'done')", name=op.f("ck_batches_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(
        "ix_batches_open",
        "batches",
        ["state"],
        unique=False,
        postgresql_where=sa.text("state in ('running', 'paused')"),
        sqlite_where=sa.text("state in ('running', 'paused')"),
    )

    op.create_table(
        "pauses",
        sa.Column("partner_id", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("by", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("partner_id", name=op.f("pk_pauses")),
    )
    op.create_table(
        "batch_items",
        sa.Column("batch_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("confirmation_id", sa.Uuid(), nullable=False),
        sa.Column("fed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_batch_items_batch_id_batches")),
        sa.ForeignKeyConstraint(
            ["confirmation_id"], ["confirmations.id"], name=op.f("fk_batch_items_confirmation_id_confirmations")
        ),
        sa.PrimaryKeyConstraint("batch_id", "position", name=op.f("pk_batch_items")),
        sa.UniqueConstraint("batch_id", "confirmation_id", name=op.f("uq_batch_items_batch_id_confirmation_id")),
    )
    op.create_index(
        "ix_batch_items_running",
        "batch_items",
        ["batch_id"],
        unique=False,
        postgresql_where=sa.text("fed_at is not null and ended_at is null"),
        sqlite_where=sa.text("fed_at is not null and ended_at is null"),
    )
    op.create_index(
        "ix_batch_items_waiting",
        "batch_items",
        ["batch_id", "position"],
        unique=False,
        postgresql_where=sa.text("fed_at is null"),
        sqlite_where=sa.text("fed_at is null"),
    )

    op.add_column("confirmations", sa.Column("batch_id", sa.Integer(), nullable=True))
    op.create_index(
        "ix_confirmations_ended_badly",
        "confirmations",
        ["state", "error_code", "error_http_status", "updated_at"],
        unique=False,
        postgresql_where=sa.text("state in ('failed', 'needs_review')"),
        sqlite_where=sa.text("state in ('failed', 'needs_review')"),
    )
    op.create_index("ix_confirmations_order_reference", "confirmations", ["order_reference"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_confirmations_order_reference", "confirmations")
    op.drop_index("ix_confirmations_ended_badly", "confirmations")
    op.drop_column("confirmations", "batch_id")

    op.drop_index("ix_batch_items_waiting", "batch_items")
    op.drop_index("ix_batch_items_running", "batch_items")

    op.drop_table("batch_items")
    op.drop_table("pauses")
    op.drop_index("ix_batches_open", "batches")

    op.drop_table("batches")
    op.drop_table("audit")

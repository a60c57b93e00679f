"""The first tables"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# What models/types.py makes of time and money, as it was at this revision.
MONEY = sa.Numeric().with_variant(sa.String(64), "sqlite")


def upgrade() -> None:
    op.create_table(
        "confirmations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("partner_id", sa.String(length=128), nullable=False),
        sa.Column("offer_id", sa.String(length=128), nullable=False),
        sa.Column("order_reference", sa.String(length=128), nullable=True),
        sa.Column("echo", sa.JSON(), nullable=False),
        sa.Column("correlation_id", sa.String(length=255), nullable=True),
        sa.Column("traceparent", sa.String(length=255), nullable=True),
        sa.Column("idempotency_key", sa.Uuid(), nullable=False),
        sa.Column("sealed_body", sa.LargeBinary(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("dispatched_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_token", sa.Uuid(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("attempts_used", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("read_backs", sa.Integer(), nullable=False),
        sa.Column("answer_unknown", sa.Boolean(), nullable=False),
        sa.Column("error_code", sa.String(length=32), nullable=True),
        sa.Column("error_http_status", sa.SmallInteger(), nullable=True),
        sa.Column("error_detail", sa.Text(), nullable=True),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "state in ('queued', 'confirming', 'retrying', 'confirmed', 'pending', 'failed', 'needs_review')",
            name=op.f("ck_confirmations_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_confirmations")),
        sa.UniqueConstraint("partner_id", "offer_id", name=op.f("uq_confirmations_partner_id_offer_id")),
    )
    op.create_index(
        "ix_confirmations_due_at",
        "confirmations",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("due_at is not null"),
        sqlite_where=sa.text("due_at is not null"),
    )
    op.create_index(
        "ix_confirmations_dispatched_until",
        "confirmations",
        ["dispatched_until"],
        unique=False,
        postgresql_where=sa.text("dispatched_until is not null"),
        sqlite_where=sa.text("dispatched_until is not null"),
    )
    op.create_index("ix_confirmations_offer_id", "confirmations", ["offer_id"], unique=False)

    op.create_table(
        "rate_limits",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_rate_limits")),
    )
    op.create_table(
        "attempts",
        sa.Column("confirmation_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("lease_token", sa.Uuid(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("duration_ms", sa.Integer(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("code", sa.String(length=32), nullable=True),
        sa.Column("http_status", sa.SmallInteger(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("sealed_answer", sa.LargeBinary(), nullable=True),
        sa.CheckConstraint(
            "outcome in ('booked', 'refused', 'not_booked', 'unknown')", name=op.f("ck_attempts_outcome")
        ),
        sa.ForeignKeyConstraint(
            ["confirmation_id"], ["confirmations.id"], name=op.f("fk_attempts_confirmation_id_confirmations")
        ),
        sa.PrimaryKeyConstraint("confirmation_id", "number", name=op.f("pk_attempts")),
    )
    op.create_table(
        "bookings",
        sa.Column("confirmation_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("offer_id", sa.String(length=255), nullable=False),
        sa.Column("provider_reference", sa.Text(), nullable=True),
        sa.Column("language", sa.Text(), nullable=True),
        sa.Column("provider_customer_id", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=True),
        sa.Column("currency", sa.Text(), nullable=True),
        sa.Column("price", MONEY, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("is_instant_booking", sa.Boolean(), nullable=True),
        sa.Column("payment_status", sa.Text(), nullable=True),
        sa.Column("quote_uuid", sa.Text(), nullable=True),
        sa.Column("sealed_security_token", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_coi_url", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_coi_pdf", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_account_url", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_fnol_link", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_sign_up_url", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_rest", sa.LargeBinary(), nullable=True),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["confirmation_id"], ["confirmations.id"], name=op.f("fk_bookings_confirmation_id_confirmations")
        ),
        sa.PrimaryKeyConstraint("confirmation_id", name=op.f("pk_bookings")),
    )
    op.create_index("ix_bookings_id", "bookings", ["id"], unique=False)

    op.create_table(
        "outbox",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("aggregatetype", sa.String(length=32), nullable=False),
        sa.Column("aggregateid", sa.String(length=257), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("confirmation_id", sa.Uuid(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("correlation_id", sa.String(length=255), nullable=True),
        sa.Column("traceparent", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["confirmation_id"], ["confirmations.id"], name=op.f("fk_outbox_confirmation_id_confirmations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("confirmation_id", "sequence", name=op.f("uq_outbox_confirmation_id_sequence")),
    )
    op.create_index(
        "ix_outbox_unpublished",
        "outbox",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("published_at is null"),
        sqlite_where=sa.text("published_at is null"),
    )

    op.create_table(
        "policies",
        sa.Column("confirmation_id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=True),
        sa.Column("parent_id", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=True),
        sa.Column("policy_type", sa.Text(), nullable=True),
        sa.Column("policy_code", sa.Text(), nullable=True),
        sa.Column("policy_version", sa.Text(), nullable=True),
        sa.Column("policy_start_date", sa.DateTime(timezone=True), nullable=True),
        sa.Column("policy_start_date_tz_offset", sa.Text(), nullable=True),
        sa.Column("policy_end_date", sa.DateTime(timezone=True), nullable=True),
        sa.Column("policy_end_date_tz_offset", sa.Text(), nullable=True),
        sa.Column("price", MONEY, nullable=True),
        sa.Column("tax", MONEY, nullable=True),
        sa.Column("commission", MONEY, nullable=True),
        sa.Column("cover_amount", MONEY, nullable=True),
        sa.Column("claim_selector_id", sa.Text(), nullable=True),
        sa.Column("pds_url", sa.Text(), nullable=True),
        sa.Column("confirmed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancelled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("policy_content", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("extra_fields", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["confirmation_id"],
            ["bookings.confirmation_id"],
            name=op.f("fk_policies_confirmation_id_bookings"),
        ),
        sa.PrimaryKeyConstraint("confirmation_id", "position", name=op.f("pk_policies")),
    )
    op.create_table(
        "policyholders",
        sa.Column("confirmation_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sealed_person", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(
            ["confirmation_id"],
            ["bookings.confirmation_id"],
            name=op.f("fk_policyholders_confirmation_id_bookings"),
        ),
        sa.PrimaryKeyConstraint("confirmation_id", name=op.f("pk_policyholders")),
    )


def downgrade() -> None:
    op.drop_table("policyholders")
    op.drop_table("policies")
    op.drop_index(
        "ix_outbox_unpublished",
        "outbox",
        postgresql_where=sa.text("published_at is null"),
        sqlite_where=sa.text("published_at is null"),
    )

    op.drop_table("outbox")
    op.drop_index("ix_bookings_id", "bookings")

    op.drop_table("bookings")
    op.drop_table("attempts")
    op.drop_table("rate_limits")
    op.drop_index("ix_confirmations_offer_id", "confirmations")
    op.drop_index("ix_confirmations_dispatched_until", "confirmations")
    op.drop_index(
        "ix_confirmations_due_at",
        "confirmations",
        postgresql_where=sa.text("due_at is not null"),
        sqlite_where=sa.text("due_at is not null"),
    )

    op.drop_table("confirmations")

"""Finding a person by a keyed hash, and the end of personal data"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TO_PURGE = sa.text("state in ('confirmed', 'pending', 'failed') and purged_at is null")
HAS_HASH = sa.text("email_hash is not null")


def upgrade() -> None:
    op.create_table(
        "further_emails",
        sa.Column("confirmation_id", sa.Uuid(), nullable=False),
        sa.Column("email_hash", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["confirmation_id"], ["confirmations.id"], name=op.f("fk_further_emails_confirmation_id_confirmations")
        ),
        sa.PrimaryKeyConstraint("confirmation_id", "email_hash", name=op.f("pk_further_emails")),
    )
    op.create_index("ix_further_emails_email_hash", "further_emails", ["email_hash"], unique=False)

    op.add_column("confirmations", sa.Column("email_hash", sa.LargeBinary(), nullable=True))
    op.add_column("confirmations", sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "ix_confirmations_email_hash",
        "confirmations",
        ["email_hash"],
        unique=False,
        postgresql_where=HAS_HASH,
        sqlite_where=HAS_HASH,
    )
    op.create_index(
        "ix_confirmations_to_purge",
        "confirmations",
        ["updated_at"],
        unique=False,
        postgresql_where=TO_PURGE,
        sqlite_where=TO_PURGE,
    )


def downgrade() -> None:
    op.drop_index("ix_confirmations_to_purge", "confirmations")
    op.drop_index("ix_confirmations_email_hash", "confirmations")
    op.drop_column("confirmations", "purged_at")
    op.drop_column("confirmations", "email_hash")

    op.drop_index("ix_further_emails_email_hash", "further_emails")
    op.drop_table("further_emails")

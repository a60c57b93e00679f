"""Until when a job may be booked, when it was withdrawn, and an index to delete items of batches by"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    for name in ("confirm_by", "withdrawn_at"):
        op.add_column("confirmations", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    waits = sa.text("confirm_by is not null and state in ('queued', 'retrying')")
    op.create_index(
        "ix_confirmations_answer_unknown_confirm_by",
        "confirmations",
        ["answer_unknown", "confirm_by"],
        postgresql_where=waits,
        sqlite_where=waits,
    )
    op.create_index("ix_batch_items_confirmation_id", "batch_items", ["confirmation_id"])


def downgrade() -> None:
    op.drop_index("ix_batch_items_confirmation_id", "batch_items")
    op.drop_index("ix_confirmations_answer_unknown_confirm_by", "confirmations")
    for name in ("withdrawn_at", "confirm_by"):
        op.drop_column("confirmations", name)

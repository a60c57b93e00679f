"""Where the sequences of events begin on a server: a standby that lagged, or a restored backup, may have lost some

Each server that events are written on has a row. The first one begins at 0. A later one begins beyond any number that
was given before: see worker/storage/sequence_floor.py.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# The cluster and its timeline, which a promotion and a restore to a point in time change. Empty where a service shows
# neither.
POSTGRESQL = """
CREATE FUNCTION confirm_offer_server() RETURNS text LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RETURN (SELECT system_identifier FROM pg_control_system()) || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8);
EXCEPTION WHEN OTHERS THEN RETURN '';
END $$;
"""


def upgrade() -> None:
    op.create_table(
        "servers",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("sequence_floor", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_servers")),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(POSTGRESQL)
        op.execute("INSERT INTO servers VALUES (confirm_offer_server(), 0, CURRENT_TIMESTAMP)")
    else:
        op.execute("INSERT INTO servers VALUES ('', 0, CURRENT_TIMESTAMP)")


def downgrade() -> None:
    op.drop_table("servers")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION confirm_offer_server()")

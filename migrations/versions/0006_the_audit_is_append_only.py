"""The audit is append-only: rows are added, and only the count of one may grow, while its command works

On PostgreSQL for all roles but the owner of the table. SQLite has no roles: who can write the file can drop the
triggers, on purpose.
"""

from collections.abc import Sequence

from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# The search path is fixed: who may create a temporary table could put one in the place of pg_class.
POSTGRESQL = """
CREATE FUNCTION confirm_offer_keep_audit() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF TG_OP = 'UPDATE' THEN
    IF NEW.count >= OLD.count AND to_jsonb(NEW) - 'count' = to_jsonb(OLD) - 'count'
      AND NEW.details::text = OLD.details::text  -- jsonb keeps the last of equal keys only
    THEN RETURN NEW; END IF;
  END IF;
  IF pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'MEMBER') THEN
    RETURN CASE TG_OP WHEN 'UPDATE' THEN NEW ELSE OLD END;
  END IF;
  RAISE insufficient_privilege USING MESSAGE = 'the audit is append-only';
END $$;
CREATE TRIGGER audit_is_kept BEFORE UPDATE OR DELETE ON audit
  FOR EACH ROW EXECUTE FUNCTION confirm_offer_keep_audit();
CREATE TRIGGER audit_is_not_truncated BEFORE TRUNCATE ON audit
  FOR EACH STATEMENT EXECUTE FUNCTION confirm_offer_keep_audit();
"""
SQLITE = (
    """
    CREATE TRIGGER audit_is_kept BEFORE UPDATE ON audit
    WHEN NEW.count < OLD.count OR (NEW.id, NEW.at, NEW.by, NEW.command, NEW.reason, NEW.details)
      IS NOT (OLD.id, OLD.at, OLD.by, OLD.command, OLD.reason, OLD.details)
    BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END
    """,
    """
    CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END
    """,
)


def upgrade() -> None:
    for statement in [POSTGRESQL] if op.get_bind().dialect.name == "postgresql" else SQLITE:
        op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER audit_is_kept ON audit; DROP TRIGGER audit_is_not_truncated ON audit")
        op.execute("DROP FUNCTION confirm_offer_keep_audit()")
    else:
        op.execute("DROP TRIGGER audit_is_kept")
        op.execute("DROP TRIGGER audit_is_not_deleted")

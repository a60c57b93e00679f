"""Migrations expand: during and after a migration, workers of the previous version keep working on the same database.

A migration that removes something is a contract step. Its revision names the release whose code no longer needs what
it removes, ``contract_of = "0.2.0"``, and that release must be out.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.migration import MigrationContext
from alembic.operations import BatchOperations, MigrateOperation, Operations, ops
from alembic.script import Script, ScriptDirectory
from sqlalchemy.types import NullType

from tests.support.system import PROJECT
from worker.storage import migrator

CHANGES_TABLES = re.compile(r"\b(alter|create|drop|rename|truncate|lock|grant|revoke)\b", re.IGNORECASE)
# Running code only adds rows to the audit, and lets the count of one grow.
TRIGGERS_OF_AUDIT = re.compile(r"create (function.*?end \$\$|trigger.*? on audit.*?\(\));", re.IGNORECASE | re.DOTALL)
# What the check or the index of an earlier revision holds, of those that were made anew.
STATES_BEFORE = defaultdict[str | None, set[str]](
    set,
    ck_confirmations_state={"queued", "confirming", "retrying", "confirmed", "pending", "failed", "needs_review"},
    ix_confirmations_to_purge={"confirmed", "pending", "failed"},
)
REVISIONS = list(ScriptDirectory.from_config(migrator._without_connection()).walk_revisions())


def operations_of(upgrade: Callable[[], None]) -> list[MigrateOperation]:
    """The operations of an ``upgrade()``, recorded without being executed."""
    recorded: list[MigrateOperation] = []
    context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True})

    @contextmanager
    def batch_alter_table(table_name: str, *_: Any, **__: Any) -> Iterator[BatchOperations]:
        batch = BatchOperations(context, impl=SimpleNamespace(table_name=table_name, schema=None))
        yield recording(batch)

    def recording(operations: Any) -> Any:
        operations.invoke = recorded.append
        return operations

    with Operations.context(context) as recorder:
        recording(recorder).batch_alter_table = batch_alter_table
        upgrade()
    return recorded


def problems(upgrade: Callable[[], None]) -> list[str]:
    """The operations of an ``upgrade()`` that break code of the previous version. Its own new tables are exempt."""
    operations = _without_widening(operations_of(upgrade))
    new_tables = {operation.table_name for operation in operations if isinstance(operation, ops.CreateTableOp)}
    left_empty = {  # by running code
        (operation.table_name, operation.column.name)
        for operation in operations
        if isinstance(operation, ops.AddColumnOp) and operation.column.server_default is None
    }
    return [
        f"{reason} ({getattr(operation, 'table_name', 'SQL')})"
        for operation in operations
        if getattr(operation, "table_name", None) not in new_tables and (reason := _problem_of(operation, left_empty))
    ]


def _without_widening(operations: list[MigrateOperation]) -> list[MigrateOperation]:
    """Without constraints and indexes that are dropped to be made anew at once, under the same name, for more values.

    All that running code writes is still accepted, and found by the same index.
    """
    kept = list(operations)
    for dropped, made in pairwise(operations):
        match dropped, made:
            case ops.DropConstraintOp(constraint_type="check"), ops.CreateCheckConstraintOp():
                is_same = (dropped.constraint_name, dropped.table_name) == (made.constraint_name, made.table_name)
                is_wider = set() < STATES_BEFORE[dropped.constraint_name] < _literals(made.condition)
            case ops.DropIndexOp(), ops.CreateIndexOp():
                is_same = (dropped.index_name, dropped.table_name) == (made.index_name, made.table_name)
                is_wider = set() < STATES_BEFORE[dropped.index_name] < _literals(made.kw["postgresql_where"])
            case _:
                continue
        if is_same and is_wider:
            kept.remove(dropped)
            kept.remove(made)
    return kept


def _literals(condition: Any) -> set[str]:
    return set(re.findall(r"'(\w+)'", str(condition)))


def _problem_of(operation: MigrateOperation, left_empty: set[tuple[str, str]]) -> str | None:
    match operation:
        case ops.CreateTableOp() | ops.CreateTableCommentOp() | ops.DropTableCommentOp():
            return None
        case ops.CreateIndexOp():
            # An index with a column that is null in all rows of running code refuses none of them.
            is_harmless = any((operation.table_name, column) in left_empty for column in operation.columns)
            refuses = operation.unique and not is_harmless
            return "a unique index refuses rows that running code may write" if refuses else None
        case ops.AddColumnOp():
            column = operation.column
            if not column.nullable and column.server_default is None:
                return f"running code writes no {column.name}, which is NOT NULL and has no server default"
            return "a constraint on a new column of an old table" if column.unique or column.foreign_keys else None
        case ops.AlterColumnOp():
            return _problem_of_alter(operation)
        case ops.ExecuteSQLOp():
            is_sql_of_tables = CHANGES_TABLES.search(TRIGGERS_OF_AUDIT.sub("", str(operation.sqltext)))
            return "SQL that changes tables is not understood; use Alembic's operations" if is_sql_of_tables else None
        case ops.BulkInsertOp():
            return None
        case _:
            return f"{type(operation).__name__.removesuffix('Op')} removes or forbids what running code may use"


def _problem_of_alter(operation: ops.AlterColumnOp) -> str | None:
    if operation.modify_name is not None:
        return f"running code knows {operation.column_name} by its old name"
    if operation.modify_nullable is False and not operation.modify_server_default:
        return f"running code may leave {operation.column_name} empty, and there is no server default"
    if operation.modify_server_default is None:
        return f"running code may rely on the server default of {operation.column_name}"
    if operation.modify_type is not None and not _is_wider(operation.modify_type, operation.existing_type):
        return f"the type of {operation.column_name} changes, and not only to a longer string"
    return None


def _is_wider(new: Any, old: Any) -> bool:
    if not (isinstance(new, sa.String) and isinstance(old, sa.String)):
        return False
    return new.length is None or (old.length is not None and new.length >= old.length)


def released() -> set[str]:
    """The releases that are out, as the changelog says."""
    return set(re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE))


def refusal(revision: ModuleType, out: set[str]) -> str | None:
    contract_of = getattr(revision, "contract_of", None)
    if contract_of is not None:
        return None if contract_of in out else f"contract_of names {contract_of}, which is not out"
    return "; ".join(problems(revision.upgrade)) or None


@pytest.mark.parametrize("script", REVISIONS, ids=[script.revision for script in REVISIONS])
def test_no_migration_breaks_running_code(script: Script) -> None:
    assert refusal(script.module, released()) is None


def revision(upgrade: Callable[[], None], **marks: str) -> ModuleType:
    module = ModuleType("revision")
    module.__dict__.update(upgrade=upgrade, **marks)
    return module


def in_batch(change: Callable[[BatchOperations], object]) -> None:
    with op.batch_alter_table("t") as batch:
        change(batch)


def new_table_and_its_index() -> None:
    op.create_table("new", sa.Column("id", sa.Integer(), nullable=False), sa.Column("x", sa.Text(), nullable=False))
    op.create_index("ix_new_x", "new", ["x"], unique=True)
    op.alter_column("new", "x", nullable=True)


def unique_index(*columns: sa.Column[Any]) -> None:
    for column in columns:
        op.add_column("t", column)
    op.create_index("ix_t_x_y", "t", ["x", "y"], unique=True)


def new_check(states: str) -> None:
    name = "ck_confirmations_state"
    op.drop_constraint(name, "confirmations", type_="check")
    before = "'queued', 'confirming', 'retrying', 'confirmed', 'pending', "
    op.create_check_constraint(name, "confirmations", f"state in ({before}{states})")


def new_index(states: str) -> None:
    op.drop_index("ix_confirmations_to_purge", "confirmations")
    op.create_index(
        "ix_confirmations_to_purge", "confirmations", ["updated_at"], postgresql_where=f"state in ({states})"
    )


EXPANDING = {
    "unique index with a column that running code leaves empty": lambda: unique_index(sa.Column("x", sa.Text())),
    "new table": new_table_and_its_index,
    "nullable column": lambda: op.add_column("t", sa.Column("x", sa.Text(), nullable=True)),
    "column with default": lambda: op.add_column("t", sa.Column("x", sa.Integer(), server_default="0", nullable=False)),
    "index": lambda: op.create_index("ix_t_x", "t", ["x"]),
    "to nullable": lambda: op.alter_column("t", "x", nullable=True),
    "longer string": lambda: op.alter_column("t", "x", type_=sa.String(64), existing_type=sa.String(32)),
    "string without end": lambda: op.alter_column("t", "x", type_=sa.Text(), existing_type=sa.String(32)),
    "new default": lambda: op.alter_column("t", "x", server_default="0"),
    "not null with default": lambda: op.alter_column("t", "x", nullable=False, server_default="0"),
    "rows": lambda: op.execute(sa.text("update t set x = y where x is null")),
    "rows by bulk insert": lambda: op.bulk_insert(sa.table("t", sa.column("x", NullType())), [{"x": 1}]),
    "wider check": lambda: new_check("'failed', 'needs_review', 'cancelled'"),
    "wider index": lambda: new_index("'confirmed', 'pending', 'failed', 'cancelled'"),
    "nullable column in batch": lambda: in_batch(lambda t: t.add_column(sa.Column("x", sa.Text()))),
}
BREAKING = {
    "unique index of columns with a default": (
        lambda: unique_index(sa.Column("x", sa.Text(), server_default="")),
        "a unique index",
    ),
    "drop table": (lambda: op.drop_table("t"), "DropTable"),
    "rename table": (lambda: op.rename_table("t", "u"), "RenameTable"),
    "drop column": (lambda: op.drop_column("t", "x"), "DropColumn"),
    "drop column in batch": (lambda: in_batch(lambda t: t.drop_column("x")), "DropColumn"),
    "rename column": (lambda: op.alter_column("t", "x", new_column_name="y"), "old name"),
    "rename column in batch": (lambda: in_batch(lambda t: t.alter_column("x", new_column_name="y")), "old name"),
    "not null": (lambda: op.alter_column("t", "x", nullable=False), "may leave x empty"),
    "drop default": (lambda: op.alter_column("t", "x", server_default=None), "rely on the server default"),
    "other type": (lambda: op.alter_column("t", "x", type_=sa.Integer(), existing_type=sa.Text()), "the type of x"),
    "shorter string": (
        lambda: op.alter_column("t", "x", type_=sa.String(8), existing_type=sa.String(16)),
        "the type of x",
    ),
    "string of unknown length": (lambda: op.alter_column("t", "x", type_=sa.String(64)), "the type of x"),
    "not null column": (lambda: op.add_column("t", sa.Column("x", sa.Text(), nullable=False)), "writes no x"),
    "unique column": (lambda: op.add_column("t", sa.Column("x", sa.Text(), unique=True)), "constraint on a new column"),
    "unique index": (lambda: op.create_index("ix_t_x", "t", ["x"], unique=True), "unique index"),
    "unique constraint": (lambda: op.create_unique_constraint("uq", "t", ["x"]), "CreateUniqueConstraint"),
    "check": (lambda: op.create_check_constraint("ck", "t", "x > 0"), "CreateCheckConstraint"),
    "foreign key": (lambda: op.create_foreign_key("fk", "t", "u", ["x"], ["id"]), "CreateForeignKey"),
    "drop constraint": (lambda: op.drop_constraint("uq", "t", type_="unique"), "DropConstraint"),
    "narrower check": (lambda: new_check("'failed', 'cancelled'"), "DropConstraint"),
    "narrower index": (lambda: new_index("'confirmed', 'cancelled'"), "DropIndex"),
    "drop index": (lambda: op.drop_index("ix_t_x", "t"), "DropIndex"),
    "sql": (lambda: op.execute("ALTER TABLE t DROP COLUMN x"), "SQL that changes tables"),
}  # fmt: skip


@pytest.mark.parametrize("upgrade", EXPANDING.values(), ids=EXPANDING)
def test_an_expanding_migration_is_allowed(upgrade: Callable[[], None]) -> None:
    assert operations_of(upgrade), "the upgrade has operations"
    assert refusal(revision(upgrade), set()) is None


@pytest.mark.parametrize(("upgrade", "reason"), BREAKING.values(), ids=BREAKING)
def test_a_migration_that_breaks_running_code_is_refused(upgrade: Callable[[], None], reason: str) -> None:
    assert reason in (refusal(revision(upgrade), set()) or "")


def test_a_contract_step_may_follow_the_release_that_no_longer_needs_it() -> None:
    def upgrade() -> None:
        op.drop_column("t", "x")

    assert refusal(revision(upgrade, contract_of="0.2.0"), {"0.1.0", "0.2.0"}) is None
    assert refusal(revision(upgrade, contract_of="0.3.0"), {"0.1.0", "0.2.0"}) == (
        "contract_of names 0.3.0, which is not out"
    )
    assert "unreleased" not in released()

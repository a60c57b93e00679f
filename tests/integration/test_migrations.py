"""Migrations create the tables of the models on both databases, and can be undone and repeated."""

import os
import subprocess
import sys

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, delete, inspect, update
from sqlalchemy.exc import IntegrityError

from models.tables import AuditEntry, Base
from tasks.operations.audit import audit
from tests.support.servers import PostgreSQL
from tests.support.system import PROJECT
from worker.storage import database, migrator


def test_models_and_migrations_agree(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_downgrade_and_an_upgrade_restore_the_schema(engine: Engine) -> None:
    with engine.begin() as connection:
        command.downgrade(migrator.config(connection), "base")
    assert set(inspect(engine).get_table_names()) <= {"alembic_version"}

    assert migrator.upgrade(engine) == (None, migrator.newest())

    assert set(Base.metadata.tables) <= set(inspect(engine).get_table_names())


def test_an_upgraded_database_is_not_changed(engine: Engine) -> None:
    assert migrator.upgrade(engine) == (migrator.newest(), migrator.newest())


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_audit_of_sqlite_is_append_only(engine: Engine) -> None:
    with engine.begin() as connection:
        audit(connection, "x", "me", None, 1)
        connection.execute(update(AuditEntry).values(count=2))
    for statement in update(AuditEntry).values(by="you"), update(AuditEntry).values(count=0), delete(AuditEntry):
        with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
            connection.execute(statement)


def test_simultaneous_upgrades_run_once(postgresql: PostgreSQL) -> None:
    postgresql.create_database("test_two_upgrades")
    url = postgresql.url("test_two_upgrades")
    command = [sys.executable, "-m", "worker", "db", "upgrade"]
    programs = [
        subprocess.Popen(
            command, cwd=PROJECT, env={**os.environ, "DATABASE_URL": url}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = sorted(program.communicate(timeout=30)[0].strip() for program in programs)
    postgresql.drop_database("test_two_upgrades")

    revision = migrator.newest()
    assert [program.returncode for program in programs] == [0, 0]
    assert outputs[0] == f"database is at revision {revision}"


@pytest.mark.parametrize("column", ["price", "tax", "commission", "cover_amount"])
def test_money_is_exact_on_postgresql(postgresql_url: str, column: str) -> None:
    engine = database.connect(postgresql_url)
    (found,) = [c for c in inspect(engine).get_columns("policies") if c["name"] == column]
    engine.dispose()
    assert str(found["type"]) == "NUMERIC"

"""Roles of docs/database-roles.md: workers and all commands but ``db upgrade`` need no right to change the schema."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from models.states import State
from tests.support.commands import run
from tests.support.servers import PostgreSQL
from tests.support.system import PROJECT, System, job, until
from worker.sandbox.server import Sandbox
from worker.storage import database, migrator

DOCUMENT = (PROJECT / "docs" / "database-roles.md").read_text("utf-8")
SERVER_SQL, DATABASE_SQL, FIRST_UPGRADE_SQL, EXISTING_TABLES_SQL = re.findall(r"```sql\n(.*?)```", DOCUMENT, re.DOTALL)
NAME, OWNER, WORKER = "confirm_offer", "confirm_offer_owner", "confirm_offer_worker"


def as_role(server: PostgreSQL, role: str) -> psycopg.Connection:
    return psycopg.connect(host="127.0.0.1", port=server.port, user=role, dbname=NAME, autocommit=True)


def url_of(server: PostgreSQL, role: str) -> str:
    return server.url(NAME).replace("postgres@", f"{role}@")


@pytest.fixture
def server(postgresql: PostgreSQL) -> Iterator[PostgreSQL]:
    with postgresql.connect() as connection:
        for statement in SERVER_SQL.strip().split("\n"):
            connection.execute(statement)
    with postgresql.connect(NAME) as connection:
        connection.execute(DATABASE_SQL)
    yield postgresql
    postgresql.drop_database(NAME)
    with postgresql.connect() as connection:
        connection.execute(f"DROP ROLE {OWNER}, {WORKER}")


@pytest.fixture
def migrated(server: PostgreSQL) -> PostgreSQL:
    engine = database.connect(url_of(server, OWNER))
    migrator.upgrade(engine)
    engine.dispose()
    with as_role(server, OWNER) as connection:
        connection.execute(FIRST_UPGRADE_SQL)
    return server


@pytest.fixture
def system(
    migrated: PostgreSQL, broker_url: str, sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> Iterator[System]:
    with System(broker_url, migrated.url(NAME), sandbox, environment, tmp_path) as running:
        running.environment["DATABASE_URL"] = url_of(migrated, WORKER)
        yield running


@pytest.mark.slow
def test_the_documented_roles_suffice_for_worker_and_operators(system: System, server: PostgreSQL) -> None:
    worker = system.start_worker()
    system.publish([job("good~http-503~1"), job("bad~http-422"), b"{"])
    system.until_events(2)
    (system.folder / "jobs.jsonl").write_text(json.dumps(job("offer-3")))

    for arguments in (
        ["db", "check"],
        ["enqueue", str(system.folder / "jobs.jsonl")],
        ["show", "good~http-503~1", "--reveal"],
        ["failed"],
        ["pause", "--reason", "test"],
        ["reprocess", "--yes", "--reason", "test"],
        ["batch", "pause", "1"],
        ["batch", "resume", "1"],
        ["batch", "show", "1"],
        ["resume"],
        ["dead-letters", "list", "--reveal"],
        ["dead-letters", "replay", "--yes"],
        ["events", "replay", "--since", "1h", "--yes"],
    ):
        done = run(*arguments, **system.environment)
        assert done.returncode == 0, (arguments, done.stderr)

    until(lambda: system.states() == {State.CONFIRMED: 2, State.FAILED: 1})
    assert worker.stop() == 0
    assert not [line for line in worker.logged() if line["level"] in ("error", "critical")]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE mine (id int)",
        "CREATE TEMPORARY TABLE mine (id int)",
        "CREATE SCHEMA mine",
        "CREATE INDEX ON confirmations (state)",
        "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'select 1'",
        "ALTER TABLE confirmations ADD COLUMN mine int",
        "ALTER TABLE confirmations DISABLE TRIGGER ALL",
        "DROP TABLE confirmations",
        "TRUNCATE audit",
        "UPDATE alembic_version SET version_num = 'mine'",
        f"SET ROLE {OWNER}",
        "DROP DATABASE confirm_offer",
    ],
)
def test_the_worker_cannot_change_the_schema(statement: str, migrated: PostgreSQL) -> None:
    with as_role(migrated, WORKER) as connection, pytest.raises(psycopg.ProgrammingError) as raised:
        connection.execute(statement)

    assert isinstance(raised.value, InsufficientPrivilege) or "must be owner" in str(raised.value)


ENTRY = "INSERT INTO audit (at, by, command, count, details) VALUES (now(), 'me', 'x', 1, '{}')"


def test_the_worker_can_only_add_to_the_audit(migrated: PostgreSQL) -> None:
    with as_role(migrated, WORKER) as connection:
        connection.execute(ENTRY)
        connection.execute("UPDATE audit SET count = 2")  # a command counts what it does
        for statement in (
            "UPDATE audit SET by = 'somebody else'",
            "UPDATE audit SET count = 1",
            "UPDATE audit SET count = 3, at = now()",
            "UPDATE audit SET details = '{\"a\": 1}'",
            "UPDATE audit SET details = '{ }'",
            "DELETE FROM audit",
            "TRUNCATE audit",
        ):
            with pytest.raises(InsufficientPrivilege):
                connection.execute(statement)
        assert connection.execute("SELECT by, count FROM audit").fetchall() == [("me", 2)]
    with as_role(migrated, OWNER) as connection:
        connection.execute("DELETE FROM audit")


def test_a_table_in_the_place_of_the_catalogue_opens_no_audit(migrated: PostgreSQL) -> None:
    with migrated.connect(NAME) as connection:
        connection.execute(f"GRANT TEMPORARY ON DATABASE {NAME} TO {WORKER}")
    with as_role(migrated, WORKER) as connection:
        connection.execute(ENTRY)
        owners = f"SELECT oid, '{WORKER}'::regrole::oid AS relowner FROM pg_class"
        connection.execute(f"CREATE TEMPORARY TABLE pg_class AS {owners}")
        with pytest.raises(InsufficientPrivilege):
            connection.execute("UPDATE audit SET by = 'somebody else'")


def test_tables_of_later_migrations_can_be_used(migrated: PostgreSQL) -> None:
    with as_role(migrated, OWNER) as connection:
        connection.execute("CREATE TABLE later (id serial PRIMARY KEY, word text)")

    with as_role(migrated, WORKER) as connection:
        connection.execute("INSERT INTO later (word) VALUES ('kept')")
        assert connection.execute("DELETE FROM later RETURNING word").fetchall() == [("kept",)]


def test_other_roles_cannot_connect(migrated: PostgreSQL) -> None:
    with migrated.connect() as connection:
        connection.execute("CREATE ROLE passer_by LOGIN")
    try:
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            as_role(migrated, "passer_by")
    finally:
        with migrated.connect() as connection:
            connection.execute("DROP ROLE passer_by")


def test_upgrade_with_the_role_of_the_worker_is_refused_in_one_line(server: PostgreSQL) -> None:
    done = run("db", "upgrade", DATABASE_URL=url_of(server, WORKER))

    assert done.returncode == 1
    assert done.stderr == "confirm-offer: rights: the role of DATABASE_URL lacks a right; see docs/database-roles.md\n"


def test_a_worker_waits_for_its_rights(system: System, server: PostgreSQL) -> None:
    """The rights are missing on tables older than the roles, for example. No job is given up meanwhile."""
    with as_role(server, OWNER) as connection:
        connection.execute(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {WORKER}")
    worker = system.start_worker()
    system.publish([job("offer-1")])
    until(lambda: [line for line in worker.logged() if "database-roles" in line.get("waits_for", "")])

    with as_role(server, OWNER) as connection:
        connection.execute(EXISTING_TABLES_SQL)

    system.until_events(1)
    assert system.states() == {State.CONFIRMED: 1}
    assert system.drain("confirm-offer.dead-letters") == []

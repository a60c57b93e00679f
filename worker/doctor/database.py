"""The database: can it be reached, is it of this version, may the role use it, do the keys open it? Then the work."""

import os
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, make_url, text
from sqlalchemy.engine import URL

from models.tables import Base
from worker.doctor import work
from worker.doctor.finding import Finding, ok, plain, warning, wrong
from worker.settings import DatabaseSettings, EncryptionSettings
from worker.storage import database, migrator

CHECK, TABLES, RIGHTS = "database", "tables", "rights"
UPGRADE = "confirm-offer db upgrade"
MEND_RIGHTS = "docs/database-roles.md has the GRANT for the workers' role"
MAX_STATEMENT = 8_000  # ms for one statement
NEEDED = ("SELECT", "INSERT", "UPDATE", "DELETE")


def look(settings: DatabaseSettings, encryption: EncryptionSettings | None) -> Iterator[Finding]:
    address = make_url(settings.url)
    is_sqlite = address.get_backend_name() == "sqlite"
    if is_sqlite and (problem := _file_problem(address.database)) is not None:
        yield problem
        return
    engine = database.read_only(settings.url)
    try:
        with engine.connect() as connection:
            yield _reached(connection, address)
            if not is_sqlite:
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {MAX_STATEMENT}")
            problem = _wrong_tables(connection) or _lacking(connection)
            yield problem or ok(TABLES, f"revision {migrator.revision(connection)}, and the role may use them")
            if problem is None or problem.level != "wrong":
                yield from work.look(connection, encryption)
    except Exception as error:
        yield _refusal(error, address)
    finally:
        engine.dispose()


def _file_problem(name: str | None) -> Finding | None:
    """What keeps a SQLite file from being used. It is neither made nor written to, to find out."""
    if not name or name == ":memory:":
        return warning(CHECK, "in memory: it ends with each process", "set DATABASE_URL to sqlite:///file.db")
    file = Path(name)
    if not file.parent.is_dir():
        return wrong(CHECK, f"there is no folder {file.parent}", "make it, or change DATABASE_URL")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        return wrong(
            CHECK,
            f"this user can't write in {file.parent}, where SQLite needs files beside {file.name}",
            "let the workers' user write there, or change DATABASE_URL",
        )
    if not file.exists():
        return wrong(CHECK, f"{file} does not exist", f"check DATABASE_URL; for a new system: {UPGRADE}")
    if not os.access(file, os.R_OK | os.W_OK):
        return wrong(CHECK, f"this user can't read and write {file}", "let the workers' user read and write it")
    return None


def _place(address: URL) -> str:
    if address.get_backend_name() == "sqlite":
        return f"SQLite, {address.database}"
    host = address.host or str(address.query.get("host", "local socket"))
    return f"{plain(host)}:{address.port or 5432}, database {plain(address.database)}"


def _reached(connection: Connection, address: URL) -> Finding:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")  # whether it is a database at all
        return ok(CHECK, _place(address))
    version = ".".join(str(number) for number in connection.dialect.server_version_info or ())
    return ok(CHECK, f"PostgreSQL {version} at {_place(address)}")


def _wrong_tables(connection: Connection) -> Finding | None:
    """Tables that are missing, or of another version."""
    found, newest = migrator.revision(connection), migrator.newest()
    if found is None:
        return wrong(TABLES, "there are none, or the role may not see them", UPGRADE)
    if found != newest and migrator.is_known(found):
        return wrong(TABLES, f"revision {found} is older than {newest}, which this version needs", UPGRADE)
    if found != newest:
        return warning(
            TABLES,
            f"revision {plain(found)} is of a newer version than this one, which has {newest}",
            "bring this program up to the version of the tables",
        )
    if connection.dialect.name == "sqlite":
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars()
        gone = sorted(set(TABLE) - set(names))
    else:
        gone = list(connection.execute(_GONE, {"tables": sorted(TABLE)}).scalars())
    return wrong(TABLES, f"gone: {_some(gone)}", "restore the database from a backup") if gone else None


def _lacking(connection: Connection) -> Finding | None:
    """Rights that the role lacks."""
    if connection.dialect.name == "sqlite":
        return None
    lacking = connection.execute(_LACKING, {"tables": sorted(TABLE), "rights": list(NEEDED)}).scalars().all()
    no_numbers = [
        f"USAGE on the sequence of {name}"
        for name, table in sorted(TABLE.items())
        if (column := table.autoincrement_column) is not None
        and connection.execute(_MAY_COUNT, {"table": name, "column": column.name}).scalar() is False
    ]
    found = [*lacking, *no_numbers]
    return wrong(RIGHTS, f"the role lacks {_some(found)}", MEND_RIGHTS) if found else None


TABLE = Base.metadata.tables
_TABLES = "FROM unnest(CAST(:tables AS text[])) AS name"
_GONE = text(f"SELECT name {_TABLES} WHERE to_regclass(name) IS NULL ORDER BY name")
_LACKING = text(
    f"SELECT privilege || ' on ' || name {_TABLES}, unnest(CAST(:rights AS text[])) AS privilege"
    " WHERE has_table_privilege(to_regclass(name), privilege) IS FALSE ORDER BY name"
)
_MAY_COUNT = text("SELECT has_sequence_privilege(pg_get_serial_sequence(:table, :column), 'USAGE')")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# What libpq says where a connection is refused; only its text tells. The text itself is not shown.
_SAID = (
    ("password authentication failed", "user or password is not accepted", "check user and password in DATABASE_URL"),
    ("no password supplied", "it wants a password", "put it into DATABASE_URL or ~/.pgpass"),
    ("pg_hba.conf", "it lets no such user in from here", "add a line to pg_hba.conf on the server"),
    ("permission denied for database", "the role may not connect to it", MEND_RIGHTS),
    ("role ", "there is no such role", "check the user in DATABASE_URL: docs/database-roles.md"),
    ("database ", "there is no such database", "check the end of DATABASE_URL, or make it: docs/database-roles.md"),
    ("server does not support SSL", "it offers no TLS", "switch ssl on at the server, or check sslmode: docs/tls.md"),
    ("certificate", "its certificate is refused", "check the host and sslrootcert in DATABASE_URL: docs/tls.md"),
    ("translate host name", "no machine has this name", "check the host in DATABASE_URL, and the name servers"),
    ("resolve host", "no machine has this name", "check the host in DATABASE_URL, and the name servers"),
    ("too many clients", "it has no connection left", "raise max_connections, or run fewer workers"),
    ("connection slots", "it has no connection left", "raise max_connections, or run fewer workers"),
    ("starting up", "it is starting", "wait until it is ready (pg_isready)"),
    ("not a database", "the file is no SQLite database", "check DATABASE_URL"),
)


def _refusal(error: Exception, address: URL) -> Finding:
    said, place = str(getattr(error, "orig", None) or error), _place(address)
    if database.lacks_rights(error):
        return wrong(RIGHTS, "the role lacks a right", MEND_RIGHTS)
    if getattr(getattr(error, "orig", None), "sqlstate", None) == "57014":
        return wrong(
            CHECK, f"a statement took longer than {MAX_STATEMENT // 1000} s", "see what the database is busy with"
        )
    for part, found, mend in _SAID:
        if part in said and (part not in ("role ", "database ") or "does not exist" in said):
            return wrong(CHECK, f"{place}: {found}", mend)
    return wrong(
        CHECK,
        f"{place}: can't be reached ({type(error).__name__})",
        "see whether it runs (pg_isready); check host and port in DATABASE_URL",
    )

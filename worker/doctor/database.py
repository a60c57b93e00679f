"""Checks the database: connection, revision of its tables, rights of the role; then the work that it holds."""

import os
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, make_url, text
from sqlalchemy.engine import URL

from models.tables import Base
from worker.doctor import work
from worker.doctor.finding import Finding, Level, safe_part
from worker.formatting import duration
from worker.settings import DatabaseSettings, EncryptionSettings
from worker.storage import database, migrator

CHECK, TABLES, RIGHTS, WRITES = "database", "tables", "rights", "writes"
UPGRADE = "confirm-offer db upgrade"
GRANT_REMEDY = "docs/database-roles.md has the GRANT for the workers' role"
STATEMENT_TIMEOUT = 8_000  # ms
LONG_COMMIT = 5.0  # seconds
STANDBY_REMEDY = "see pg_stat_replication, synchronous_standby_names and the disk: docs/reliability.md"
NEEDED_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")


def check(settings: DatabaseSettings, encryption: EncryptionSettings | None) -> Iterator[Finding]:
    address = make_url(settings.url)
    is_sqlite = address.get_backend_name() == "sqlite"
    if is_sqlite and (problem := _file_problem(address.database)) is not None:
        yield problem
        return
    if is_sqlite and Path(address.database or "").stat().st_mode & 0o077:
        yield Finding.warning(
            "file",
            f"others of this machine can use {address.database}",
            f"chmod 600 {address.database}, unless they must",
        )
    engine = database.read_only(settings.url)
    try:
        with engine.connect() as connection:
            yield _reached(connection, address)
            if not is_sqlite:
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {STATEMENT_TIMEOUT}")
            yield from _write_problems(connection)
            problem = _tables_problem(connection) or _rights_problem(connection)
            yield problem or Finding.ok(TABLES, f"revision {migrator.revision(connection)}, and the role may use them")
            if problem is None or problem.level is not Level.ERROR:
                yield from work.check(connection, encryption)
    except Exception as error:
        yield connection_finding(error, address)
    finally:
        engine.dispose()


def _file_problem(name: str | None) -> Finding | None:
    """Why a SQLite file can't be used. The check neither creates the file nor writes to it."""
    if not name or name == ":memory:":
        return Finding.warning(CHECK, "in memory: it ends with each process", "set DATABASE_URL to sqlite:///file.db")
    file = Path(name)
    if not file.parent.is_dir():
        return Finding.error(CHECK, f"there is no folder {file.parent}", "make it, or change DATABASE_URL")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        return Finding.error(
            CHECK,
            f"this user can't write in {file.parent}, where SQLite needs files beside {file.name}",
            "let the workers' user write there, or change DATABASE_URL",
        )
    if not file.exists():
        return Finding.error(CHECK, f"{file} does not exist", f"check DATABASE_URL; for a new system: {UPGRADE}")
    if file.is_dir():
        return Finding.error(CHECK, f"{file} is a folder", "put the name of a file behind it in DATABASE_URL")
    if not os.access(file, os.R_OK | os.W_OK):
        return Finding.error(CHECK, f"this user can't read and write {file}", "let the workers' user read and write it")
    return None


def _place(address: URL) -> str:
    if address.get_backend_name() == "sqlite":
        return f"SQLite, {address.database}"
    from psycopg.pq import Conninfo

    # Of the URL, else of libpq's environment.
    defaults = {option.keyword.decode(): (option.val or b"").decode() for option in Conninfo.get_defaults()}
    given = {**defaults, **address.get_dialect()().create_connect_args(address)[1]}
    hosts, ports = str(given["host"]).split(","), str(given["port"]).split(",")
    pairs = zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=False)
    places = ", ".join(f"{safe_part(host or 'local socket')}:{port or 5432}" for host, port in pairs)
    return f"{places}, database {safe_part(address.database)}"


def _reached(connection: Connection, address: URL) -> Finding:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")  # fails where the file is no database
        return Finding.ok(CHECK, _place(address))
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding not in ("UTF8", "SQL_ASCII"):
        return Finding.error(CHECK, f"its encoding is {encoding}, which can't hold all texts", "create it with UTF8")
    version = ".".join(str(number) for number in connection.dialect.server_version_info or ())
    reached = connection.connection.driver_connection.info  # type: ignore[union-attr]
    place = f"{safe_part(reached.host or 'local socket')}:{reached.port}"
    return Finding.ok(CHECK, f"PostgreSQL {version} at {place}, database {safe_part(reached.dbname)}")


def _write_problems(connection: Connection) -> Iterator[Finding]:
    """Why workers can read there and store nothing."""
    if (reason := database.refuses_writes(connection)) is not None:
        yield Finding.error(
            WRITES,
            f"it takes none: {reason}",
            "let DATABASE_URL lead to the primary; with several hosts: ?target_session_attrs=read-write",
        )
    waiting = database.waiting_commit(connection)
    if waiting is not None and waiting > LONG_COMMIT:
        yield Finding.error(WRITES, f"a commit has been waiting for {duration(waiting)}", STANDBY_REMEDY)
    elif database.lacks_synchronous_standby(connection):
        yield Finding.error(WRITES, "each commit waits for a standby, and none is connected", STANDBY_REMEDY)


def _tables_problem(connection: Connection) -> Finding | None:
    """None where all tables exist, in the revision of this version."""
    revision, newest = migrator.revision(connection), migrator.newest()
    if revision is None:
        return Finding.error(TABLES, "there are none, or the role may not see them", UPGRADE)
    if revision != newest and migrator.is_known(revision):
        return Finding.error(TABLES, f"revision {revision} is older than {newest}, which this version needs", UPGRADE)
    if revision != newest:
        return Finding.warning(
            TABLES,
            f"revision {safe_part(revision)} is of a newer version than this one, which has {newest}",
            "bring this program up to the version of the tables",
        )
    if connection.dialect.name == "sqlite":
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars()
        missing = sorted(TABLE_OF.keys() - set(names))
    else:
        missing = list(connection.execute(_MISSING_TABLES, {"tables": sorted(TABLE_OF)}).scalars())
    if missing:
        return Finding.error(TABLES, f"gone: {_first_few(missing)}", "restore the database from a backup")
    return None


def _rights_problem(connection: Connection) -> Finding | None:
    """None where the role has the rights that workers need."""
    if connection.dialect.name == "sqlite":
        return None
    parameters = {"tables": sorted(TABLE_OF), "rights": list(NEEDED_RIGHTS)}
    missing = connection.execute(_MISSING_RIGHTS, parameters).scalars().all()
    missing_sequences = [
        f"USAGE on the sequence of {name}"
        for name, table in sorted(TABLE_OF.items())
        if (column := table.autoincrement_column) is not None
        and connection.execute(_MAY_USE_SEQUENCE, {"table": name, "column": column.name}).scalar() is False
    ]
    lacking = [*missing, *missing_sequences]
    return Finding.error(RIGHTS, f"the role lacks {_first_few(lacking)}", GRANT_REMEDY) if lacking else None


TABLE_OF = Base.metadata.tables  # by name
_TABLES = "FROM unnest(CAST(:tables AS text[])) AS name"
_MISSING_TABLES = text(f"SELECT name {_TABLES} WHERE to_regclass(name) IS NULL ORDER BY name")
_MISSING_RIGHTS = text(
    f"SELECT privilege || ' on ' || name {_TABLES}, unnest(CAST(:rights AS text[])) AS privilege"
    " WHERE has_table_privilege(to_regclass(name), privilege) IS FALSE ORDER BY name"
)
_MAY_USE_SEQUENCE = text("SELECT has_sequence_privilege(pg_get_serial_sequence(:table, :column), 'USAGE')")


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def connection_finding(error: Exception, address: URL) -> Finding:
    """What connecting to the database, or a later statement, raised."""
    is_sqlite = address.get_backend_name() == "sqlite"
    if is_sqlite and (problem := _file_problem(address.database)) is not None:
        return problem
    place = _place(address)
    if database.lacks_rights(error):
        return Finding.error(RIGHTS, "the role of DATABASE_URL lacks a right", "see docs/database-roles.md")
    if getattr(getattr(error, "orig", None), "sqlstate", None) == "57014":
        return Finding.error(
            CHECK, f"a statement took longer than {STATEMENT_TIMEOUT // 1000} s", "see what the database is busy with"
        )
    if (known := database.connection_problem(error)) is not None:
        return Finding.error(CHECK, f"{place}: {known.reason}", known.remedy)
    if (unusable := database.unusable_reason(error)) is not None:
        return Finding.error(CHECK, f"{place}: {unusable}", "docs/configuration.md, at DATABASE_URL")
    if is_sqlite or not database.is_unreachable(error):
        name = database.name_of(error)
        return Finding.error(CHECK, f"{place}: it refuses this ({name})", "its log, or that of the system, says why")
    return Finding.error(
        CHECK,
        f"{place}: can't be reached ({type(error).__name__})",
        "see whether it runs (pg_isready); check host and port in DATABASE_URL",
    )

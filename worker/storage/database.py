"""The database: engines, its clock, and what PostgreSQL and SQLite do differently."""

import sqlite3
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    ExceptionContext,
    Float,
    Select,
    bindparam,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.functions import FunctionElement

from models.exact_json import write_exact
from models.types import Time


class now_plus(FunctionElement[Any]):  # noqa: N801 - reads as a function of SQL
    """Now, by the database's clock, plus seconds. Leases and due times know no other clock."""

    type = Time()
    inherit_cache = True


@compiles(now_plus, "postgresql")
def _now_plus_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"(clock_timestamp() + {compiler.process(element.clauses, **kw)} * interval '1 second')"


@compiles(now_plus, "sqlite")
def _now_plus_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {seconds} || ' seconds')"


def now() -> now_plus:
    """Now, by the database's clock."""
    return now_plus(0.0)


class seconds_since(FunctionElement[float]):  # noqa: N801
    """Seconds from a stored time to now, by the database's clock."""

    type = Float()
    inherit_cache = True


@compiles(seconds_since, "postgresql")
def _seconds_since_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"extract(epoch from clock_timestamp() - {compiler.process(element.clauses, **kw)})::float"


@compiles(seconds_since, "sqlite")
def _seconds_since_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"((julianday('now') - julianday({compiler.process(element.clauses, **kw)})) * 86400.0)"


class later_of(FunctionElement[Any]):  # noqa: N801
    """The later of a stored time and now, by the database's clock, plus seconds."""

    type = Time()
    inherit_cache = True


@compiles(later_of, "postgresql")
def _later_of_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    column, seconds = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"(greatest({column}, clock_timestamp()) + {seconds} * interval '1 second')"


@compiles(later_of, "sqlite")
def _later_of_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    column, seconds = (compiler.process(clause, **kw) for clause in element.clauses)
    later = f"max({column}, strftime('%Y-%m-%d %H:%M:%f000', 'now'))"
    return f"strftime('%Y-%m-%d %H:%M:%f000', {later}, {seconds} || ' seconds')"


DIALECTS: dict[str, Any] = {"postgresql": postgresql, "sqlite": sqlite}


def insert_if_absent(dialect: str, table: Any, *unique: str) -> Any:
    """An INSERT that does nothing if there is a row with the same ``unique`` columns, or with any that are unique.

    dialect: of DIALECTS; unique: none for any.
    """
    return DIALECTS[dialect].insert(table).on_conflict_do_nothing(index_elements=unique or None)


def in_literally(column: Any, values: Sequence[str]) -> ColumnElement[bool]:
    """A condition that a column has one of these values, with the values as literals in the statement.

    Only then can PostgreSQL, which plans for any parameters, and SQLite prove that a partial index holds all such rows.
    """
    is_one_of: ColumnElement[bool] = column.in_(
        bindparam("values", values, unique=True, expanding=True, literal_execute=True)
    )
    return is_one_of


class StatementBatch:
    """Collects writes whose results are not needed, and executes each statement once for all its rows.

    ``flush`` executes the statements in the order in which each was first added.
    """

    def __init__(self, connection: Connection) -> None:
        self.dialect = connection.dialect
        self._connection = connection
        self._rows: dict[Any, list[dict[str, Any]]] = {}

    def add(self, statement: Any, *rows: dict[str, Any]) -> None:
        """Adds rows: the parameters of one execution each. The same statement object is executed once for all."""
        self._rows.setdefault(statement, []).extend(rows)

    def flush(self) -> None:
        """Executes what was added since the last flush."""
        pending, self._rows = self._rows, {}
        for statement, rows in pending.items():
            self._connection.execute(statement, rows)


def locked(query: Select[Any], skip_locked: bool = False, of: Any = None) -> Select[Any]:
    """Locks the rows until the transaction ends. On SQLite a transaction that writes has locked all from its begin.

    of: the table whose rows are locked; None for all in the query.
    """
    return query.with_for_update(skip_locked=skip_locked, of=of)


def advisory_lock(connection: Connection, lock: int) -> None:
    """Waits for a lock and holds it until the transaction ends. SQLite has only one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(lock)))


def limit_statement_time(connection: Connection, seconds: float) -> None:
    """Ends any statement of this transaction that takes longer. Without effect on SQLite."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.set_config("statement_timeout", f"{seconds * 1000:.0f}", True)))


def connect(url: str, connections: int = 16) -> Engine:
    """An engine. After a fork, only the process that made it may use it.

    connections: how many at most. Further threads wait until one is free.
    """
    if make_url(url).get_backend_name() == "sqlite":
        return _connect_sqlite(url)
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=30,
        pool_pre_ping=False,
        json_serializer=write_exact,
        hide_parameters=True,
        connect_args={
            "connect_timeout": 5,
            "tcp_user_timeout": 30_000,  # ms: until a machine that does not answer is known to be gone
            "keepalives_idle": 10,
            "keepalives_interval": 10,
            "keepalives_count": 2,
            "application_name": "confirm-offer",
            "options": "-c timezone=utc",
        },
    )
    event.listen(engine, "handle_error", _leave_a_standby)
    return engine


def _leave_a_standby(context: ExceptionContext) -> None:
    """Drops all connections if a server accepts no writes: it was the primary until now, or is not yet."""
    if getattr(context.original_exception, "sqlstate", None) == "25006":  # read-only transaction
        context.is_disconnect = True


def _connect_sqlite(url: str) -> Engine:
    engine = create_engine(
        url,
        json_serializer=write_exact,
        hide_parameters=True,
        connect_args={"timeout": 30, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the "begin" event below begins a transaction, not the driver
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def read_only(url: str) -> Engine:
    """An engine that only reads: its transactions can change nothing and wait for no writer. Creates no SQLite file."""
    address = make_url(url)
    if address.get_backend_name() != "sqlite":
        return connect(url, connections=1).execution_options(postgresql_readonly=True)
    file = f"file:{quote(address.database or '')}?mode=ro"
    return create_engine("sqlite://", creator=lambda: sqlite3.connect(file, uri=True), poolclass=NullPool)


def is_away(error: Exception) -> bool:
    """Whether the database can't be reached or the connection broke. The same may succeed later."""
    if lacks_tables(error):
        return False
    if isinstance(error, PoolTimeout | InterfaceError | OperationalError):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated


def lacks_tables(error: Exception) -> bool:
    """Whether a table or column is missing: migrations have not run."""
    if not isinstance(error, DBAPIError):
        return False
    missing = getattr(error.orig, "sqlstate", None) in ("42P01", "42703")  # undefined table, undefined column
    return missing or str(error.orig).startswith(("no such table", "no such column"))


def lacks_rights(error: Exception) -> bool:
    """Whether the role of DATABASE_URL lacks a right for this."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "42501"


def distrusts(error: Exception) -> bool:
    """Whether the database's certificate was refused. Only libpq's text shows it."""
    return isinstance(error, OperationalError) and "certificate" in str(error.orig)

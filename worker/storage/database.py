"""The database: engines, its clock, and what PostgreSQL and SQLite do differently."""

import os
import socket
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    ExceptionContext,
    Float,
    ScalarSelect,
    Select,
    TableValuedAlias,
    Text,
    bindparam,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, NoResultFound, OperationalError
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


def now_once(seconds: float = 0.0) -> ScalarSelect[Any]:
    """Now, plus seconds, read once for a statement: unlike a clock that goes on, an index can be searched for it."""
    return select(now_plus(seconds)).scalar_subquery()


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


def insert_or_update(dialect: str, table: Any, values: dict[str, Any], unique: str, *updated: str) -> Any:
    """An INSERT of a row that updates the columns ``updated`` where there is a row with the same ``unique`` column."""
    insert = DIALECTS[dialect].insert(table).values(values)
    return insert.on_conflict_do_update(index_elements=[unique], set_={name: insert.excluded[name] for name in updated})


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


class _text_rows(FunctionElement[str]):  # noqa: N801
    type = Text()
    inherit_cache = True


@compiles(_text_rows, "postgresql")
def _text_rows_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(element.clauses, **kw)} AS json))"


@compiles(_text_rows, "sqlite")
def _text_rows_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


def text_rows(texts: ColumnElement[str]) -> TableValuedAlias:
    """A row for each of the texts, a JSON list, in its column ``value``."""
    return _text_rows(texts).table_valued("value")


def locked(query: Select[Any], skip_locked: bool = False, of: Any = None) -> Select[Any]:
    """Locks the rows until the transaction ends. On SQLite a transaction that writes has locked all from its begin.

    of: the table whose rows are locked; None for all in the query.
    """
    return query.with_for_update(skip_locked=skip_locked, of=of)


class OpenTransaction(NamedTuple):
    """A transaction that another session of the database has open. seconds: since it began."""

    seconds: float
    pid: int
    application: str


def oldest_transaction(connection: Connection) -> OpenTransaction | None:
    """The oldest one that this role may see: of its own sessions, and of all with ``pg_read_all_stats``.

    None on SQLite, where a transaction that is open stops all other writers.
    """
    if connection.dialect.name == "sqlite":
        return None
    row = connection.exec_driver_sql(_OLDEST_TRANSACTION).one_or_none()
    return None if row is None else OpenTransaction(float(row.seconds), row.pid, row.application_name)


_OLDEST_TRANSACTION = """
    select extract(epoch from clock_timestamp() - xact_start) as seconds, pid, application_name
    from pg_stat_activity
    where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
      and xact_start is not null
    order by xact_start limit 1
"""


def refuses_writes(connection: Connection) -> str | None:
    """Why the server takes no writes: it is a standby, or its transactions are read-only. None if it takes them."""
    if connection.dialect.name == "sqlite":
        return None
    is_standby, default = connection.exec_driver_sql(
        "select pg_is_in_recovery(), current_setting('default_transaction_read_only')"
    ).one()
    return "it is a standby" if is_standby else "its transactions are read-only" if default == "on" else None


class CommitsWait(Exception):
    """Commits have been waiting for long, though the database answers."""


def waiting_commit(connection: Connection) -> float | None:
    """For how many seconds the oldest commit of this role has been waiting, such as for a synchronous standby."""
    if connection.dialect.name == "sqlite":
        return None
    seconds = connection.exec_driver_sql(_WAITING_COMMIT).scalar()
    return None if seconds is None else float(seconds)


_WAITING_COMMIT = """
    select extract(epoch from max(clock_timestamp() - query_start))
    from pg_stat_activity
    where datname = current_database() and usename = current_user and state = 'active'
      and lower(left(query, 6)) = 'commit'
"""


def lacks_synchronous_standby(connection: Connection) -> bool:
    """Whether no standby is connected, though each commit has to wait for one."""
    if connection.dialect.name == "sqlite":
        return False
    return bool(connection.exec_driver_sql(_LACKS_SYNCHRONOUS_STANDBY).scalar())


_LACKS_SYNCHRONOUS_STANDBY = """
    select current_setting('synchronous_standby_names') <> ''
       and current_setting('synchronous_commit') not in ('off', 'local')
       and not exists (select from pg_stat_replication)
"""


def advisory_lock(connection: Connection, lock: int) -> None:
    """Waits for a lock and holds it until the transaction ends. SQLite has only one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(lock)))


def limit_statement_time(connection: Connection, seconds: float) -> None:
    """Ends any statement of this transaction that takes longer. Without effect on SQLite."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.set_config("statement_timeout", f"{seconds * 1000:.0f}", True)))


class Limits(NamedTuple):
    """Seconds after which a wait for PostgreSQL ends. What the URL, the role or the database sets holds in their place.

    lock: for a row or table that another session has locked. statement: for its end. idle_transaction: until the server
    ends a session that holds a transaction open and says nothing, as of a frozen process. silence: until a server that
    answers nobody is left; see BoundedConnection.
    """

    lock: float
    statement: float
    idle_transaction: float
    silence: float


def connect(url: str, connections: int = 16, limits: Limits | None = None) -> Engine:
    """An engine. After a fork, only the process that made it may use it.

    connections: how many at most. Further threads wait until one is free. limits: None for commands and migrations,
    whose statements may be long, and whose person sees them.
    """
    address = make_url(url)
    if address.get_backend_name() == "sqlite":
        return _connect_sqlite(address)
    engine = create_engine(
        address,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=30,
        pool_pre_ping=False,
        isolation_level="READ COMMITTED",  # with each BEGIN, whatever the database has as its default
        json_serializer=write_exact,
        hide_parameters=True,
        connect_args={name: value for name, value in DEFAULTS.items() if name not in _given(address)},
    )
    if limits is not None:
        event.listen(engine, "do_connect", partial(_open_bounded, limits.silence))
    settings = _session_settings(limits)
    event.listen(engine, "connect", partial(_set_what_is_relied_on, settings))
    event.listen(engine, "begin", partial(_set_for_transaction, settings))
    opened = _opened(engine)  # no reference to the engine, which would keep it for ever
    event.listen(engine, "connect", lambda connection, _: opened.add(connection))
    event.listen(engine, "handle_error", _leave_unusable_connections)
    return engine


# Parameters of libpq, for those that neither the URL nor libpq's environment gives.
DEFAULTS: dict[str, Any] = {
    "connect_timeout": 5,
    "tcp_user_timeout": 30_000,  # ms: until a machine that does not answer is known to be gone
    "keepalives_idle": 10,
    "keepalives_interval": 10,
    "keepalives_count": 2,
    "application_name": "confirm-offer",
}

# Of the session, and not by the parameter ``options``, which poolers refuse. PgBouncer keeps these for each client.
_RELIED_ON = (
    "SELECT pg_backend_pid(), set_config('timezone', 'UTC', false), set_config('datestyle', 'ISO, YMD', false),"
    " set_config('standard_conforming_strings', 'on', false), set_config('client_encoding', 'UTF8', false)"
)


def _session_settings(limits: Limits | None) -> str:
    """A statement that sets what a pooler does not keep for a client, with ``{is_local}`` for true or false."""
    settings = [
        "set_config('extra_float_digits', '1', {is_local})",
        "set_config('jit', 'off', {is_local})",  # compiling the Scheduler's statements took 20 ms, executing them 0.1
    ]
    if limits is not None:
        seconds = {
            "lock_timeout": limits.lock,
            "statement_timeout": limits.statement,
            "idle_in_transaction_session_timeout": limits.idle_transaction,
        }
        settings += [
            f"set_config('{name}', coalesce(nullif(current_setting('{name}'), '0'), '{limit * 1000:.0f}'),"
            " {is_local})"
            for name, limit in seconds.items()
        ]
    return f"SELECT {', '.join(settings)}"


def _given(address: URL) -> set[str]:
    """Names of the parameters that the URL, libpq's environment or a service file gives. A service may give any."""
    from psycopg.pq import Conninfo

    defaults = {option.keyword.decode(): option.val for option in Conninfo.get_defaults()}
    given = set(address.query) | {name for name in DEFAULTS if defaults.get(name) is not None}
    return set(DEFAULTS) if "service" in address.query else given


def _open_bounded(silence: float, _dialect: Any, _record: Any, args: Any, parameters: Any) -> Any:
    from worker.storage.bounded_connection import BoundedConnection  # with psycopg, which SQLite does not need

    return BoundedConnection.open(silence, *args, **parameters)


def _set_what_is_relied_on(settings: str, connection: Any, record: Any) -> None:
    """Sets how values are written and read, and for how long to wait, whatever defaults the database or the role has.

    A pooler in transaction mode hands out another session for each transaction, where a prepared statement is missing,
    or is another's. libpq was then told a process id that is not that of the session: nothing is prepared.
    """
    try:
        backend_pid = connection.execute(_RELIED_ON).fetchone()[0]
        record.info[IS_POOLED] = is_pooled = backend_pid != connection.info.backend_pid
        if not is_pooled:
            connection.execute(settings.format(is_local="false"))
        connection.commit()
    except BaseException:
        connection.close()
        raise
    if is_pooled:
        connection.prepare_threshold = None


def _set_for_transaction(settings: str, connection: Connection) -> None:
    """Behind a pooler the session may be another one in each transaction, and afterwards others use it."""
    if connection.info[IS_POOLED]:
        connection.exec_driver_sql(settings.format(is_local="true"))


IS_POOLED = "is_pooled"


def hang_up(engine: Engine) -> None:
    """Ends the connections of this engine, whatever the server does: a statement that it does not answer fails at once.

    Closing a connection from another thread would wait for the statement. The end of its socket wakes that thread.
    """
    for connection in list(_opened(engine)):
        with (
            suppress(OSError, engine.dialect.loaded_dbapi.Error),
            socket.socket(fileno=os.dup(connection.fileno())) as end,
        ):
            end.shutdown(socket.SHUT_RDWR)


def _opened(engine: Engine) -> "WeakSet[Any]":
    """The connections of an engine, whether in use or not."""
    return _connections.setdefault(engine, WeakSet())


_connections: WeakKeyDictionary[Engine, WeakSet[Any]] = WeakKeyDictionary()


READ_ONLY = "25006"  # a server that accepts no writes: it was the primary until now, or is not yet
# Also a prepared statement whose result has changed with its table ("cached plan must not change result type"), or that
# a pooler has lost or put elsewhere.
_UNUSABLE = frozenset({READ_ONLY, "0A000", "26000", "42P05"})


def _leave_unusable_connections(context: ExceptionContext) -> None:
    """Drops all connections after an error that stays with a connection: on new ones, the same succeeds."""
    if getattr(context.original_exception, "sqlstate", None) in _UNUSABLE:
        context.is_disconnect = True


def _connect_sqlite(address: URL) -> Engine:
    engine = create_engine(
        address,
        json_serializer=write_exact,
        hide_parameters=True,
        connect_args={"check_same_thread": False, **({} if "timeout" in address.query else {"timeout": 30})},
    )

    @event.listens_for(engine, "do_connect")
    def _make_private(*_: Any) -> None:
        """Makes the file, if there is none, for its owner only. Those that SQLite puts beside it get the same mode."""
        with suppress(OSError):  # there is one, or SQLite says what is wrong
            file = os.path.realpath(address.database or "")  # where a link leads: with O_EXCL, none is followed
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the "begin" event below begins a transaction, not the driver
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit outlasts a power failure
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


def is_error(error: BaseException) -> bool:
    """Whether the database, or the way to it, raised this, or does not have a row that it has just taken."""
    return isinstance(error, DBAPIError | PoolTimeout | NoResultFound)


def is_away(error: BaseException) -> bool:
    """Whether the database can't be reached or the connection broke. The same may succeed later."""
    if lacks_tables(error):
        return False
    if isinstance(error, PoolTimeout | InterfaceError | OperationalError):
        return True
    return _is_disconnected(error)


def is_unreachable(error: BaseException) -> bool:
    """As ``is_away``, without what a server answers about one statement, such as that a row of it is locked."""
    sqlstate = _sqlstate(error)
    return is_away(error) and (sqlstate is None or (_is_disconnected(error) and sqlstate not in _UNUSABLE))


def _is_disconnected(error: BaseException) -> bool:
    return isinstance(error, DBAPIError) and error.connection_invalidated


def _sqlstate(error: BaseException) -> str | None:
    sqlstate = getattr(getattr(error, "orig", None), "sqlstate", None)
    return None if sqlstate is None else str(sqlstate)


def may_blame_values(error: BaseException) -> bool:
    """Whether an error may come from the values of a statement. A database that is at fault itself raises these too.

    SQLSTATE classes 22 (data), 23 (integrity) and P0 (raised by a trigger), and what drivers refuse by themselves.
    """
    if not isinstance(error, DBAPIError) or is_away(error):
        return False
    sqlstate = _sqlstate(error)
    if sqlstate is None:
        return isinstance(error, DataError | IntegrityError)
    return sqlstate[:2] in ("22", "23", "P0")


def name_of(error: BaseException) -> str:
    """The type of an error, with PostgreSQL's SQLSTATE. Its text may hold values."""
    sqlstate = _sqlstate(error)
    return f"{type(error).__name__} {sqlstate}" if sqlstate else type(error).__name__


def lacks_tables(error: BaseException) -> bool:
    """Whether a table or column is missing: migrations have not run."""
    if not isinstance(error, DBAPIError):
        return False
    missing = _sqlstate(error) in ("42P01", "42703")  # undefined table, undefined column
    return missing or str(error.orig).startswith(("no such table", "no such column"))


def refused_a_write(error: BaseException) -> bool:
    """Whether the server takes no writes, such as a standby."""
    return isinstance(error, DBAPIError) and _sqlstate(error) == READ_ONLY


def lacks_rights(error: BaseException) -> bool:
    """Whether the role of DATABASE_URL lacks a right for this."""
    return isinstance(error, DBAPIError) and _sqlstate(error) == "42501"


def unusable(engine: Engine) -> str | None:
    """Why no work can ever be done with this database as it is set up, in one line; None if it can, or is away."""
    try:
        with engine.begin() as connection:  # two statements in one transaction, as all work
            connection.execute(select(now()))
            if connection.dialect.name == "postgresql":
                encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
                if encoding not in ("UTF8", "SQL_ASCII"):
                    return f"the database's encoding is {encoding}, which can't hold all texts; create it with UTF8"
    except Exception as error:
        if not is_error(error):
            raise
        return unusable_reason(error)
    return None


# Part of the message of libpq or PgBouncer, and what it means. There is no other sign of the cause.
_UNUSABLE_REASONS = (
    (
        "unsupported startup parameter",
        "a pooler before it refuses the parameter 'options'; set it with ALTER ROLE or ALTER DATABASE in its place",
    ),
    ("statement pooling mode", "a pooler before it gives no transactions; let it pool by transaction or session"),
    ("invalid integer value", "an option of it should be a number"),
    ("bad value for", "an option of it has a value that libpq does not know"),
    (" value: ", "an option of it has a value that libpq does not know"),
    ("definition of service", "there is no such service: see libpq's connection service file"),
    ("service file", "there is no such service: see libpq's connection service file"),
    ("invalid command-line argument", "its 'options' are wrong"),
    ("unrecognized configuration parameter", "its 'options' name a parameter that the server does not know"),
    ("file is not a database", "the file is no SQLite database"),
    ("unable to open database file", "SQLite can't open or make the file; its folder must exist, and be writable"),
)


def unusable_reason(error: Exception) -> str | None:
    """What an error shows to be wrong for good with DATABASE_URL, or what it leads to."""
    message = str(getattr(error, "orig", None) or error)
    return next((reason for part, reason in _UNUSABLE_REASONS if part in message), None)


# Part of libpq's message, and what it means, and what to do. There is no other sign of the cause. The message itself is
# not shown, as it may hold anything.
_CONNECTION_ERRORS = (
    ("password authentication failed", "user or password is not accepted", "check user and password in DATABASE_URL"),
    ("no password supplied", "it wants a password", "put it into DATABASE_URL or ~/.pgpass"),
    ("pg_hba.conf", "it lets no such user in from here", "add a line to pg_hba.conf on the server"),
    (
        "permission denied for database",
        "the role may not connect to it",
        "docs/database-roles.md has the GRANT for it",
    ),
    ("role ", "there is no such role", "check the user in DATABASE_URL: docs/database-roles.md"),
    ("database ", "there is no such database", "check the end of DATABASE_URL, or make it: docs/database-roles.md"),
    ("server does not support SSL", "it offers no TLS", "switch ssl on at the server, or check sslmode: docs/tls.md"),
    ("certificate", "its certificate is refused", "check the host and sslrootcert in DATABASE_URL: docs/tls.md"),
    ("translate host name", "no machine has this name", "check the host in DATABASE_URL, and the name servers"),
    ("resolve host", "no machine has this name", "check the host in DATABASE_URL, and the name servers"),
    ("too many clients", "it has no connection left", "raise max_connections, or run fewer workers"),
    ("connection slots", "it has no connection left", "raise max_connections, or run fewer workers"),
    ("starting up", "it is starting", "wait until it is ready (pg_isready)"),
    (
        "Connection refused",
        "can't be reached: nothing listens there",
        "see whether it runs (pg_isready); check host and port in DATABASE_URL",
    ),
    ("invalid response to SSL", "what listens there is no PostgreSQL", "check host and port in DATABASE_URL"),
    ("unexpected response", "what listens there is no PostgreSQL", "check host and port in DATABASE_URL"),
    ("not a database", "the file is no SQLite database", "check DATABASE_URL"),
    ("database is locked", "another process keeps it locked", "let that end, or raise ?timeout= in DATABASE_URL"),
    ("readonly", "this user can't write to it", "let the workers' user write there"),
    ("disk is full", "its disk is full", "free disk space"),
)


class ConnectionProblem(NamedTuple):
    """Why the database can't be used, and what to do about it."""

    reason: str
    remedy: str


def connection_problem(error: BaseException) -> ConnectionProblem | None:
    """What an error of connecting means; None where its text does not show it."""
    message = str(getattr(error, "orig", None) or error)
    for part, reason, remedy in _CONNECTION_ERRORS:
        if part in message and (part not in ("role ", "database ") or "does not exist" in message):
            return ConnectionProblem(reason, remedy)
    return None


def distrusts(error: Exception) -> bool:
    """Whether the database's certificate was refused. Only libpq's text shows it."""
    return isinstance(error, OperationalError) and "certificate" in str(error.orig)

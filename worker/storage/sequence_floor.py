"""Where the sequences of events begin on the server that the database is on.

Consumers drop an event whose sequence is not above that of the newest one that they have. A standby that lagged, or a
restored backup, may have lost rows whose events consumers have. There, each confirmation goes on beyond any sequence
that was given before: at the seconds since 2020, when the first event is written. So a confirmation's events count from
1 for as long as no database was lost.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, ScalarSelect, func, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from models.tables import Server
from worker.storage.database import insert_if_absent, now

EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
MIN_STEP = 1_000_000  # from one floor to the next, whatever the clock says: more than any confirmation has events


class this_server(FunctionElement[str]):  # noqa: N801 - reads as a function of SQL
    """The server: its cluster and timeline. Empty on SQLite, whose copies can't be told apart."""

    inherit_cache = True


@compiles(this_server, "postgresql")
def _this_server_postgresql(*_: Any, **__: Any) -> str:
    return "(SELECT confirm_offer_server())"  # once for a statement


@compiles(this_server, "sqlite")
def _this_server_sqlite(*_: Any, **__: Any) -> str:
    return "''"


def sequence_floor() -> ScalarSelect[Any]:
    """The number that sequences go on from at least; null if no event was written on this server yet."""
    return select(Server.sequence_floor).where(Server.name == this_server()).scalar_subquery()


def note_server(connection: Connection) -> None:
    """Stores where sequences begin on this server. Does nothing if it is stored."""
    name, at, highest = connection.execute(select(this_server(), now(), _HIGHEST)).one()
    floor = max(int((at - EPOCH).total_seconds()), highest + MIN_STEP)
    connection.execute(
        insert_if_absent(connection.dialect.name, Server.__table__).values(seen_at=now()),
        {"name": name, "sequence_floor": floor},
    )


_HIGHEST = select(func.coalesce(func.max(Server.sequence_floor), 0)).scalar_subquery()

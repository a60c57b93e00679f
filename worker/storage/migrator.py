"""Migrations: brings the database's schema up to date, and says whether it is.

Alembic is imported where it is used: workers and most commands do not need its 8 MB.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine

import migrations
from worker.storage import database

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

LOCK = 0x636F6E666972  # the advisory lock of migrations: an arbitrary number


def config(connection: Connection) -> "Config":
    """Alembic's configuration for a connection. The caller commits its transaction."""
    settings = _without_connection()
    settings.attributes["connection"] = connection
    return settings


def _without_connection() -> "Config":
    from alembic.config import Config

    settings = Config()
    settings.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return settings


def upgrade(engine: Engine) -> tuple[str | None, str | None]:
    """Applies all missing migrations in one transaction. Returns the revisions before and after.

    Leaves the tables of a later version as they are: that version was rolled back, and this one can use its tables.
    """
    from alembic import command

    with engine.begin() as connection:
        database.advisory_lock(connection, LOCK)
        before = revision(connection)
        if before is not None and not is_known(before):
            return before, before
        command.upgrade(config(connection), "head")
        return before, revision(connection)


def revision(connection: Connection) -> str | None:
    """The revision of the database; None if it is empty."""
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def newest() -> str | None:
    """The revision that this program needs."""
    return _scripts().get_current_head()


def is_known(revision: str) -> bool:
    """Whether this program knows a revision; otherwise a later version made it."""
    return revision in {script.revision for script in _scripts().walk_revisions()}


def _scripts() -> "ScriptDirectory":
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_without_connection())


def is_current(engine: Engine) -> bool:
    with engine.connect() as connection:
        return revision(connection) == newest()

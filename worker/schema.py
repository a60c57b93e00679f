"""The database's schema: bringing it up to date, and telling whether it is."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

import migrations
from worker import database

LOCK = 0x636F6E666972  # any number of our own


def config(connection: Connection) -> Config:
    """Alembic's configuration for a connection whose transaction the caller commits."""
    settings = _without_connection()
    settings.attributes["connection"] = connection
    return settings


def _without_connection() -> Config:
    settings = Config()
    settings.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return settings


def upgrade(engine: Engine) -> tuple[str | None, str | None]:
    """Applies all migrations that are missing, in one transaction. Returns the revision before and after.

    Leaves the tables of a later version as they are: that version is being rolled back, and this one can use them.
    """
    with engine.begin() as connection:
        database.one_at_a_time(connection, LOCK)
        before = revision(connection)
        if before is not None and not is_known(before):
            return before, before
        command.upgrade(config(connection), "head")
        return before, revision(connection)


def revision(connection: Connection) -> str | None:
    """The revision that the database has; None for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def newest() -> str | None:
    """The revision that this program was written for."""
    return ScriptDirectory.from_config(_without_connection()).get_current_head()


def is_known(revision: str) -> bool:
    """Whether this program knows a revision, and not only a newer one does."""
    scripts = ScriptDirectory.from_config(_without_connection())
    return revision in {script.revision for script in scripts.walk_revisions()}


def is_current(engine: Engine) -> bool:
    with engine.connect() as connection:
        return revision(connection) == newest()

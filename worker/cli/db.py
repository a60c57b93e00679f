"""``confirm-offer db upgrade`` and ``db check``: the database's schema."""

import click

from tasks.operations.audit import audit, who
from worker.cli.ui.console import Failed, by_option, handle_errors, json_option, print_result
from worker.settings import DatabaseSettings, read
from worker.storage import database, migrator


@click.group()
def db() -> None:
    """The database's schema."""


@db.command()
@by_option
@json_option
@handle_errors
def upgrade(as_json: bool) -> None:
    """Brings the database's tables up to date. Safe to repeat, and to run twice at once.

    Example: confirm-offer db upgrade
    """
    engine = database.connect(read(DatabaseSettings).url)
    before, after = migrator.upgrade(engine)
    if before != after:
        with engine.begin() as connection:
            audit(connection, "db upgrade", who(), None, 1, before=before, after=after)
    if after is not None and not migrator.is_known(after):
        text = _of_a_later_version(after)
    else:
        text = f"database is at revision {after}" + ("" if before == after else f", was {before or 'empty'}")
    print_result(as_json, text, revision=after, before=before)


@db.command()
@json_option
@handle_errors
def check(as_json: bool) -> None:
    """Tells whether this version can work with the database's tables. Exit code 1 where it can't.

    It can with its own and, while a later version is rolled out or back, with those of the version after it.

    Example: confirm-offer db check
    """
    engine = database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        actual, wanted = migrator.revision(connection), migrator.newest()
    if actual is None or (actual != wanted and migrator.is_known(actual)):
        raise Failed(f"database is at revision {actual or 'none'}, not at {wanted}; run 'confirm-offer db upgrade'")
    is_current = actual == wanted
    text = f"database is at revision {actual}, as it should be" if is_current else _of_a_later_version(actual)
    print_result(as_json, text, revision=actual)


def _of_a_later_version(revision: str) -> str:
    return (
        f"database is at revision {revision}, of a later version than this one, which has {migrator.newest()};"
        " left as it is (docs/upgrading.md)"
    )

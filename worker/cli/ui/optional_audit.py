"""An audit row of commands that work without a database: written if one is set and can be reached."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tasks.operations.audit import Tally
from worker.cli.ui.console import print_error
from worker.settings import DatabaseSettings, read
from worker.storage import database


@contextmanager
def optional_tally(
    command: str, reason: str | None = None, wanted: bool = True, **details: Any
) -> Iterator[Callable[[int], None]]:
    """Yields a function that adds to the count of an audit row. There is no row unless DATABASE_URL is set.

    wanted: False for no row; reason, details: as for ``Tally``.
    """
    settings = read(DatabaseSettings)
    tally: Tally | None = None

    def guarded(write: Callable[[], Any]) -> Any:
        nonlocal tally
        try:
            return write()
        except Exception as error:
            if not (database.is_away(error) or database.lacks_tables(error)):
                raise
            tally = None
            why = "has not its tables" if database.lacks_tables(error) else "can't be reached"
            print_error(f"no audit row is written, because the database {why}")
            return None

    def count(number: int) -> None:
        if tally is not None:
            guarded(lambda: tally.add(number) if tally is not None else None)

    if wanted and "DATABASE_URL" in settings.model_fields_set:
        tally = guarded(lambda: Tally(database.connect(settings.url, connections=1), command, reason, **details))
    try:
        yield count
    finally:
        if tally is not None:
            guarded(tally.write)

"""The low-water mark of a queue that is a table: no row that waits is older.

While any transaction of the database stays open, PostgreSQL keeps the index entries of all rows that have left the
queue since, and a query of the queue looks at each. One that begins at the mark does not.

Transactions do not commit in the order of their times. A row may appear below the mark, such as one of a transaction
that took longer than MAX_TRANSACTION. So the mark is looked for from the beginning now and then.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Executable

BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
MAX_TRANSACTION = timedelta(seconds=5)
ADVANCE_EVERY = 1.0  # seconds
LOOK_BACK_EVERY = 30.0  # seconds: a row that appears below the mark waits so long
LOOK_BACK_SHARE = 0.01  # of the time; a look back reads all entries that are kept


class LowWaterMark:
    """Belongs to one thread."""

    def __init__(self, oldest: Executable) -> None:
        """oldest: selects the time of the oldest row from ``:since`` on, or null, and the database's time."""
        self._oldest = oldest
        self.forget()

    def forget(self) -> None:
        """Makes the next call look back: older rows may have come to wait."""
        self._mark = BEGINNING
        self._advance_at = self._look_back_at = float("-inf")

    def read(self, connection: Connection, **parameters: Any) -> datetime:
        """The mark. parameters: further ones of ``oldest``."""
        began = time.monotonic()
        if began < self._advance_at:
            return self._mark
        looks_back = began >= self._look_back_at
        since = BEGINNING if looks_back else self._mark
        oldest, at = connection.execute(self._oldest, {"since": since, **parameters}).one()
        self._mark = min(oldest or at, at - MAX_TRANSACTION)
        self._advance_at = began + ADVANCE_EVERY
        if looks_back:
            took = time.monotonic() - began
            self._look_back_at = began + max(LOOK_BACK_EVERY, took / LOOK_BACK_SHARE)
        return self._mark

"""The low-water mark of a queue that is a table: no row that waits is older.

While any transaction of the database stays open, the index of a queue keeps the entries of all rows that have left it
since, and a query looks at each. One that begins at the mark does not.
"""

import time
from datetime import datetime, timedelta

from sqlalchemy import Connection, Executable

LOOK_BACK_EVERY = 30.0  # seconds
MAX_TRANSACTION = timedelta(minutes=1)  # one that began before may still write a row from before


class LowWaterMark:
    """Belongs to one thread."""

    def __init__(self, oldest: Executable) -> None:
        """oldest: selects the time of the oldest row, or null, and the database's time."""
        self._oldest = oldest
        self.forget()

    def forget(self) -> None:
        """Makes the next call look back: older rows may have come to wait."""
        self._mark: datetime | None = None
        self._looked_back_at = float("-inf")

    def read(self, connection: Connection) -> datetime:
        """When the oldest row that waits was due or written, or earlier. Looks for it now and then only."""
        if self._mark is None or time.monotonic() - self._looked_back_at >= LOOK_BACK_EVERY:
            oldest, at = connection.execute(self._oldest).one()
            self._mark = min(oldest or at, at - MAX_TRANSACTION)
            self._looked_back_at = time.monotonic()
        return self._mark

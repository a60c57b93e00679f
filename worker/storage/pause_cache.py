"""The pauses that people have set, as a process knows them. tasks/operations/pauses.py sets and ends them."""

import time

from sqlalchemy import Connection, select

from models.tables import Pause

ALL = ""  # the partner_id of a pause for all
FRESH_FOR = 1.0  # seconds after which a process reads the pauses again


class PauseCache:
    """The pauses, at most FRESH_FOR seconds old. Threads share it."""

    def __init__(self) -> None:
        self._partners: frozenset[str] = frozenset()
        self._read_at = float("-inf")

    def partners(self, connection: Connection) -> frozenset[str]:
        """The partners that are paused, and ALL if all are."""
        asked_at = time.monotonic()
        if asked_at - self._read_at > FRESH_FOR:
            self._partners = frozenset(connection.execute(select(Pause.partner_id)).scalars())
            self._read_at = asked_at  # set last: no other thread may trust pauses that are not read yet
        return self._partners

    def is_paused(self, connection: Connection, partner_id: str) -> bool:
        """Whether calls for a partner are paused."""
        paused = self.partners(connection)
        return ALL in paused or partner_id in paused

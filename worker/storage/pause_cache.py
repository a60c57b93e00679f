"""What a person has paused, as a process knows it. See tasks/pauses.py for who pauses and resumes."""

import time

from sqlalchemy import Connection, select

from models.tables import Pause

ALL = ""  # the partner_id of a pause for all
FRESH_FOR = 1.0  # seconds that a process believes what it last read


class PauseCache:
    """What is paused, as one process knows it: read anew after a second."""

    def __init__(self) -> None:
        self._partners: frozenset[str] = frozenset()
        self._read_at = float("-inf")

    def partners(self, connection: Connection) -> frozenset[str]:
        """The partners that are paused; ALL among them where all are."""
        asked_at = time.monotonic()
        if asked_at - self._read_at > FRESH_FOR:
            self._partners = frozenset(connection.execute(select(Pause.partner_id)).scalars())
            self._read_at = asked_at  # not before: another thread would trust what is not read yet
        return self._partners

    def is_paused(self, connection: Connection, partner_id: str) -> bool:
        """Whether calls for this partner are paused."""
        paused = self.partners(connection)
        return ALL in paused or partner_id in paused

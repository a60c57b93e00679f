"""Retention: blanks personal data past RETENTION_DAYS, a step at a time over all workers together."""

from datetime import timedelta

import structlog
from sqlalchemy import Connection, select

from tasks.privacy.purge import purge
from worker.runtime import Runtime
from worker.services.service import Service
from worker.storage.database import now
from worker.storage.rate_limiter import reserve_slot

log = structlog.get_logger(__name__)

STEPS_A_SECOND = 1.0  # of 100 confirmations


class Retention(Service):
    """A duty beside the Scheduler, in workers that have RETENTION_DAYS."""

    name = "retention"
    interval = 10.0

    def __init__(self, runtime: Runtime, days: float) -> None:
        super().__init__()
        self._runtime = runtime
        self._days = days

    def run_once(self) -> bool:
        """Blanks one step, when it is a worker's turn. Comes again soon where there is likely more."""
        with self._runtime.engine.begin() as connection:
            wait = reserve_slot(connection, STEPS_A_SECOND, self.name)
        if wait is None or self._stopping.wait(wait):
            return False
        with self._runtime.engine.begin() as connection:
            count = self._purge(connection)
        if count:
            log.info("purged", count=count, days=self._days)
        return count > 0

    def _purge(self, connection: Connection) -> int:
        at = connection.execute(select(now())).scalar_one()
        return purge(connection, at - timedelta(days=self._days))

"""Retention: blanks personal data older than RETENTION_DAYS, step by step, at one rate over all workers."""

from datetime import timedelta
from uuid import UUID

import structlog
from sqlalchemy import Connection, select

from tasks.privacy.purge import purge
from worker.backoff import SetAside
from worker.observability import metrics
from worker.observability.sentry import report
from worker.runtime import Runtime
from worker.services.service import Service
from worker.storage.database import now
from worker.storage.rate_limiter import reserve_slot

log = structlog.get_logger(__name__)

INITIAL_BACKOFF, MAX_BACKOFF = 300.0, 6 * 3600.0  # seconds until one that could not be purged is tried again
STEPS_PER_SECOND = 1.0  # over all workers; a step purges up to 100 confirmations


class Retention(Service):
    """Runs beside the Scheduler where RETENTION_DAYS is set."""

    name = "retention"
    starts_work = True
    interval = 10.0

    def __init__(self, runtime: Runtime, days: float) -> None:
        super().__init__()
        self._runtime = runtime
        self._days = days
        self._failing = SetAside[UUID](INITIAL_BACKOFF, MAX_BACKOFF)  # those that could not be purged

    def run_once(self) -> bool:
        """Purges one step in a slot of the common rate. Returns whether there was anything to purge."""
        with self._runtime.engine.begin() as connection:
            wait = reserve_slot(connection, STEPS_PER_SECOND, self.name)
        if wait is None or self._stopping.wait(wait):
            return False
        failed: dict[UUID, Exception] = {}
        with self._runtime.engine.begin() as connection:
            count = self._purge(connection, failed)
        if count:
            log.info("purged", count=count, days=self._days)
        for id_, error in failed.items():
            metrics.put_off()
            if self._failing.add(id_):
                report(error, duty=self.name, confirmation=str(id_))
        return count > 0

    def _purge(self, connection: Connection, failed: dict[UUID, Exception]) -> int:
        at = connection.execute(select(now())).scalar_one()
        return purge(connection, at - timedelta(days=self._days), left_out=self._failing.waiting(), failed=failed)

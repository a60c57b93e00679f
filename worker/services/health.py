"""Health: a worker records when each of its parts last succeeded; ``confirm-offer health`` reads it (health_file).

The consumer succeeds when its loop runs with a connection to RabbitMQ, Scheduler and Relay with a run without an error,
the database with an answer, the tasks by ending the messages that they have (progress).
"""

import time
from collections.abc import Iterable

import structlog
from sqlalchemy import select

from worker.outages import most_awaited
from worker.runtime import Runtime
from worker.services.health_file import UNWELL_AFTER, HealthFile, PartHealth
from worker.services.progress import Progress
from worker.services.service import Service
from worker.services.vitals import Vitals

log = structlog.get_logger(__name__)

CONSUMER, TASKS = "consumer", "tasks"


class DatabaseProbe(Service):
    """Asks the database for an answer. A thread of its own, because a database that hangs blocks it."""

    name = "database"
    interval = 5.0

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def run_once(self) -> bool:
        with self._runtime.engine.connect() as connection:
            connection.execute(select(1))
        return False


class Health(Service):
    """Writes the health of this worker to its file until the process ends."""

    name = "health"
    interval = 2.0

    def __init__(self, runtime: Runtime, services: Iterable[Service], consumes: bool) -> None:
        """services: those whose failure makes the worker unwell; consumes: whether the worker consumes queues."""
        super().__init__()
        self.vitals = Vitals(runtime)
        self._probe = DatabaseProbe(runtime)
        self._services = [*services, self._probe]
        self._consumer = PartHealth(ran_at=time.time())
        self._consumes = consumes
        xone = runtime.xone_settings
        self.progress = Progress(xone.XONE_TIMEOUT, xone.lease_seconds)
        self._file = HealthFile()
        self.is_stopping = False

    def start(self) -> None:
        self._probe.start()
        self.vitals.start()
        super().start()

    def consumer_succeeded(self) -> None:
        """Called by the consumer as often as its loop runs with a connection."""
        now = time.time()
        self._consumer = PartHealth(now, now)

    def consumer_waiting(self) -> None:
        """Called by the consumer as often as it tries to connect."""
        self._consumer = PartHealth(self._consumer.succeeded_at, time.time(), "broker")

    def parts(self) -> dict[str, PartHealth]:
        """The health of each part by name."""
        parts = {}
        if self._consumes:
            is_excused = self._probe.waits_for is not None or self._consumer.waits_for is not None
            parts = {CONSUMER: self._consumer, TASKS: self.progress.part(is_excused, most_awaited)}
        for service in self._services:
            parts[service.name] = PartHealth(service.succeeded_at, service.ran_at, service.waits_for)
        return parts

    def last_successes(self) -> dict[str, float]:
        """When each part last succeeded, as of time.time(); 0.0 for never."""
        return {name: part.succeeded_at for name, part in self.parts().items()}

    def run_once(self) -> bool:
        parts, now = self.parts(), time.time()
        self.vitals.unwell = [name for name, part in parts.items() if now - part.succeeded_at > UNWELL_AFTER]
        self._file.write(parts, self.is_stopping, self.vitals.notes)
        return False

    def close(self) -> None:
        self.vitals.stop()
        self._probe.stop()
        self._file.close()

    def _log_failure(self, error: Exception) -> None:
        log.warning("health_not_noted", needs="a temporary folder that it can write to", error=type(error).__name__)

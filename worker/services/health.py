"""Health: a worker notes when each of its parts was last well; ``confirm-offer health`` reads it (worker/vitals.py).

A part is well when it has come round: the consumer with a connection to RabbitMQ, Scheduler and Relay with a turn that
did not fail, the database with an answer.
"""

import time
from collections.abc import Iterable

import structlog
from sqlalchemy import select

from worker.runtime import Runtime
from worker.services.health_file import HealthFile, PartHealth
from worker.services.service import Service

log = structlog.get_logger(__name__)

CONSUMER = "consumer"


class Answers(Service):
    """Asks the database whether it answers. By itself, for it may take its time where it does not."""

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
    """Writes the notes of one worker, until its process ends."""

    name = "health"
    interval = 2.0

    def __init__(self, runtime: Runtime, services: Iterable[Service], consumes: bool) -> None:
        super().__init__()
        self._answers = Answers(runtime)
        self._loops = [*services, self._answers]
        self._consumer = PartHealth(ran_at=time.time())
        self._consumes = consumes
        self._notes = HealthFile()
        self.is_stopping = False

    def start(self) -> None:
        self._answers.start()
        super().start()

    def consumer_well(self) -> None:
        """Called by the consumer as it comes round, connected."""
        now = time.time()
        self._consumer = PartHealth(now, now)

    def consumer_tries(self) -> None:
        """Called by the consumer as it comes round, while there is no connection."""
        self._consumer = PartHealth(self._consumer.succeeded_at, time.time(), "broker")

    def parts(self) -> dict[str, PartHealth]:
        parts = {CONSUMER: self._consumer} if self._consumes else {}
        return parts | {loop.name: PartHealth(loop.succeeded_at, loop.ran_at, loop.waits_for) for loop in self._loops}

    def notes(self) -> dict[str, float]:
        """When each part was last well (time.time()); 0 where it never was."""
        return {name: part.succeeded_at for name, part in self.parts().items()}

    def run_once(self) -> bool:
        self._notes.write(self.parts(), self.is_stopping)
        return False

    def close(self) -> None:
        self._answers.stop()
        self._notes.close()

    def _log_failure(self, error: Exception) -> None:
        log.warning("health_not_noted", needs="a temporary folder that it can write to", error=type(error).__name__)

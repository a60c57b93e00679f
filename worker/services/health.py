"""Health: a worker records when each of its parts last succeeded; ``confirm-offer health`` reads it (health_file).

The consumer succeeds when its loop runs with a connection to RabbitMQ, Scheduler and Relay with a run without an error,
the database by taking work, the tasks by ending the messages that they have (progress).
"""

import time
from collections.abc import Iterable

import structlog
from sqlalchemy import false, select

from models.tables import Confirmation
from worker.messaging import broker
from worker.outages import most_awaited
from worker.runtime import Runtime
from worker.services.health_file import HealthFile, PartHealth
from worker.services.progress import Progress
from worker.services.service import Service
from worker.services.vitals import Vitals
from worker.storage.database import CommitsWait, locked, waiting_commit

log = structlog.get_logger(__name__)

CONSUMER, TASKS = "consumer", "tasks"
_MAY_WRITE = locked(select(Confirmation.id).where(false()))  # locks nothing, but not in a read-only transaction
HEARD_WITHIN = 1.5 * broker.HEARTBEAT  # seconds in which a broker that is well sends something


class DatabaseProbe(Service):
    """Asks the database whether it takes work. A thread of its own, because a database that hangs blocks it.

    One that is read-only answers with an error, after which no connection to it is kept.
    """

    name = "database"
    interval = 5.0
    max_commit_time = 10.0  # seconds

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def run_once(self) -> bool:
        with self._runtime.engine.connect() as connection:
            connection.execute(_MAY_WRITE)
            waiting = waiting_commit(connection)
        if waiting is not None and waiting > self.max_commit_time:
            raise CommitsWait
        return False


class BrokerWatch(Service):
    """Hangs up on a broker that is silent. A thread of its own, because the consumer's may be blocked by it."""

    name = "broker-watch"
    interval = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._peer: broker.Peer | None = None
        self.seconds_silent = 0.0

    def watch(self, peer: broker.Peer | None) -> None:
        """Called by the consumer when it has connected. peer: None for a broker without heartbeats."""
        self._peer, self.seconds_silent = peer, 0.0

    def watch_no_more(self) -> None:
        """Called by the consumer when it has lost its connection."""
        self._peer = None

    def run_once(self) -> bool:
        peer = self._peer
        if peer is None:
            return False
        silent = peer.seconds_silent()
        if self._peer is not peer:
            return False  # it has connected anew meanwhile
        self.seconds_silent = silent
        if silent > broker.MAX_SILENCE:
            log.warning("broker_silent", silent_s=round(silent, 1))
            self._peer = None
            peer.hang_up()
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
        self.broker_watch = BrokerWatch()
        self._consumer = PartHealth(ran_at=time.time())
        self._consumes = consumes
        xone = runtime.xone_settings
        self.progress = Progress(xone.XONE_TIMEOUT, xone.lease_seconds)
        self._file = HealthFile()
        self.is_stopping = False

    def start(self) -> None:
        self._probe.start()
        self.broker_watch.start()
        self.vitals.start()
        super().start()

    def consumer_succeeded(self) -> None:
        """Called by the consumer as often as its loop runs with a connection: that it is open does not say much."""
        now, silent = time.time(), self.broker_watch.seconds_silent
        waits_for = "broker" if silent > HEARD_WITHIN else None
        self._consumer = PartHealth(now - silent, now, waits_for, HEARD_WITHIN)

    def consumer_waiting(self) -> None:
        """Called by the consumer as often as it tries to connect."""
        self._consumer = PartHealth(self._consumer.succeeded_at, time.time(), "broker", HEARD_WITHIN)

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
        parts = self.parts()
        self.vitals.unwell = [name for name, part in parts.items() if not part.is_well]
        self._file.write(parts, self.is_stopping, self.vitals.notes)
        return False

    def close(self) -> None:
        self.broker_watch.stop()
        self.vitals.stop()
        self._probe.stop()
        self._file.close()

    def _log_failure(self, error: Exception) -> None:
        log.warning("health_not_noted", needs="a temporary folder that it can write to", error=type(error).__name__)

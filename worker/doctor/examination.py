"""The doctor: checks settings, this machine, database, broker and XONE, one after another, and names remedies.

It changes nothing: it reads the database in read-only transactions, declares queues only as they stand, rolls back what
it publishes, and requests one token from XONE. Findings hold no secret and no personal data: what servers say may hold
anything, so findings never quote it.
"""

from collections.abc import Iterator

from worker.doctor import broker, database, machine, settings, xone
from worker.doctor.finding import TIMEOUT, Finding, with_timeout
from worker.settings import (
    BrokerSettings,
    DatabaseSettings,
    EncryptionSettings,
    SentrySettings,
    WorkerSettings,
    XoneSettings,
)


def examine() -> Iterator[Finding]:
    """Yields all findings as they come. An error ends the checks that depend on it."""
    yield from settings.check()
    worker, sentry = settings.valid(WorkerSettings), settings.valid(SentrySettings)
    yield from with_timeout("machine", machine.check(worker, sentry))
    if (for_database := settings.valid(DatabaseSettings)) is not None:
        yield from with_timeout("database", database.check(for_database, settings.valid(EncryptionSettings)))
    if (for_broker := settings.valid(BrokerSettings)) is not None:
        yield from with_timeout("broker", broker.check(for_broker))
    if (for_xone := settings.valid(XoneSettings)) is not None:
        yield from with_timeout("XONE", xone.check(for_xone), TIMEOUT + for_xone.XONE_TIMEOUT)

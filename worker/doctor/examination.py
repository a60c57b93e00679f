"""The doctor: looks at settings, this machine, database, broker and XONE, one after another, and says what to mend.

It changes nothing: it reads the database in read-only transactions, compares queues that stand, rolls back what it
publishes, and asks XONE for a token. What it tells holds no secret and no personal data: texts of servers, which may
hold anything, are told in our own words.
"""

from collections.abc import Iterator

from worker.doctor import broker, database, machine, settings, xone
from worker.doctor.finding import LIMIT, Finding, bounded
from worker.settings import (
    BrokerSettings,
    DatabaseSettings,
    EncryptionSettings,
    SentrySettings,
    WorkerSettings,
    XoneSettings,
)


def examine() -> Iterator[Finding]:
    """All findings, as they come. What stands behind something that is wrong is not looked at."""
    yield from settings.look()
    worker, sentry = settings.valid(WorkerSettings), settings.valid(SentrySettings)
    yield from bounded("machine", machine.look(worker, sentry))
    if (for_database := settings.valid(DatabaseSettings)) is not None:
        yield from bounded("database", database.look(for_database, settings.valid(EncryptionSettings)))
    if (for_broker := settings.valid(BrokerSettings)) is not None:
        yield from bounded("broker", broker.look(for_broker))
    if (for_xone := settings.valid(XoneSettings)) is not None:
        yield from bounded("XONE", xone.look(for_xone), LIMIT + for_xone.XONE_TIMEOUT)

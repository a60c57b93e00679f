"""The costs of a confirmation in the steady state: statements, commits, messages and calls.

A change of these numbers changes the capacity of the system. docs/performance.md has the effect of each.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from sqlalchemy import event, update

from models.job import read_job
from models.tables import Confirmation
from tasks import confirm
from tasks.accept import Delivery, NewJob
from tasks.decide import RetryPolicy, decide
from tasks.lease import Lease
from tasks.record import RecordedAttempt
from tests.support.system import job
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.services.outbox_relay import OutboxRelay
from worker.storage.database import now_plus

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

SCALAR = re.compile(r"\(select servers\..*?\) as sequence_floor")  # a subquery that is a column
STATEMENT = re.compile(r"^(?:with .*\) )?(insert into|update|select.*? from) (\w+)")

ACCEPT = {"insert confirmations": 1, "insert attempts": 1, "commit": 1}
RECORD = {
    "select confirmations": 1,
    "update attempts": 1,
    "insert bookings": 1,
    "insert policyholders": 1,
    "insert policies": 1,
    "update confirmations": 1,
    "insert outbox": 1,
    "commit": 1,
}
ACQUIRE = {"update confirmations": 1, "update attempts": 1, "insert attempts": 1, "commit": 1}
RELAY = {"update outbox": 2, "commit": 2}  # once taken, once marked after the broker has confirmed


@pytest.fixture
def runtime(broker_url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """Uses RabbitMQ instead of the in-memory broker. Steady state: the token and the pauses have been read."""
    monkeypatch.setenv("BROKER_URL", broker_url)
    lease = confirm.accept_job(body("first"), Delivery(), runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)
    monkeypatch.setattr("worker.storage.pause_cache.FRESH_FOR", 3600.0)
    return runtime


def body(offer: str) -> bytes:
    return json.dumps(job(offer)).encode()


@contextmanager
def counted(runtime: Runtime) -> Iterator[Counter[str]]:
    """Counts commits, and statements by verb and table. A statement for several rows counts once."""
    counts: Counter[str] = Counter()

    def statement(_connection: Any, _cursor: Any, text: str, *_: Any) -> None:
        outer = SCALAR.sub("", " ".join(text.lower().split()))
        verb, table = STATEMENT.search(outer).groups()  # type: ignore[union-attr]
        counts[f"{verb.split()[0]} {table}"] += 1

    def commit(_connection: Any) -> None:
        counts["commit"] += 1

    event.listen(runtime.engine, "before_cursor_execute", statement)
    event.listen(runtime.engine, "commit", commit)
    try:
        yield counts
    finally:
        event.remove(runtime.engine, "before_cursor_execute", statement)
        event.remove(runtime.engine, "commit", commit)


def new_jobs(runtime: Runtime, number: int) -> list[NewJob]:
    return [NewJob.of(read_job(body(f"offer-{index}")), Delivery(), runtime.encryption) for index in range(number)]


def leased(runtime: Runtime, number: int) -> list[Lease]:
    leases = [lease for lease in confirm.accept_job_batch(runtime, new_jobs(runtime, number)) if lease]
    assert len(leases) == number
    return leases


def attempts_of(runtime: Runtime, leases: list[Lease]) -> list[RecordedAttempt]:
    retry_policy = RetryPolicy.of(runtime.retry_settings, runtime.xone_settings)
    return [
        RecordedAttempt(lease, decide(confirm.ask(lease, retry_policy, runtime), lease.history, retry_policy, 0.0), 0.1)
        for lease in leases
    ]


def test_one_confirmation_has_these_costs(runtime: Runtime, sandbox: Sandbox) -> None:
    before = len(sandbox.calls)
    with counted(runtime) as cost:
        lease = confirm.accept_job(body("offer-1"), Delivery(), runtime)
        assert lease is not None
        confirm.attempt(lease, runtime)

    assert cost == Counter(ACCEPT) + Counter(RECORD)
    assert len(sandbox.calls) == before + 1


@pytest.mark.parametrize("number", [1, 20])
def test_a_group_of_twenty_costs_as_much_as_one(number: int, runtime: Runtime) -> None:
    with counted(runtime) as accepting:
        leases = leased(runtime, number)
    attempts = attempts_of(runtime, leases)
    with counted(runtime) as recording:
        confirm.record_batch(runtime, attempts)

    assert accepting == ACCEPT
    assert recording == RECORD


@pytest.mark.parametrize("number", [1, 20])
def test_a_retry_is_leased_with_three_statements(number: int, runtime: Runtime) -> None:
    leases = leased(runtime, number)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(-1.0)))

    with counted(runtime) as cost:
        again = confirm.lease_due_batch(runtime, [lease.id for lease in leases])

    assert all(again)
    assert cost == ACQUIRE


def test_twenty_events_are_twenty_writes_to_the_broker_and_two_transactions(runtime: Runtime) -> None:
    with closing(OutboxRelay(runtime)) as relay:
        while relay.run_once():
            pass
        confirm.record_batch(runtime, attempts_of(runtime, leased(runtime, 20)))
        broker_connection = relay._publisher._connection.connection  # type: ignore[union-attr]
        frames_before = broker_connection.bytes_sent  # counts writes, each a method, a header and a body

        with counted(runtime) as cost:
            assert relay.run_once()

        assert cost == RELAY
        assert broker_connection.bytes_sent - frames_before == 20

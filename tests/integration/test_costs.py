"""What one confirmation costs in the steady state, counted: statements, commits, messages, calls. A change of a number
here is a change of what the system can bear; docs/performance.md tells what each is worth."""

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

WHAT = re.compile(r"^(?:with .*\) )?(insert into|update|select.*? from) (\w+)")

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
CLAIM = {"update confirmations": 1, "update attempts": 1, "insert attempts": 1, "commit": 1}
RELAY = {"update outbox": 2, "commit": 2}  # taken, and marked when the broker has confirmed


@pytest.fixture
def runtime(broker_url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """With RabbitMQ in place of the in-memory broker, in the steady state: token and pauses have been read."""
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
    """Statements by verb and table, each once however many rows it is executed for, and commits."""
    seen: Counter[str] = Counter()

    def statement(_connection: Any, _cursor: Any, text: str, *_: Any) -> None:
        what, table = WHAT.search(" ".join(text.lower().split())).groups()  # type: ignore[union-attr]
        seen[f"{what.split()[0]} {table}"] += 1

    def commit(_connection: Any) -> None:
        seen["commit"] += 1

    event.listen(runtime.engine, "before_cursor_execute", statement)
    event.listen(runtime.engine, "commit", commit)
    try:
        yield seen
    finally:
        event.remove(runtime.engine, "before_cursor_execute", statement)
        event.remove(runtime.engine, "commit", commit)


def new_jobs(runtime: Runtime, number: int) -> list[NewJob]:
    return [NewJob.of(read_job(body(f"offer-{at}")), Delivery(), runtime.encryption) for at in range(number)]


def leased(runtime: Runtime, number: int) -> list[Lease]:
    leases = [lease for lease in confirm.accept_job_batch(runtime, new_jobs(runtime, number)) if lease]
    assert len(leases) == number
    return leases


def made(runtime: Runtime, leases: list[Lease]) -> list[RecordedAttempt]:
    retry_policy = RetryPolicy.of(runtime.retry_settings, runtime.xone_settings)
    return [
        RecordedAttempt(lease, decide(confirm.ask(lease, retry_policy, runtime), lease.history, retry_policy, 0.0), 0.1)
        for lease in leases
    ]


def test_one_confirmation(runtime: Runtime, sandbox: Sandbox) -> None:
    before = len(sandbox.calls)
    with counted(runtime) as cost:
        lease = confirm.accept_job(body("offer-1"), Delivery(), runtime)
        assert lease is not None
        confirm.attempt(lease, runtime)

    assert cost == Counter(ACCEPT) + Counter(RECORD)
    assert len(sandbox.calls) == before + 1


@pytest.mark.parametrize("number", [1, 20])
def test_twenty_at_once_cost_what_one_does(number: int, runtime: Runtime) -> None:
    with counted(runtime) as accepting:
        leases = leased(runtime, number)
    outcomes = made(runtime, leases)
    with counted(runtime) as recording:
        confirm.record_batch(runtime, outcomes)

    assert accepting == ACCEPT
    assert recording == RECORD


@pytest.mark.parametrize("number", [1, 20])
def test_a_retry_is_claimed_by_three_statements(number: int, runtime: Runtime) -> None:
    leases = leased(runtime, number)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(-1.0)))

    with counted(runtime) as cost:
        again = confirm.lease_due_batch(runtime, [lease.id for lease in leases])

    assert all(again)
    assert cost == CLAIM


def test_twenty_events_are_twenty_writes_to_the_broker_and_two_transactions(runtime: Runtime) -> None:
    with closing(OutboxRelay(runtime)) as relay:
        while relay.run_once():
            pass
        confirm.record_batch(runtime, made(runtime, leased(runtime, 20)))
        broker_connection = relay._publisher._connection.connection  # type: ignore[union-attr]
        frames_before = broker_connection.bytes_sent  # counts writes, each a method, a header and a body

        with counted(runtime) as cost:
            assert relay.run_once()

        assert cost == RELAY
        assert broker_connection.bytes_sent - frames_before == 20

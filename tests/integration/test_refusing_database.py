"""A database that refuses: an error is a job's fault only where this is shown, and no answer of XONE is dropped."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import delete, text
from sqlalchemy.exc import DBAPIError
from uuid_utils.compat import uuid7

from models.states import Outcome, State
from models.tables import Attempt, Booking, Confirmation
from tasks import celery_tasks, confirm
from tasks.accept import Delivery
from tasks.lease import Lease
from tests.support.confirming import accepted, body_of, only, rows, run
from tests.support.sentry import Capturing
from tests.support.system import until
from worker import outages
from worker.errors import ShuttingDown
from worker.messaging import broker, topology
from worker.runtime import LIMITS, Runtime
from worker.sandbox.server import Sandbox

ERRORS = {"raised": "P0001", "data": "22001", "integrity": "23514", "internal": "XX000", "full": "53100"}
TRIGGER = """
create function refuse() returns trigger as $$ begin
  if {condition} then raise exception 'no' using errcode = '{code}'; end if;
  return new;
end $$ language plpgsql"""

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@contextmanager
def refusing(
    runtime: Runtime, table: str, code: str = "P0001", condition: str = "true", event: str = "insert"
) -> Iterator[None]:
    """Until the block ends, or the process of the test is told to stop, a trigger refuses rows."""
    with runtime.engine.begin() as connection:
        if runtime.engine.dialect.name == "sqlite":
            connection.execute(
                text(
                    f"create trigger refusing before {event} on {table} when {condition}"
                    " begin select raise(abort, 'no'); end"
                )
            )
        else:
            connection.execute(text(TRIGGER.format(condition=condition, code=code)))
            connection.execute(
                text(f"create trigger refusing before {event} on {table} for each row execute function refuse()")
            )
    try:
        yield
    except BaseException:
        runtime.shutting_down.set()
        raise
    finally:
        with runtime.engine.begin() as connection:
            if runtime.engine.dialect.name == "sqlite":
                connection.execute(text("drop trigger refusing"))
            else:
                connection.execute(text("drop function refuse cascade"))


def accept(runtime: Runtime, offer: str) -> Lease | None:
    return confirm.accept_job(body_of(offer), Delivery(), runtime)


def tried(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of transactions that were begun: one more for each try."""
    begun: list[str] = []
    once = runtime.commit_once

    def counting(work: Any) -> Any:
        begun.append("transaction")
        return once(work)

    monkeypatch.setattr(runtime, "commit_once", counting)
    return begun


@on_postgresql
@pytest.mark.parametrize("kind", ERRORS)
def test_jobs_wait_while_the_database_refuses_all(
    kind: str, runtime: Runtime, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirm, "SAMPLE_AFTER", 0.0)
    tries = tried(runtime, monkeypatch)
    with refusing(runtime, "confirmations", ERRORS[kind]):
        waiting = [pool.submit(accept, runtime, f"offer-{number}") for number in range(4)]
        until(lambda: len(tries) > 16)
        assert not [each for each in waiting if each.done()]

    assert all(each.result() for each in waiting)
    assert len(rows(runtime, Confirmation)) == 4


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_jobs_on_sqlite_wait_too(runtime: Runtime, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm, "SAMPLE_AFTER", 0.0)
    tries = tried(runtime, monkeypatch)
    with refusing(runtime, "confirmations"):
        waiting = pool.submit(accept, runtime, "offer-1")
        until(lambda: len(tries) > 5)
        assert not waiting.done()

    assert waiting.result() is not None


@pytest.mark.parametrize("others", ["others come", "alone"])
def test_a_job_that_is_refused_while_others_are_taken_is_at_fault(
    others: str, runtime: Runtime, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if others == "alone":
        monkeypatch.setattr(confirm, "SAMPLE_AFTER", 0.0)
    bad: Future[Any]
    with refusing(runtime, "confirmations", condition="new.offer_id like 'bad%'"):
        bad = pool.submit(accept, runtime, "bad-1")
        numbers = iter(range(10_000))

        def ended() -> bool:
            if others == "others come":
                assert accept(runtime, f"offer-{next(numbers)}") is not None
            return bad.done()

        until(ended)

    with pytest.raises(DBAPIError):
        bad.result()
    assert not [row for row in rows(runtime, Confirmation) if row.partner_id != "P-100"], "no sample is left"


@on_postgresql
def test_an_error_that_no_value_causes_is_no_jobs_fault(
    runtime: Runtime, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are taken, as where a disk is nearly full."""
    monkeypatch.setattr(confirm, "SAMPLE_AFTER", 0.0)
    tries = tried(runtime, monkeypatch)
    with refusing(runtime, "confirmations", ERRORS["internal"], "new.offer_id like 'big%'"):
        big = pool.submit(accept, runtime, "big-1")
        until(lambda: len(tries) > 5)
        assert accept(runtime, "offer-1") is not None
        assert not big.done()

    assert big.result() is not None


@on_postgresql
def test_bad_jobs_on_all_threads_end_and_good_ones_behind_them_get_through(
    runtime: Runtime, sentry: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirm, "SAMPLE_AFTER", 0.0)
    monkeypatch.setattr("worker.runtime._current", runtime)
    with broker.connect("memory://") as connection:
        topology.declare(connection)
    letters: list[str] = []
    monkeypatch.setattr(celery_tasks, "dead_letter", lambda *given: letters.append(f"{given[3]}"))
    with refusing(runtime, "confirmations", ERRORS["data"], "new.offer_id like 'bad%'"), ThreadPoolExecutor(2) as two:
        offers = ["bad-1", "bad-2", "bad-3", "bad-4", "good-1", "good-2"]
        list(two.map(lambda offer: take(body_of(offer)), offers))

    assert letters == ["poison: the database refuses it and takes others (DataError 22001)"] * 4
    assert {row.offer_id: row.state for row in rows(runtime, Confirmation)} == dict.fromkeys(
        ["good-1", "good-2"], State.CONFIRMED
    )


def take(body: bytes, **message: Any) -> None:
    """A message of the jobs queue, as the Celery task gets it."""
    request = {"deliveries": 0, "correlation_id": None, "traceparent": None, "properties": {}, **message}
    celery_tasks.confirm_offer.push_request(**request)
    try:
        celery_tasks.confirm_offer.run(body)
    finally:
        celery_tasks.confirm_offer.pop_request()


VALID = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (VALID, VALID),
        ("00-" + "a" * 32 + "-" + "b" * 16 + "-" + "0" * 250, None),
        (VALID + "\n", None),
        (VALID + "-00", None),
        (VALID.upper(), None),
        ("ff" + VALID[2:], None),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", None),
        ("00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01", None),
        ("00-a-b-c", None),
        (VALID.encode(), None),
        (7, None),
    ],
)
def test_a_traceparent_is_stored_whole_or_not_at_all(
    given: Any, stored: str | None, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.runtime._current", runtime)

    take(body_of("offer-1"), traceparent=given)

    assert only(runtime, Confirmation).traceparent == stored
    assert only(runtime, Confirmation).state == State.CONFIRMED


TABLES = ["bookings", "policies", "outbox", "confirmations", "attempts"]


@pytest.mark.parametrize("table", TABLES)
def test_an_answer_is_recorded_when_the_database_takes_it_again(
    table: str, runtime: Runtime, sandbox: Sandbox, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = accepted(runtime)
    tries = tried(runtime, monkeypatch)
    event = "update" if table in ("confirmations", "attempts") else "insert"
    with refusing(runtime, table, ERRORS["data"], event=event):
        attempt = pool.submit(confirm.attempt, lease, runtime)
        until(lambda: len(tries) > 3)
        assert not attempt.done()
    attempt.result()

    row = only(runtime, Confirmation)
    assert (row.state, row.crashes, row.answer_unknown) == (State.CONFIRMED, 0, False)
    assert len(rows(runtime, Booking)) == 1
    assert [call.status for call in sandbox.calls] == [201]


def test_a_lease_is_kept_while_an_answer_can_not_be_recorded(
    runtime: Runtime, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = accepted(runtime)
    before = only(runtime, Confirmation).due_at
    with refusing(runtime, "bookings"):
        attempt = pool.submit(confirm.attempt, lease, runtime)
        lease.leased_at -= 3600.0
        until(lambda: only(runtime, Confirmation).due_at > before)
    attempt.result()

    assert only(runtime, Confirmation).state == State.CONFIRMED


def test_others_are_recorded_while_one_answer_is_refused(
    runtime: Runtime, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [accepted(runtime, offer) for offer in ("offer-1", "bad-1", "offer-2")]
    with refusing(runtime, "bookings", condition="new.offer_id = 'bad-1'"):
        attempts = [pool.submit(confirm.attempt, lease, runtime) for lease in leases]
        until(lambda: attempts[0].done() and attempts[2].done())
        assert not attempts[1].done()
    attempts[1].result()

    assert {row.state for row in rows(runtime, Confirmation)} == {State.CONFIRMED}


@on_postgresql
@pytest.mark.parametrize(
    "code", ["53100", "57014", "40P01", "0A000"]
)  # full, time limit, deadlock, unusable connection
def test_neighbours_in_a_transaction_do_not_wait_for_one_that_the_server_refuses(
    code: str, runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    leases = [accepted(runtime, offer) for offer in ("bad-1", "offer-1", "offer-2", "offer-3")]
    with refusing(runtime, "bookings", code, "new.offer_id = 'bad-1'"):
        bad, *others = [pool.submit(confirm.attempt, lease, runtime) for lease in leases]
        new = pool.submit(accept, runtime, "offer-4")
        until(lambda: new.done() and all(other.done() for other in others))
        assert not bad.done()
    bad.result()

    assert [row.state for row in rows(runtime, Confirmation)][:4] == [State.CONFIRMED] * 4


@on_postgresql
def test_neighbours_do_not_wait_for_a_row_that_somebody_has_locked(
    runtime: Runtime, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.runtime.LIMITS", LIMITS._replace(lock=0.2))
    leases = [accepted(runtime, offer) for offer in ("locked", "offer-1", "offer-2", "offer-3")]
    with runtime.engine.connect() as person:
        person.execute(text("select from confirmations where offer_id = 'locked' for update"))
        locked, *others = [pool.submit(confirm.attempt, lease, runtime) for lease in leases]
        until(lambda: all(other.done() for other in others))
        assert not locked.done()
    locked.result()

    assert {row.state for row in rows(runtime, Confirmation)} == {State.CONFIRMED}


@on_postgresql
def test_a_job_waits_while_its_row_is_taken_and_not_stored(runtime: Runtime, pool: ThreadPoolExecutor) -> None:
    with runtime.engine.begin() as connection:
        connection.execute(text("create rule swallow as on insert to confirmations do instead nothing"))
    waiting = pool.submit(accept, runtime, "offer-1")
    until(lambda: outages.most_awaited() == "database")
    with runtime.engine.begin() as connection:
        connection.execute(text("drop rule swallow on confirmations"))

    assert waiting.result() is not None


def test_the_booking_of_a_confirmation_that_was_deleted_is_named(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, other = accepted(runtime, "offer-1"), accepted(runtime, "offer-2")
    logged: list[Any] = []
    monkeypatch.setattr("tasks.record.log.warning", lambda event, **given: logged.append((event, given)), raising=False)
    with runtime.engine.begin() as connection:
        connection.execute(text("delete from attempts where number = 1"))
        connection.execute(delete(Confirmation).where(Confirmation.id == lease.id))

    confirm.attempt(lease, runtime)
    confirm.attempt(other, runtime)

    [(event, given)] = logged
    assert event == "confirmation_gone"
    assert given["booking"] == sandbox.bookings[("P-100", "offer-1")]["id"]
    assert [row.state for row in rows(runtime, Confirmation)] == [State.CONFIRMED] * 2


def test_jobs_of_a_worker_whose_clock_is_ahead_are_no_newer_ones(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = confirm._OtherJobs(runtime)
    monkeypatch.setattr("tasks.accept.uuid7", lambda: uuid7(nanoseconds=time.time_ns() + 60_000_000_000))
    accepted(runtime, "offer-1")

    assert [others.succeed(0.0), others.succeed(0.0)] == [False, False]
    accepted(runtime, "offer-2")
    assert others.succeed(0.0)


def test_a_process_that_stops_keeps_the_answer_with_the_attempt(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirm, "RECORD_GRACE", 0.3)
    lease = accepted(runtime)
    decided = confirm.decide

    def stop_and_decide(*arguments: Any) -> Any:
        runtime.shutting_down.set()  # the answer has just come
        return decided(*arguments)

    monkeypatch.setattr(confirm, "decide", stop_and_decide)
    started = time.monotonic()
    with refusing(runtime, "bookings"), pytest.raises(ShuttingDown):
        confirm.attempt(lease, runtime)

    assert time.monotonic() - started < 5.0
    attempt = only(runtime, Attempt)
    assert (attempt.outcome, attempt.http_status) == (Outcome.UNKNOWN, 201)
    answer = json.loads(runtime.encryption.decrypt(lease.id, "answer 1", attempt.sealed_answer))
    assert answer["offer_id"] == "offer-1"
    assert only(runtime, Confirmation).state == State.CONFIRMING, "the next worker looks at the list of bookings"


@on_postgresql
def test_a_confirmation_that_the_database_refuses_stays_due_and_holds_no_thread(
    runtime: Runtime, sentry: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.runtime._current", runtime)
    monkeypatch.setattr(confirm, "MAX_TRIES", 3)
    lease = accepted(runtime)
    with runtime.engine.begin() as connection:
        connection.execute(text("update confirmations set due_at = now() - interval '1 second'"))
    with refusing(runtime, "confirmations", ERRORS["internal"], event="update"):
        celery_tasks.resume.run(str(lease.id).encode())

    assert only(runtime, Confirmation).attempts == 1
    celery_tasks.resume.run(str(lease.id).encode())
    assert only(runtime, Confirmation).state == State.CONFIRMED


@on_postgresql
def test_a_migration_under_a_running_worker_changes_nothing_for_it(runtime: Runtime) -> None:
    """It prepares statements after five executions; their results change with the table."""
    for number in range(10):
        run(runtime, f"before-{number}")
    with runtime.engine.begin() as connection:
        connection.execute(text("alter table confirmations alter column correlation_id type varchar(300)"))
    for number in range(10):
        run(runtime, f"after-{number}")

    states = [row.state for row in rows(runtime, Confirmation)]
    assert states == [State.CONFIRMED] * 20
    assert {row.crashes for row in rows(runtime, Confirmation)} == {0}


@on_postgresql
def test_settings_of_the_database_do_not_change_values(runtime: Runtime, database_url: str) -> None:
    name = runtime.engine.url.database
    settings = {
        "datestyle": "'German, DMY'",
        "timezone": "'Asia/Kolkata'",
        "standard_conforming_strings": "off",
        "extra_float_digits": "-15",
        "client_encoding": "'LATIN1'",
        "bytea_output": "'escape'",
        "intervalstyle": "'sql_standard'",
        "default_transaction_isolation": "'serializable'",
    }
    with runtime.engine.begin() as connection:
        for setting, value in settings.items():
            connection.execute(text(f'alter database "{name}" set {setting} = {value}'))
    runtime.engine.dispose()

    run(runtime, "offer-1", metadata={"note": "back\\slash 'quote' ✓"})

    row = only(runtime, Confirmation)
    assert row.state == State.CONFIRMED
    assert row.echo == {"note": "back\\slash 'quote' ✓"}
    assert abs(row.created_at.timestamp() - time.time()) < 60
    with runtime.engine.connect() as connection:
        assert connection.execute(text("show transaction_isolation")).scalar() == "read committed"

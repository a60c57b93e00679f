"""Orders that end before their offer is booked: `confirm_by` passes, or a person withdraws. On both databases."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import update

from models.job import JobRejected
from models.states import Outcome, State
from models.tables import Attempt, AuditEntry, BatchItem, Confirmation, OutboxEvent
from tasks import confirm, email_index
from tasks.accept import Delivery
from tasks.decide import READ_BACK_TRIES
from tasks.lease import Lease
from tasks.operations import batches, failures, pauses
from tasks.operations.failures import Selection
from tasks.operations.withdraw import Result, results, withdraw
from tests.support.confirming import accepted, body_of, only, rows, run
from worker.errors import NotSent, XoneError
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.services.scheduler import Scheduler
from worker.storage.database import now, now_plus
from worker.storage.pause_cache import ALL, PauseCache
from worker.storage.rate_limiter import reserve_slot
from worker.xone.circuit_breaker import FAILURE_THRESHOLD, CallsSuspended
from worker.xone.client import Xone

PAST = "2020-01-01T00:00:00Z"
TO_COME = (datetime.now(UTC) + timedelta(days=1)).isoformat()


def change(runtime: Runtime, **values: Any) -> None:
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(**values))


def let_expire(runtime: Runtime) -> None:
    change(runtime, confirm_by=now_plus(-1.0))


def resume(runtime: Runtime) -> None:
    """The next attempt of the only confirmation is made now."""
    change(runtime, due_at=now_plus(-1.0))
    lease = confirm.lease_due(only(runtime, Confirmation).id, runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)


def suspend_calls(runtime: Runtime) -> None:
    for _ in range(FAILURE_THRESHOLD):
        with suppress(XoneError, CallsSuspended), runtime.xone.calls.guard():
            raise NotSent("connect", "refused")
    assert runtime.xone.calls.wait() > 0


def outcome(runtime: Runtime) -> tuple[State, str | None]:
    row = only(runtime, Confirmation)
    return row.state, row.error_code


def events(runtime: Runtime) -> list[dict[str, Any]]:
    return [json.loads(row.payload) for row in rows(runtime, OutboxEvent)]


def run_scheduler(runtime: Runtime, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_URL", broker_url)
    with closing(Scheduler(runtime)) as scheduler:
        scheduler.run_once()


# --- confirm_by ---


def test_a_job_that_comes_after_its_confirm_by_is_not_called(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, confirm_by=PAST)

    assert sandbox.calls == []
    assert outcome(runtime) == (State.FAILED, "expired")
    attempt = only(runtime, Attempt)
    assert (attempt.outcome, attempt.code) == (Outcome.NOT_BOOKED, "expired")
    (event,) = events(runtime)
    assert event["type"] == "confirmation.failed"
    assert event["data"]["error"] == {
        "code": "expired",
        "http_status": None,
        "detail": "not booked by the job's confirm_by",
        "attempts": 1,
    }


def test_a_job_before_its_confirm_by_is_confirmed(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, confirm_by=TO_COME)

    assert outcome(runtime) == (State.CONFIRMED, None)
    assert len(sandbox.calls) == 1


def test_the_databases_clock_decides(runtime: Runtime, sandbox: Sandbox) -> None:
    """The worker's clock has come to confirm_by; the database's has not, or has."""
    early, late = accepted(runtime, "early", confirm_by=TO_COME), accepted(runtime, "late", confirm_by=TO_COME)
    with runtime.engine.begin() as connection:
        is_late = Confirmation.id == late.id
        connection.execute(update(Confirmation).where(is_late).values(confirm_by=now_plus(-0.001)))
    for lease in (early, late):
        lease.call_until = float("-inf")
        confirm.attempt(lease, runtime)

    assert {row.offer_id: row.state for row in rows(runtime, Confirmation)} == {
        "early": State.CONFIRMED,
        "late": State.FAILED,
    }
    assert len(sandbox.calls) == 1


def test_nothing_is_sent_where_confirm_by_has_passed_while_a_slot_was_waited_for(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XONE_RATE_LIMIT", "4")
    lease = accepted(runtime, confirm_by=TO_COME)
    with runtime.engine.begin() as connection:
        reserve_slot(connection, 4.0)
    let_expire_during(runtime.shutting_down, "wait", lease, runtime, monkeypatch)

    confirm.attempt(lease, runtime)

    assert outcome(runtime) == (State.FAILED, "expired")
    assert sandbox.calls == []


def test_nothing_is_sent_where_confirm_by_has_passed_while_the_connection_was_made(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = accepted(runtime, confirm_by=TO_COME)
    runtime.xone.tokens = Xone(runtime.xone_settings).tokens  # by connections of its own
    runtime.xone.tokens.get()
    let_expire_during(socket, "getaddrinfo", lease, runtime, monkeypatch)

    confirm.attempt(lease, runtime)

    assert outcome(runtime) == (State.FAILED, "expired")
    assert sandbox.calls == []
    assert runtime.xone.calls.reason is None


def let_expire_during(owner: Any, name: str, lease: Lease, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """confirm_by passes while this function runs."""
    function = getattr(owner, name)

    def slow(*args: Any, **options: Any) -> Any:
        let_expire(runtime)
        lease.call_until = float("-inf")
        return function(*args, **options)

    monkeypatch.setattr(owner, name, slow)


def test_an_unknown_answer_is_settled_by_the_list_and_not_by_a_second_call(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~drop-after~1", confirm_by=TO_COME)
    let_expire(runtime)

    resume(runtime)

    assert outcome(runtime) == (State.CONFIRMED, None)
    assert len(sandbox.calls) == 1


def test_what_the_list_does_not_show_in_all_its_readings_has_expired(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~drop-before", confirm_by=TO_COME)
    let_expire(runtime)

    for _ in range(READ_BACK_TRIES):
        assert outcome(runtime)[0] == State.RETRYING
        resume(runtime)

    assert outcome(runtime) == (State.FAILED, "expired")
    assert len(sandbox.calls) == 1


@pytest.mark.parametrize(("mode", "state"), [("forbidden", State.NEEDS_REVIEW), ("failing", State.RETRYING)])
def test_without_the_list_an_unknown_answer_stays_unknown(
    runtime: Runtime, sandbox: Sandbox, mode: str, state: State
) -> None:
    sandbox.bookings_mode = mode
    run(runtime, "offer-1~drop-before", confirm_by=TO_COME)
    let_expire(runtime)

    resume(runtime)

    assert outcome(runtime) == (state, "connection-lost")
    assert len(sandbox.calls) == 1


@pytest.mark.parametrize("obstacle", ["open breaker", "pause"])
def test_what_waits_ends_at_its_confirm_by_though_no_call_may_be_made(
    runtime: Runtime, broker_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    accepted(runtime, "unknown", confirm_by=PAST)  # and its worker died
    run(runtime, "unknown-too~drop-before", confirm_by=TO_COME)
    run(runtime, "retrying~http-503", confirm_by=TO_COME)
    if obstacle == "pause":
        with runtime.engine.begin() as connection:
            pauses.pause(connection, ALL, "maintenance", "me")
        runtime.pauses = PauseCache()
    else:
        suspend_calls(runtime)
    assert confirm.accept_job(body_of("queued", confirm_by=PAST), Delivery(), runtime) is None
    assert confirm.accept_job(body_of("in-time", confirm_by=TO_COME), Delivery(), runtime) is None
    with runtime.engine.begin() as connection:
        old = Confirmation.offer_id.in_(["unknown-too~drop-before", "retrying~http-503"])
        connection.execute(update(Confirmation).where(old).values(confirm_by=now_plus(-1.0)))

    run_scheduler(runtime, broker_url, monkeypatch)

    assert {row.offer_id: row.state for row in rows(runtime, Confirmation)} == {
        "unknown": State.CONFIRMING,
        "unknown-too~drop-before": State.RETRYING,
        "retrying~http-503": State.FAILED,
        "queued": State.FAILED,
        "in-time": State.QUEUED,
    }
    assert {event["data"]["error"]["code"] for event in events(runtime)} == {"expired"}
    assert runtime.events_waiting.is_set()


def test_one_that_can_not_be_ended_keeps_no_other_from_it(
    runtime: Runtime, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspend_calls(runtime)
    for offer_id in ("bad", "good-1", "good-2"):
        confirm.accept_job(body_of(offer_id, confirm_by=PAST), Delivery(), runtime)
    with runtime.engine.begin() as connection:
        bad = Confirmation.offer_id == "bad"
        connection.execute(update(Confirmation).where(bad).values(echo={"channel": ["no text"]}))

    run_scheduler(runtime, broker_url, monkeypatch)

    states = {row.offer_id: row.state for row in rows(runtime, Confirmation)}
    assert states == {"bad": State.QUEUED, "good-1": State.FAILED, "good-2": State.FAILED}


def test_an_expired_item_ends_in_its_batch(runtime: Runtime, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(runtime, "offer-1~http-422", confirm_by=TO_COME)
    id_ = only(runtime, Confirmation).id
    with runtime.engine.begin() as connection:
        batch = batches.create(connection, [id_], Selection(), None, "me", None)
        assert len(batches.feed(connection, batch, 10, [], 30.0)) == 1
    let_expire(runtime)

    run_scheduler(runtime, broker_url, monkeypatch)

    item = only(runtime, BatchItem)
    assert (item.outcome, item.ended_at is not None) == ("failed", True)
    assert outcome(runtime) == (State.FAILED, "expired")


def test_a_changed_confirm_by_is_changed_content(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, confirm_by="2020-01-01T00:00:00Z")

    run_again = confirm.accept_job(body_of("offer-1", confirm_by="2020-01-01T01:00:00+01:00"), Delivery(), runtime)
    assert run_again is None, "the same instant"
    run(runtime, confirm_by=TO_COME)

    assert outcome(runtime) == (State.CONFIRMED, None)
    with pytest.raises(JobRejected, match="conflicting-job"):
        confirm.accept_job(body_of("offer-1"), Delivery(), runtime)


# --- withdraw ---


def withdrawn(runtime: Runtime, offer_id: str = "offer-1") -> UUID:
    with runtime.engine.begin() as connection:
        return withdraw(connection, "P-100", offer_id, "me", "the order was cancelled")


def result(runtime: Runtime, id_: UUID) -> Result:
    with runtime.engine.connect() as connection:
        return results(connection, [id_])[id_].result


def test_what_is_surely_not_booked_ends_at_once(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~http-503")

    id_ = withdrawn(runtime, "offer-1~http-503")

    assert outcome(runtime) == (State.FAILED, "withdrawn")
    assert result(runtime, id_) is Result.WITHDRAWN
    (event,) = events(runtime)
    assert (event["type"], event["data"]["error"]["code"]) == ("confirmation.failed", "withdrawn")
    assert "the order was cancelled" not in json.dumps(event), "the reason is for the audit only"
    entry = only(runtime, AuditEntry)
    assert (entry.command, entry.by, entry.reason, entry.count) == ("withdraw", "me", "the order was cancelled", 1)
    assert entry.details["offer"] == "offer-1~http-503"


def test_a_second_withdrawal_changes_nothing(runtime: Runtime) -> None:
    run(runtime, "offer-1~http-503")
    first = withdrawn(runtime, "offer-1~http-503")
    before = rows(runtime, Confirmation), rows(runtime, OutboxEvent)

    assert withdrawn(runtime, "offer-1~http-503") == first

    assert (rows(runtime, Confirmation), rows(runtime, OutboxEvent)) == before


def test_two_withdrawals_at_once_end_it_once(runtime: Runtime) -> None:
    run(runtime, "offer-1~http-503")

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(lambda _: withdrawn(runtime, "offer-1~http-503"), range(2)))) == 1

    assert [event["data"]["sequence"] for event in events(runtime)] == [1]


def test_what_has_failed_is_not_tried_again(runtime: Runtime) -> None:
    run(runtime, "offer-1~http-422")
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(purged_at=now(), sealed_body=None))

    withdrawn(runtime, "offer-1~http-422")

    row = only(runtime, Confirmation)
    assert (row.state, row.error_code, row.purged_at is not None) == (State.FAILED, "withdrawn", True)
    assert [event["data"]["error"]["code"] for event in events(runtime)] == ["http-422", "withdrawn"]


def test_what_is_booked_stays(runtime: Runtime) -> None:
    run(runtime)

    id_ = withdrawn(runtime)

    assert result(runtime, id_) is Result.BOOKED
    assert [event["type"] for event in events(runtime)] == ["booking.confirmed"]


@pytest.mark.parametrize(
    ("fault", "state", "code", "expected"),
    [
        ("", State.CONFIRMED, None, Result.BOOKED),
        ("~http-422", State.FAILED, "withdrawn", Result.WITHDRAWN),
        ("~http-503", State.FAILED, "withdrawn", Result.WITHDRAWN),
        ("~drop-before", State.RETRYING, "connection-lost", Result.SETTLING),
    ],
)
def test_what_comes_of_a_call_under_way_decides(
    runtime: Runtime, sandbox: Sandbox, fault: str, state: State, code: str | None, expected: Result
) -> None:
    lease = accepted(runtime, f"offer-1{fault}")
    id_ = withdrawn(runtime, f"offer-1{fault}")
    assert result(runtime, id_) is Result.CALLING

    confirm.attempt(lease, runtime)  # the worker has asked the database before, and need not do so again

    assert len(sandbox.calls) == 1
    assert outcome(runtime) == (state, code)
    assert result(runtime, id_) is expected


def test_a_worker_that_asks_the_database_again_makes_no_call(runtime: Runtime, sandbox: Sandbox) -> None:
    lease = accepted(runtime)
    withdrawn(runtime)
    lease.leased_at -= runtime.xone_settings.lease_seconds

    confirm.attempt(lease, runtime)

    assert sandbox.calls == []
    assert outcome(runtime) == (State.FAILED, "withdrawn")


def test_a_worker_that_puts_it_back_ends_it(runtime: Runtime, sandbox: Sandbox) -> None:
    lease = accepted(runtime)
    withdrawn(runtime)
    suspend_calls(runtime)

    confirm.attempt(lease, runtime)

    assert outcome(runtime) == (State.FAILED, "withdrawn")
    assert [event["data"]["error"]["code"] for event in events(runtime)] == ["withdrawn"]


@pytest.mark.parametrize("begins_as", ["retrying", "needs_review"])
@pytest.mark.parametrize(
    ("fault", "state", "code"),
    [("~drop-after~1", State.CONFIRMED, None), ("~drop-before", State.FAILED, "withdrawn")],
)
def test_where_xone_may_have_booked_the_list_decides(
    runtime: Runtime, sandbox: Sandbox, begins_as: str, fault: str, state: State, code: str | None
) -> None:
    offer_id = f"offer-1{fault}"
    run(runtime, offer_id)
    change(runtime, state=begins_as, **({"due_at": None} if begins_as == "needs_review" else {}))
    id_ = withdrawn(runtime, offer_id)
    assert result(runtime, id_) is Result.SETTLING

    for _ in range(READ_BACK_TRIES):
        if outcome(runtime)[0] in (State.QUEUED, State.RETRYING):
            resume(runtime)

    assert outcome(runtime) == (state, code)
    assert len(sandbox.calls) == 1


def test_withdrawing_again_does_not_shorten_the_time_of_the_list(runtime: Runtime) -> None:
    run(runtime, "offer-1~drop-before")
    withdrawn(runtime, "offer-1~drop-before")
    resume(runtime)
    before = only(runtime, Confirmation)

    withdrawn(runtime, "offer-1~drop-before")

    after = only(runtime, Confirmation)
    assert (after.due_at, after.read_backs) == (before.due_at, before.read_backs) == (before.due_at, 1)


def test_without_the_list_a_person_decides(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.bookings_mode = "forbidden"
    run(runtime, "offer-1~drop-before")
    id_ = withdrawn(runtime, "offer-1~drop-before")

    resume(runtime)

    assert outcome(runtime) == (State.NEEDS_REVIEW, "connection-lost")
    assert result(runtime, id_) is Result.NEEDS_REVIEW
    assert len(sandbox.calls) == 1


def test_a_job_that_comes_after_its_withdrawal_is_not_called(runtime: Runtime, sandbox: Sandbox) -> None:
    id_ = withdrawn(runtime)
    assert (outcome(runtime), events(runtime)) == ((State.FAILED, "withdrawn"), [])
    body = body_of("offer-1", order_reference="SO-1", metadata={"channel": "web"})

    for _ in range(2):
        assert confirm.accept_job(body, Delivery("correlation"), runtime) is None

    assert sandbox.calls == []
    row = only(runtime, Confirmation)
    assert (row.id, row.state, row.error_code, row.attempts) == (id_, State.FAILED, "withdrawn", 0)
    (event,) = events(runtime)
    data = event["data"]
    assert (data["sequence"], data["order_reference"], data["metadata"]) == (1, "SO-1", {"channel": "web"})
    assert (data["error"]["code"], data["error"]["attempts"]) == ("withdrawn", 0)
    assert only(runtime, OutboxEvent).correlation_id == "correlation"
    with runtime.engine.connect() as connection:
        assert email_index.find(connection, runtime.encryption, "ada@example.com") == [id_]


def test_a_corrected_job_revives_what_was_withdrawn(runtime: Runtime, sandbox: Sandbox) -> None:
    withdrawn(runtime)
    confirm.accept_job(body_of("offer-1"), Delivery(), runtime)

    run(runtime, order_reference="SO-2")

    row = only(runtime, Confirmation)
    assert (row.state, row.withdrawn_at) == (State.CONFIRMED, None)
    assert [event["type"] for event in events(runtime)] == ["confirmation.failed", "booking.confirmed"]


def test_an_offer_withdrawn_in_one_form_of_its_uuid_is_so_in_all(runtime: Runtime, sandbox: Sandbox) -> None:
    offer = UUID("5c7e0b1d-0000-4000-8000-00000000abcd")
    withdrawn(runtime, str(offer).upper())

    assert confirm.accept_job(body_of(offer.hex), Delivery(), runtime) is None

    row = only(runtime, Confirmation)
    assert (row.offer_id, row.error_code) == (offer.hex, "withdrawn")
    assert only(runtime, OutboxEvent).aggregateid == f"P-100/{offer.hex}"


def test_no_batch_tries_again_what_was_withdrawn_or_has_expired(runtime: Runtime) -> None:
    run(runtime, "made-before~http-422")
    run(runtime, "expired~http-422", confirm_by=PAST)
    run(runtime, "fine~http-422")
    everything = Selection(purged=False, order_ended=False)
    with runtime.engine.begin() as connection:
        ids = failures.match(connection, everything).ids
        batch = batches.create(connection, ids, everything, None, "me", None)
    withdrawn(runtime, "made-before~http-422")

    with runtime.engine.begin() as connection:
        fed = batches.feed(connection, batch, 10, [], 30.0)
        named = replace(everything, offers=(("P-100", "made-before~http-422"), ("P-100", "expired~http-422")))
        by_name = failures.match(connection, named)
        left = failures.order_ended(connection, everything)

    state = {row.offer_id: row.state for row in rows(runtime, Confirmation)}
    assert state == {
        "made-before~http-422": State.FAILED,
        "expired~http-422": State.FAILED,
        "fine~http-422": State.QUEUED,
    }
    assert (len(ids), len(fed), by_name.ids, left) == (2, 1, [], 2)
    assert {(offer.offer_id, offer.code) for offer in by_name.left_out} == {
        ("made-before~http-422", "withdrawn"),
        ("expired~http-422", "expired"),
    }


def test_a_batch_made_at_the_same_moment_feeds_in_nothing_that_was_withdrawn(runtime: Runtime) -> None:
    run(runtime, "offer-1~http-422")
    id_ = withdrawn(runtime, "offer-1~http-422")
    with runtime.engine.begin() as connection:
        batch = batches.create(connection, [id_], Selection(), None, "me", None)

        assert batches.feed(connection, batch, 10, [], 30.0) == []

    assert only(runtime, BatchItem).outcome == "skipped"

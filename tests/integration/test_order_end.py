"""Orders that end before their offer is booked: `confirm_by` passes, or a person withdraws. On both databases."""

import json
import socket
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from models.job import JobRejected
from models.states import Outcome, State
from models.tables import Attempt, BatchItem, Confirmation, OutboxEvent
from tasks import confirm
from tasks.accept import Delivery
from tasks.decide import READ_BACK_TRIES
from tasks.lease import Lease
from tasks.operations import batches, pauses
from tasks.operations.failures import Selection
from tests.support.confirming import accepted, body_of, only, rows, run
from worker.errors import NotSent, XoneError
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.services.scheduler import Scheduler
from worker.storage.database import now_plus
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

"""A job is accepted, leased, confirmed and recorded, on both databases and against the sandbox, without a broker."""

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from threading import Barrier, Event
from typing import Any
from uuid import UUID, uuid4

import pytest
from celery.exceptions import Reject
from sqlalchemy import Connection, delete, select, update
from sqlalchemy.event import listen, remove

from models import booking as xone_booking
from models.job import JobRejected, read_job
from models.states import Outcome, State
from models.tables import Attempt, Booking, Confirmation, FurtherEmail, OutboxEvent, Pause, Policy, Policyholder
from tasks import call_guard, celery_tasks, confirm
from tasks.accept import Delivery, NewJob, accept_new_batch
from tasks.decide import RetryPolicy, decide
from tasks.lease import Lease, LeaseLost, acquire, renew
from tasks.operations import pauses
from tasks.privacy.purge import blank
from tasks.privacy.rekey import rekey
from tasks.record import EVENT_OF, Gone, RecordedAttempt, record
from tests.support.confirming import accepted, body_of, only, rows, run
from tests.support.sentry import Capturing
from tests.support.system import job, until
from worker.errors import BadCredentials, Busy, NotSent, ShuttingDown, Unknown, XoneError
from worker.runtime import Runtime
from worker.sandbox.bookings import new_booking
from worker.sandbox.server import Sandbox
from worker.services.scheduler import Scheduler
from worker.storage.database import now_plus, seconds_since
from worker.storage.pause_cache import ALL
from worker.xone.answers import BookingReceived
from worker.xone.circuit_breaker import FAILURE_THRESHOLD, CallsSuspended
from worker.xone.client import Xone


def make_due(runtime: Runtime, **changes: Any) -> None:
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(-1.0), **changes))


def resume(runtime: Runtime) -> None:
    make_due(runtime)
    lease = confirm.lease_due(only(runtime, Confirmation).id, runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)


def test_a_job_becomes_booking_policies_policyholder_and_event(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime)

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.sequence, confirmation.due_at) == (State.CONFIRMED, 1, None)
    upstream = sandbox.bookings["P-100", "offer-1"]
    booking = only(runtime, Booking)
    assert (booking.id, booking.status, booking.price) == (upstream["id"], upstream["status"], upstream["price"])
    assert booking.quote_uuid == upstream["quote"]["uuid"]
    assert booking.created_at.tzinfo is not None
    encryption, place = runtime.encryption, confirmation.id
    assert (
        encryption.decrypt(place, "security_token", booking.sealed_security_token).decode()
        == upstream["security_token"]
    )
    assert encryption.decrypt(place, "coi_pdf", booking.sealed_coi_pdf).decode() == upstream["coi"]["pdf"]
    assert encryption.decrypt(place, "sign_up_url", booking.sealed_sign_up_url).decode() == upstream["sign_up_url"]
    assert json.loads(encryption.decrypt(place, "rest", booking.sealed_rest)) == {"sandbox": True}
    person = json.loads(encryption.decrypt(place, "person", only(runtime, Policyholder).sealed_person))
    assert person["email"] == upstream["policyholder"]["email"]
    retry_policy = only(runtime, Policy)
    assert (retry_policy.price, retry_policy.tax) == (upstream["policies"][0]["price"], upstream["policies"][0]["tax"])
    assert retry_policy.policy_content["title"] == upstream["policies"][0]["policy_content"]["title"]
    assert retry_policy.extra_fields["retail_price"] == str(upstream["policies"][0]["extra_fields"]["retail_price"])
    event = json.loads(only(runtime, OutboxEvent).payload)
    assert event["type"] == "booking.confirmed"
    assert event["data"]["booking"]["price"] == str(upstream["price"])
    assert (event["data"]["order_reference"], event["data"]["metadata"]) == ("SO-offer-1", {"channel": "web"})


def test_the_stored_request_is_sent_with_the_stored_key(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~drop-before~1")
    resume(runtime)

    first, second = sandbox.calls
    confirmation = only(runtime, Confirmation)
    stored = runtime.encryption.decrypt(confirmation.id, "body", confirmation.sealed_body)
    assert first.body == second.body == stored
    assert first.idempotency_key == second.idempotency_key == str(confirmation.idempotency_key)


def test_the_attempt_is_recorded_before_the_call(runtime: Runtime) -> None:
    lease = accepted(runtime)

    attempt = only(runtime, Attempt)
    assert (attempt.number, attempt.outcome, attempt.lease_token) == (1, None, lease.token)


def test_personal_data_is_stored_encrypted(runtime: Runtime) -> None:
    run(runtime)
    run(runtime, "offer-2~html~1")

    for mark in ("Lovelace", "ada@example.com", '"Ada"'):  # encrypted values are base64, in which a bare Ada may occur
        assert mark not in stored(runtime)


MARK = "Quxomat"  # in every value that may be personal


def test_what_xone_adds_is_encrypted_if_it_may_be_personal(runtime: Runtime) -> None:
    """Nothing of it is in clear in a row or an event; all of it can be revealed."""
    lease = accepted(runtime)
    known = new_booking("P-100", "offer-1", job("offer-1"))
    policy = {
        **known["policies"][0],
        "claim_selector_id": MARK,
        "pds_url": f"https://x.example/?name={MARK}",
        "policy_content": {"title": "Ticket protection", "dear": MARK, "extra_content": [{"to": MARK}]},
        "extra_fields": {**known["policies"][0]["extra_fields"], "nickname": MARK},
    }
    personal = {
        "provider_reference": MARK,
        "provider_customer_id": f"{MARK}@x.example",
        "note": MARK,
        "policyholder": {**known["policyholder"], "id": MARK},
    }
    booking = xone_booking.Booking.model_validate({**known, **personal, "policies": [policy]})
    decision = decide(BookingReceived(booking, 200), lease.history, RetryPolicy(), 0.5)
    with runtime.engine.begin() as connection:
        record(connection, runtime.encryption, [RecordedAttempt(lease, decision, 0.1)], True)

    assert MARK not in stored(runtime)
    rest = json.loads(runtime.encryption.decrypt(lease.id, "rest", only(runtime, Booking).sealed_rest))
    assert rest["policies[0].policy_content.dear"] == rest["note"] == rest["provider_reference"] == MARK
    assert only(runtime, Policy).policy_content == {"title": "Ticket protection"}


def stored(runtime: Runtime) -> str:
    tables = (Confirmation, Attempt, Booking, Policy, Policyholder, OutboxEvent)
    return " ".join(str(row) for table in tables for row in rows(runtime, table))


@pytest.mark.parametrize("way", ["rekey", "purge"])
def test_what_an_earlier_version_stored_in_clear_is_encrypted_or_blanked(runtime: Runtime, way: str) -> None:
    run(runtime)
    id_ = only(runtime, Confirmation).id
    event = json.loads(only(runtime, OutboxEvent).payload)
    policies = [{**event["data"]["policies"][0], "policy_type": f"{MARK}@x.example"}]
    data = {**event["data"], "booking": {**event["data"]["booking"], "provider_reference": MARK}, "policies": policies}
    with runtime.engine.begin() as connection:
        connection.execute(update(Booking).values(id="INS 1", provider_reference=MARK))
        connection.execute(update(Policyholder).values(id=MARK))
        connection.execute(update(OutboxEvent).values(payload=json.dumps(event | {"data": data})))
        connection.execute(
            update(Policy).values(policy_content={"title": "x", "dear": MARK}, extra_fields={"of": MARK})
        )
    known = only(runtime, Policy).price
    assert MARK in stored(runtime)

    if way == "rekey":
        list(rekey(runtime.engine, runtime.encryption))
    else:
        with runtime.engine.begin() as connection:
            blank(connection, [id_])

    assert MARK not in stored(runtime)
    assert (only(runtime, Policy).policy_content, only(runtime, Policy).price) == ({"title": "x"}, known)
    assert only(runtime, Booking).id == "INS 1"
    data["booking"]["provider_reference"] = policies[0]["policy_type"] = None
    assert json.loads(only(runtime, OutboxEvent).payload) == event | {"data": data}
    if way == "rekey":
        rest = json.loads(runtime.encryption.decrypt(id_, "rest", only(runtime, Booking).sealed_rest))
        assert rest == {
            "sandbox": True,
            "provider_reference": MARK,
            "policyholder.id": MARK,
            "policies[0].policy_content.dear": MARK,
            "policies[0].extra_fields.of": MARK,
        }


def test_a_job_with_many_emails_shares_no_transaction(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    insured = [{"email": f"{number // 2}@example.com"} for number in range(100)]  # each address twice

    def share(*_: Any) -> None:
        raise AssertionError("it would make others wait for its rows")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "commit_in_group", share)
        lease = accepted(runtime, quotes=[{"id": "quote-1", "insured": insured}])

    assert {row.confirmation_id for row in rows(runtime, FurtherEmail)} == {lease.id}
    assert len(rows(runtime, FurtherEmail)) == 50


def test_the_same_job_again_changes_nothing(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime)
    reordered = json.dumps(dict(reversed(job("offer-1").items()))).encode()

    assert confirm.accept_job(body_of("offer-1"), Delivery(), runtime) is None
    assert confirm.accept_job(reordered, Delivery(), runtime) is None

    assert len(sandbox.calls) == 1
    assert len(rows(runtime, OutboxEvent)) == 1


def test_simultaneous_deliveries_of_a_job_get_one_lease(runtime: Runtime) -> None:
    barrier = Barrier(8)

    def accept() -> Lease | None:
        barrier.wait()
        return confirm.accept_job(body_of("offer-1"), Delivery(), runtime)

    with ThreadPoolExecutor(8) as pool:
        leases = [future.result() for future in [pool.submit(accept) for _ in range(8)]]

    assert len([lease for lease in leases if lease is not None]) == 1
    assert len(rows(runtime, Attempt)) == 1


@pytest.mark.parametrize("change", [{"order_reference": "SO-other"}, {"metadata": {}}, {"quotes": [{"id": "other"}]}])
def test_other_content_for_the_same_offer_is_a_conflict(runtime: Runtime, change: dict[str, Any]) -> None:
    run(runtime)

    with pytest.raises(JobRejected) as rejected:
        confirm.accept_job(body_of("offer-1", **change), Delivery(), runtime)

    assert rejected.value.code == "conflicting-job"


def test_other_content_after_a_failure_starts_a_new_attempt(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~http-422~1")
    before = only(runtime, Confirmation)
    assert (before.state, before.error_code) == (State.FAILED, "http-422")

    run(runtime, "offer-1~http-422~1", quotes=[{"id": "corrected"}])

    after = only(runtime, Confirmation)
    assert (after.state, after.sequence, after.error_code) == (State.CONFIRMED, 2, None)
    assert after.idempotency_key != before.idempotency_key
    assert json.loads(sandbox.calls[-1].body)["quotes"] == [{"id": "corrected"}]
    assert [json.loads(event.payload)["data"]["sequence"] for event in rows(runtime, OutboxEvent)] == [1, 2]


def test_the_same_job_after_a_failure_stays_failed(runtime: Runtime) -> None:
    run(runtime, "offer-1~http-422")

    assert confirm.accept_job(body_of("offer-1~http-422"), Delivery(), runtime) is None
    assert only(runtime, Confirmation).state == State.FAILED


FATES = [
    ("pending", State.PENDING, "booked", None, 1),
    ("http-422", State.FAILED, "refused", "http-422", 1),
    ("http-404", State.FAILED, "refused", "http-404", 1),
    ("redirect", State.FAILED, "refused", "redirect", 1),
    ("http-500", State.RETRYING, "unknown", "http-500", 1),
    ("blocked", State.RETRYING, "not_booked", "http-403", 1),
    ("unavailable", State.RETRYING, "not_booked", "http-503", 1),
    ("busy", State.RETRYING, "not_booked", "http-429", 0),
    ("drop-before", State.RETRYING, "unknown", "connection-lost", 1),
    ("drop-after", State.RETRYING, "unknown", "connection-lost", 1),
    ("html", State.RETRYING, "unknown", "bad-answer", 1),
    ("no-id", State.RETRYING, "unknown", "bad-answer", 1),
    ("errors-beside", State.RETRYING, "unknown", "bad-answer", 1),
    ("other-offer", State.RETRYING, "unknown", "wrong-offer", 1),
    ("booked-with-body", State.CONFIRMED, "booked", None, 1),
    ("booked", State.CONFIRMED, "booked", None, 1),
    ("booked-text", State.CONFIRMED, "booked", None, 1),
    ("booked-words", State.CONFIRMED, "booked", None, 1),
    ("booked-code", State.CONFIRMED, "booked", None, 1),
    ("booked-nowhere", State.RETRYING, "unknown", "already-booked", 1),
    ("odd-types", State.CONFIRMED, "booked", None, 1),
    ("minimal", State.CONFIRMED, "booked", None, 1),
    ("unicode", State.CONFIRMED, "booked", None, 1),
]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("fault", "state", "outcome", "code", "used"), FATES)
def test_each_answer_has_its_state(
    runtime: Runtime, fault: str, state: State, outcome: str, code: str | None, used: int
) -> None:
    run(runtime, f"offer-1~{fault}")

    confirmation, attempt = only(runtime, Confirmation), only(runtime, Attempt)
    assert (confirmation.state, confirmation.error_code, confirmation.attempts_used) == (state, code, used)
    assert (attempt.outcome, attempt.code) == (outcome, code)
    assert confirmation.lease_token is None
    assert (confirmation.due_at is not None) == (state == State.RETRYING)
    assert confirmation.answer_unknown == (outcome == Outcome.UNKNOWN and code != "already-booked")


@pytest.mark.parametrize("fault", ["drop-after~1", "html~1", "truncated~1", "reset-mid~1", "errors-beside~1"])
def test_a_booking_whose_answer_was_lost_is_looked_up_and_not_repeated(
    runtime: Runtime, sandbox: Sandbox, fault: str
) -> None:
    run(runtime, f"offer-1~{fault}")
    resume(runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert only(runtime, Booking).id == sandbox.bookings["P-100", f"offer-1~{fault}"]["id"]
    assert len(sandbox.calls) == 1


def test_a_call_that_never_arrived_is_sent_again(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~drop-before~1")
    resume(runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert len(sandbox.calls) == 2


def test_without_the_list_a_repeat_that_is_refused_needs_review(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.bookings_mode = "forbidden"
    run(runtime, "offer-1~drop-after~1")
    resume(runtime)

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.error_code) == (State.NEEDS_REVIEW, "already-booked")
    event = json.loads(only(runtime, OutboxEvent).payload)
    assert event["type"] == "confirmation.needs_review"
    assert event["data"]["error"]["attempts"] == 2


def test_a_confirmation_ends_although_the_list_always_fails(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.bookings_mode = "failing"
    run(runtime, "offer-1~drop-before~1")
    resume(runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED


@pytest.mark.parametrize("fault", ["drop-before", "booked-nowhere"])  # the second: XONE says that a booking exists
def test_what_only_waits_for_the_list_uses_up_no_attempt(
    runtime: Runtime, sandbox: Sandbox, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XONE_AFTER_UNKNOWN", "review")
    sandbox.bookings_mode = "failing"
    run(runtime, f"offer-1~{fault}")
    used = only(runtime, Confirmation).attempts_used

    for _ in range(3):
        resume(runtime)

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.attempts_used) == (State.RETRYING, used)
    assert len(sandbox.calls) == 1
    make_due(runtime, queued_at=now_plus(-runtime.retry_settings.RETRY_MAX_AGE))
    resume(runtime)
    assert only(runtime, Confirmation).state == State.NEEDS_REVIEW


def test_a_booking_that_is_too_large_is_kept_whole_for_a_person(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~many-policies")

    confirmation, attempt = only(runtime, Confirmation), only(runtime, Attempt)
    assert (confirmation.state, confirmation.error_code) == (State.NEEDS_REVIEW, "too-large")
    answer = runtime.encryption.decrypt(confirmation.id, "answer 1", attempt.sealed_answer)
    assert json.loads(answer)["data"]["id"] == sandbox.bookings["P-100", "offer-1~many-policies"]["id"]
    assert json.loads(only(runtime, OutboxEvent).payload)["type"] == "confirmation.needs_review"
    assert len(sandbox.calls) == 1


def lose(runtime: Runtime) -> None:
    """As a failover to a replica that had not got the last commits."""
    with runtime.engine.begin() as connection:
        connection.execute(delete(Attempt))
        connection.execute(delete(Confirmation))


@pytest.mark.parametrize("moment", ["before the call", "with calls suspended"])
def test_a_confirmation_that_the_database_has_lost_is_stored_again(
    runtime: Runtime, sandbox: Sandbox, moment: str
) -> None:
    lease = accepted(runtime)
    before = only(runtime, Confirmation)
    lose(runtime)
    if moment == "before the call":
        lease.leased_at -= runtime.xone_settings.lease_seconds
    else:
        runtime.shutting_down.set()

    confirm.attempt(lease, runtime)

    assert not sandbox.calls
    after = only(runtime, Confirmation)
    kept = "id", "idempotency_key", "state", "lease_token", "attempts", "echo", "quote_ids", "email_hash", "offer_uuid"
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    runtime.shutting_down.clear()
    make_due(runtime)
    again = confirm.lease_due(lease.id, runtime)
    assert again is not None
    assert (again.body, again.history.answer_unknown) == (lease.body, True)
    confirm.attempt(again, runtime)
    assert only(runtime, Confirmation).state == State.CONFIRMED


def test_the_booking_of_a_confirmation_that_was_lost_during_the_call_is_stored(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, decided = accepted(runtime), confirm.decide

    def lose_and_decide(*given: Any) -> Any:
        lose(runtime)
        return decided(*given)

    monkeypatch.setattr(confirm, "decide", lose_and_decide)
    confirm.attempt(lease, runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert only(runtime, Booking).id == sandbox.bookings["P-100", "offer-1"]["id"]
    assert only(runtime, Attempt).outcome == Outcome.BOOKED
    assert len(rows(runtime, OutboxEvent)) == 1


def test_one_that_came_again_meanwhile_is_left(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, decided = accepted(runtime), confirm.decide

    def lose_and_decide(*given: Any) -> Any:
        lose(runtime)
        accepted(runtime)
        monkeypatch.setattr(confirm, "decide", decided)
        return decided(*given)

    monkeypatch.setattr(confirm, "decide", lose_and_decide)
    confirm.attempt(lease, runtime)

    again = only(runtime, Confirmation)
    assert (again.id != lease.id, again.state) == (True, State.CONFIRMING)


def test_a_defect_after_the_database_lost_the_confirmation_stores_it_again(
    runtime: Runtime, sentry: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.runtime._current", runtime)
    lease = accepted(runtime)

    def lose_and_fail(*_: Any) -> None:
        lose(runtime)
        raise TypeError

    monkeypatch.setattr(confirm, "decide", lose_and_fail)
    celery_tasks._attempt(lease, runtime)

    assert only(runtime, Confirmation).id == lease.id


def test_a_job_goes_back_when_the_process_stops_while_the_database_is_away(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has stored may be lost by the time it is there again."""
    monkeypatch.setattr("worker.runtime._current", runtime)

    def stop(*_: Any) -> None:
        raise ShuttingDown

    monkeypatch.setattr(confirm, "attempt", stop)
    request = {"deliveries": 0, "correlation_id": None, "traceparent": None, "properties": {}}
    celery_tasks.confirm_offer.push_request(**request)
    try:
        with pytest.raises(Reject) as rejected:
            celery_tasks.confirm_offer.run(body_of("offer-1"))
    finally:
        celery_tasks.confirm_offer.pop_request()
    assert rejected.value.requeue


def test_others_of_a_group_are_recorded_though_one_is_gone(runtime: Runtime) -> None:
    kept = accepted(runtime)
    gone = replace(kept, id=uuid4(), token=uuid4())
    decision = decide(Unknown("timeout", "late"), kept.history, RetryPolicy(), 0.5)

    states = confirm.record_batch(runtime, [RecordedAttempt(lease, decision, 0.1) for lease in (gone, kept)])

    assert states == [Gone.GONE, State.RETRYING]


def test_a_dead_workers_attempt_leaves_an_unknown_answer(runtime: Runtime, sandbox: Sandbox) -> None:
    accepted(runtime)
    assert confirm.lease_due(only(runtime, Confirmation).id, runtime) is None, "the lease has not expired yet"

    resume(runtime)

    first, second = rows(runtime, Attempt)
    assert (first.outcome, first.code) == (Outcome.UNKNOWN, "connection-lost")
    assert second.outcome == Outcome.BOOKED
    assert only(runtime, Confirmation).state == State.CONFIRMED


def test_a_booking_of_a_dead_worker_is_looked_up_and_not_repeated(runtime: Runtime, sandbox: Sandbox) -> None:
    dead = accepted(runtime)
    runtime.xone.confirm(dead.partner_id, dead.offer_id, dead.body, dead.idempotency_key)

    resume(runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert len(sandbox.calls) == 1


def test_a_confirmation_that_killed_five_workers_needs_review(runtime: Runtime, sandbox: Sandbox) -> None:
    first = accepted(runtime)
    for _ in range(4):
        make_due(runtime)
        assert confirm.lease_due(first.id, runtime) is not None

    resume(runtime)

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.error_code) == (State.NEEDS_REVIEW, "poison")
    assert sandbox.calls == []


def test_a_lease_repeated_with_its_token_is_the_same_lease(runtime: Runtime) -> None:
    run(runtime, "offer-1~http-500~1")
    make_due(runtime)
    token, confirmation_id = uuid4(), only(runtime, Confirmation).id

    def acquire_lease() -> Lease | None:
        with runtime.engine.begin() as connection:
            return acquire(connection, runtime.encryption, [confirmation_id], token, 10.0).get(confirmation_id)

    first, again = acquire_lease(), acquire_lease()

    assert first is not None
    assert again is not None
    assert first.number == again.number == 2
    assert len(rows(runtime, Attempt)) == 2


def test_a_late_booking_is_stored_and_ends_the_lease_of_the_other_worker(runtime: Runtime, sandbox: Sandbox) -> None:
    slow = accepted(runtime)
    make_due(runtime)
    quick = confirm.lease_due(slow.id, runtime)
    assert quick is not None

    confirm.attempt(slow, runtime)
    late, outcomes = only(runtime, Confirmation), [attempt.outcome for attempt in rows(runtime, Attempt)]
    confirm.attempt(quick, runtime)

    assert late.state == State.CONFIRMED
    assert sorted(outcomes) == [Outcome.BOOKED, Outcome.UNKNOWN], (
        "no attempt is left open: the quick worker may have died"
    )
    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert len(rows(runtime, OutboxEvent)) == 1
    assert len(rows(runtime, Booking)) == 1


def test_a_late_refusal_changes_nothing(runtime: Runtime) -> None:
    slow = accepted(runtime, "offer-1~http-422~1")
    make_due(runtime)
    quick = confirm.lease_due(slow.id, runtime)
    assert quick is not None

    confirm.attempt(slow, runtime)

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.lease_token) == (State.CONFIRMING, quick.token)
    with pytest.raises(LeaseLost), runtime.engine.begin() as connection:
        renew(connection, slow, 10.0)


def test_a_lease_that_would_not_outlast_a_call_is_renewed_before_it(runtime: Runtime) -> None:
    lease = accepted(runtime)
    make_due(runtime)  # no other worker has leased it yet
    lease.leased_at -= runtime.xone_settings.lease_seconds

    call_guard.before_call(lease, runtime)

    left = only(runtime, Confirmation).due_at - datetime.now(UTC)
    assert left > timedelta(seconds=runtime.xone_settings.XONE_TIMEOUT)


def test_a_worker_that_lost_its_lease_makes_no_call(runtime: Runtime, sandbox: Sandbox) -> None:
    slow = accepted(runtime)
    make_due(runtime)
    assert confirm.lease_due(slow.id, runtime) is not None
    slow.leased_at -= runtime.xone_settings.lease_seconds

    confirm.attempt(slow, runtime)

    assert sandbox.calls == []


def test_a_list_that_answers_401_stops_no_calls(runtime: Runtime, sandbox: Sandbox, sentry: Capturing) -> None:
    """As with 403: it needs a scope of its own. Nobody can tell then what became of a lost answer."""
    sandbox.bookings_mode = "unauthorized"
    lost = [accepted(runtime, f"offer-{at}~drop-after~1") for at in range(3)]
    for lease in lost:
        confirm.attempt(lease, runtime)
    for lease in lost:
        make_due(runtime)
        again = confirm.lease_due(lease.id, runtime)
        assert again is not None
        confirm.attempt(again, runtime)
        assert runtime.xone.calls.wait() == 0
    run(runtime, "offer-9")

    states = {row.offer_id: row.state for row in rows(runtime, Confirmation)}
    assert states.pop("offer-9") == State.CONFIRMED
    assert set(states.values()) == {State.NEEDS_REVIEW}
    assert sandbox.token_requests == 2
    assert sentry.events() == []


@pytest.mark.parametrize("mode", ["busy", "failing"])
def test_what_the_list_says_of_itself_stops_no_confirm_call(runtime: Runtime, sandbox: Sandbox, mode: str) -> None:
    run(runtime, "offer-1~drop-after~1")
    sandbox.bookings_mode = mode
    for at in range(2 * FAILURE_THRESHOLD):
        make_due(runtime)
        run(runtime, f"other-{at}")
        resume_one(runtime, "offer-1~drop-after~1")

    assert runtime.xone.calls.wait() == 0
    assert [row.state for row in rows(runtime, Confirmation)].count(State.CONFIRMED) == 2 * FAILURE_THRESHOLD


def resume_one(runtime: Runtime, offer_id: str) -> None:
    """Resumes a confirmation, unless it has ended."""
    with runtime.engine.begin() as connection:
        row = connection.execute(select(Confirmation.id).where(Confirmation.offer_id == offer_id)).one()
        connection.execute(
            update(Confirmation)
            .where(Confirmation.id == row.id, Confirmation.due_at.is_not(None))
            .values(due_at=now_plus(-1.0))
        )
    lease = confirm.lease_due(row.id, runtime)
    if lease is not None:
        confirm.attempt(lease, runtime)


def test_a_look_up_that_is_put_off_again_and_again_ends_with_the_age(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~drop-after~1")
    sandbox.bookings_mode = "busy"
    for _ in range(3):
        resume(runtime)
        confirmation = only(runtime, Confirmation)
        assert (confirmation.state, confirmation.attempts_used) == (State.RETRYING, 1)
    old = datetime.now(UTC) - timedelta(seconds=runtime.retry_settings.RETRY_MAX_AGE)
    make_due(runtime, queued_at=old)

    resume(runtime)

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.error_code) == (State.NEEDS_REVIEW, "connection-lost")
    assert len(sandbox.calls) == 1, "a look-up says nothing about whether it may be sent again"


def make_old(runtime: Runtime, **changes: Any) -> None:
    make_due(runtime, queued_at=now_plus(-runtime.retry_settings.RETRY_MAX_AGE), **changes)


def suspend_calls(runtime: Runtime, error: XoneError) -> None:
    for _ in range(FAILURE_THRESHOLD):
        with suppress(XoneError, CallsSuspended), runtime.xone.calls.guard():
            raise error
    assert runtime.xone.calls.wait() > 0


SUSPENDING = [
    NotSent("connect", ""),
    Unknown("http-502", "", 502),
    BadCredentials("credentials", "", 401),
    Busy("http-429", "", 429, retry_after=60.0),
]


@pytest.mark.parametrize("error", SUSPENDING, ids=lambda error: error.code)
def test_what_is_too_old_and_was_never_sent_has_failed_instead_of_waiting_on(
    runtime: Runtime, sandbox: Sandbox, error: XoneError
) -> None:
    id_ = accepted(runtime).id
    suspend_calls(runtime, error)
    make_due(runtime, state=State.QUEUED, lease_token=None)
    assert confirm.lease_due(id_, runtime) is None, "it may still wait"

    make_old(runtime)
    resume_one(runtime, "offer-1")

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.error_code) == (State.FAILED, error.code)
    assert confirmation.error_http_status == (error.http_status if "http" in error.code else None)
    assert sandbox.calls == []


@pytest.mark.parametrize("error", SUSPENDING, ids=lambda error: error.code)
def test_what_is_too_old_and_may_have_been_sent_needs_review(runtime: Runtime, error: XoneError) -> None:
    accepted(runtime)
    suspend_calls(runtime, error)
    make_old(runtime)  # and its worker has died
    resume_one(runtime, "offer-1")

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.error_code) == (State.NEEDS_REVIEW, "connection-lost")


def test_what_is_too_old_has_one_call_if_calls_go_on(runtime: Runtime, sandbox: Sandbox) -> None:
    accepted(runtime)
    make_old(runtime, state=State.QUEUED, lease_token=None)
    resume_one(runtime, "offer-1")

    assert only(runtime, Confirmation).state == State.CONFIRMED


def test_what_is_too_old_is_put_back_by_a_process_that_stops(runtime: Runtime) -> None:
    lease = accepted(runtime)
    runtime.shutting_down.set()
    confirm.attempt(replace(lease, history=replace(lease.history, age=1e9)), runtime)

    assert only(runtime, Confirmation).state == State.QUEUED


def test_the_scheduler_dispatches_what_is_too_old_though_calls_are_suspended(
    broker_url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, young = accepted(runtime, "old").id, accepted(runtime, "young").id
    suspend_calls(runtime, SUSPENDING[0])
    make_due(runtime)
    with runtime.engine.begin() as connection:
        age = runtime.retry_settings.RETRY_MAX_AGE
        connection.execute(update(Confirmation).where(Confirmation.id == old).values(queued_at=now_plus(-age)))
    monkeypatch.setenv("BROKER_URL", broker_url)

    with closing(Scheduler(runtime)) as scheduler:
        scheduler.run_once()

    dispatched = {row.id: row.dispatched_until is not None for row in rows(runtime, Confirmation)}
    assert dispatched == {old: True, young: False}


@pytest.mark.parametrize("partner_id", [ALL, "P-100"])
def test_the_time_of_a_pause_does_not_count_against_the_age(runtime: Runtime, partner_id: str) -> None:
    before, meanwhile, other = (
        accepted(runtime, offer_id, partner_id=partner).id
        for offer_id, partner in (("offer-1", "P-100"), ("offer-2", "P-100"), ("offer-3", "P-2"))
    )
    ages = {before: 5000.0, meanwhile: 1000.0, other: 5000.0}  # the pause began 3000 s ago
    with runtime.engine.begin() as connection:
        pauses.pause(connection, partner_id, "maintenance", "me")
        connection.execute(update(Pause).values(created_at=now_plus(-3000.0)))
        for id_, age in ages.items():
            is_meant = Confirmation.id == id_
            connection.execute(update(Confirmation).where(is_meant).values(queued_at=now_plus(-age)))

    with runtime.engine.begin() as connection:
        pauses.resume_calls(connection, partner_id, "me")
        counted = dict(connection.execute(select(Confirmation.id, seconds_since(Confirmation.queued_at))).all())

    expected = {before: 2000.0, meanwhile: 0.0, other: 2000.0 if partner_id == ALL else 5000.0}
    assert counted == pytest.approx(expected, abs=5.0)


def test_an_age_that_is_ahead_of_the_clock_counts_from_now_on(runtime: Runtime) -> None:
    id_ = accepted(runtime).id
    make_due(runtime, queued_at=now_plus(86400.0))
    lease = confirm.lease_due(id_, runtime)

    assert lease is not None
    assert lease.history.age >= -0.01


@pytest.mark.parametrize("mode", ["failing", "unauthorized", "busy"])
def test_the_last_look_waits_for_the_list(
    runtime: Runtime, sandbox: Sandbox, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRY_MAX_ATTEMPTS", "1")
    sandbox.bookings_mode = mode
    run(runtime, "offer-1~drop-after")
    for _ in range(3):
        make_due(runtime)
        resume_one(runtime, "offer-1~drop-after")
    assert only(runtime, Confirmation).state == State.RETRYING
    sandbox.bookings_mode = "on"
    runtime.xone = Xone(runtime.xone_settings)  # the list may be read again
    resume(runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert len(sandbox.calls) == 1


def test_a_list_that_fails_is_not_asked_by_each_confirmation(runtime: Runtime, sandbox: Sandbox) -> None:
    """A list that hangs would hold a thread for each, and live jobs behind them."""
    offers = [f"offer-{at}~drop-after~1" for at in range(FAILURE_THRESHOLD - 1)]
    for offer_id in offers:
        run(runtime, offer_id)
    sandbox.bookings_mode = "failing"
    make_due(runtime)
    asked = []
    read_pages = runtime.xone._pages
    runtime.xone._pages = lambda *args: (asked.append(args[0]), read_pages(*args))[1]  # type: ignore[method-assign]
    for offer_id in offers:
        resume_one(runtime, offer_id)

    assert len(asked) == 1
    assert runtime.xone.calls.wait() == 0


class SlowResolver:
    """Looks XONE's name up when it is let to; until then, ``meanwhile`` happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox, runtime: Runtime) -> None:
        self.may_answer = Event()
        self.meanwhile: Callable[[], None] = lambda: None
        self._look_up = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)
        by_name = sandbox.url.replace("127.0.0.1", "xone.example")
        settings = runtime.xone_settings.model_copy(update={"XONE_BASE_URL": by_name})
        runtime.xone = Xone(settings)
        runtime.xone.tokens = Xone(runtime.xone_settings).tokens  # which needs no look-up

    def __call__(self, host: str, port: int, *rest: Any, **options: Any) -> Any:
        if host != "xone.example" or options.get("flags") == socket.AI_NUMERICHOST:
            return self._look_up(host, port, *rest, **options)
        self.meanwhile()
        assert self.may_answer.wait(30)
        return self._look_up("127.0.0.1", port, *rest, **options)


def test_while_a_name_is_looked_up_no_call_outlasts_its_lease(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XONE_CONNECT_TIMEOUT", "0.2")
    resolver = SlowResolver(monkeypatch, sandbox, runtime)

    run(runtime)

    confirmation, attempt = only(runtime, Confirmation), only(runtime, Attempt)
    assert (confirmation.state, attempt.outcome, attempt.code) == (State.RETRYING, Outcome.NOT_BOOKED, "connect")
    resolver.may_answer.set()
    assert sandbox.calls == []
    resume(runtime)
    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert len(sandbox.calls) == 1


def test_nothing_is_sent_where_the_lease_has_gone_while_the_connection_was_made(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = SlowResolver(monkeypatch, sandbox, runtime)
    resolver.may_answer.set()
    slow = accepted(runtime)
    quick: list[Lease | None] = []

    def lose_the_lease() -> None:
        make_due(runtime)
        quick.append(confirm.lease_due(slow.id, runtime))
        slow.leased_at -= runtime.xone_settings.lease_seconds

    resolver.meanwhile = lose_the_lease
    confirm.attempt(slow, runtime)

    assert len(quick) == 1
    assert quick[0] is not None
    assert sandbox.calls == []
    assert only(runtime, Confirmation).lease_token == quick[0].token


def test_a_lease_that_ran_short_while_the_connection_was_made_is_renewed_before_anything_is_sent(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = SlowResolver(monkeypatch, sandbox, runtime)
    resolver.may_answer.set()
    lease = accepted(runtime)
    due_at = only(runtime, Confirmation).due_at

    def take_long() -> None:
        lease.leased_at -= runtime.xone_settings.lease_seconds

    sandbox.latency = 1.0
    resolver.meanwhile = take_long
    with ThreadPoolExecutor(1) as pool:
        attempt = pool.submit(confirm.attempt, lease, runtime)
        until(lambda: ("P-100", "offer-1") in sandbox.bookings)
        renewed_until = only(runtime, Confirmation).due_at
        attempt.result(30)

    assert renewed_until > due_at
    assert only(runtime, Confirmation).state == State.CONFIRMED


def test_a_second_booking_id_is_stored_but_not_published(runtime: Runtime) -> None:
    lease = accepted(runtime)
    confirm.attempt(lease, runtime)
    other = xone_booking.Booking(id="INS-OTHER", offer_id="offer-1", status="CONFIRMED")
    decision = decide(BookingReceived(other, 201), lease.history, RetryPolicy(), 0.0)

    with runtime.engine.begin() as connection:
        assert record(connection, runtime.encryption, [RecordedAttempt(lease, decision, 0.1)], False) == [None]

    assert only(runtime, Booking).id != "INS-OTHER"
    stored_answer = only(runtime, Attempt).sealed_answer
    assert b"INS-OTHER" in runtime.encryption.decrypt(lease.id, "answer 1", stored_answer)


def test_booking_and_event_are_committed_together(runtime: Runtime) -> None:
    lease = accepted(runtime)
    booked = xone_booking.Booking(id="INS-1", offer_id="offer-1", status="CONFIRMED")
    decision = decide(BookingReceived(booked, 201), lease.history, RetryPolicy(), 0.0)

    with runtime.engine.begin() as connection:
        record(connection, runtime.encryption, [RecordedAttempt(lease, decision, 0.1)], False)
        connection.rollback()  # as if the worker died before its commit

    assert only(runtime, Confirmation).state == State.CONFIRMING
    assert only(runtime, Attempt).outcome is None
    assert rows(runtime, Booking) == rows(runtime, OutboxEvent) == []


@pytest.mark.parametrize("death", [1, 2, 3])
@pytest.mark.parametrize(("offer_id", "state"), [("offer-1", State.CONFIRMED), ("offer-1~http-422", State.FAILED)])
def test_a_worker_that_dies_at_a_commit_leaves_no_end_without_its_event(
    runtime: Runtime, offer_id: str, state: State, death: int
) -> None:
    """death: the number of the commit at which the worker dies. An attempt has one, so it survives the others."""
    lease = accepted(runtime, offer_id)
    commits = count(1)

    def die(_connection: Connection) -> None:
        if next(commits) == death:
            raise SystemExit

    listen(runtime.engine, "commit", die)
    with suppress(SystemExit):
        confirm.attempt(lease, runtime)
    remove(runtime.engine, "commit", die)

    expected = State.CONFIRMING if death == 1 else state
    assert only(runtime, Confirmation).state == expected
    assert len(rows(runtime, Booking)) == (expected == State.CONFIRMED)
    assert [row.type for row in rows(runtime, OutboxEvent)] == ([EVENT_OF[state]] if expected == state else [])


def test_no_database_connection_is_open_during_a_call(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.latency = 1.0
    lease = accepted(runtime)
    with ThreadPoolExecutor(1) as pool:
        attempt = pool.submit(confirm.attempt, lease, runtime)
        until(lambda: ("P-100", "offer-1") in sandbox.bookings)
        checked_out = runtime.engine.pool.checkedout()  # type: ignore[attr-defined]
        assert not attempt.done()

    assert checked_out == 0


def test_events_have_links_only_if_the_setting_asks_for_them(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    run(runtime, "offer-1")
    monkeypatch.setenv("EVENT_LINKS", "on")
    del runtime.event_links
    run(runtime, "offer-2")

    without, with_links = (json.loads(event.payload)["data"]["booking"] for event in rows(runtime, OutboxEvent))
    assert not {"coi", "account_url", "fnol_link", "sign_up_url"} & without.keys()
    assert with_links["coi"]["url"].startswith("http")


def test_simultaneous_jobs_are_stored_together(runtime: Runtime) -> None:
    """A repeated job, and a job of an offer that exists already, get no lease here: they are accepted one by one."""
    accepted(runtime, "offer-1")
    jobs = [new_job(runtime, offer) for offer in ("offer-3", "offer-1", "offer-2", "offer-3")]

    leases = confirm.accept_job_batch(runtime, jobs)

    assert [lease.offer_id if lease else None for lease in leases] == ["offer-3", None, "offer-2", None]
    assert {row.offer_id for row in rows(runtime, Confirmation)} == {"offer-1", "offer-2", "offer-3"}
    assert len(rows(runtime, Attempt)) == 3


def test_jobs_of_a_commit_whose_answer_was_lost_are_leased_by_the_repeat(runtime: Runtime) -> None:
    jobs, token = [new_job(runtime, offer) for offer in ("offer-1", "offer-2")], uuid4()

    def store() -> dict[UUID, Lease]:
        with runtime.engine.begin() as connection:
            return accept_new_batch(connection, jobs, token, 10.0)

    first, again = store(), store()

    assert first.keys() == again.keys() == {new.id for new in jobs}
    assert [lease.number for lease in again.values()] == [1, 1]
    assert len(rows(runtime, Attempt)) == 2


def test_simultaneous_outcomes_are_recorded_together(runtime: Runtime) -> None:
    """Confirmed, refused, and one outcome twice: of the worker that lost the lease, and of the worker that has it."""
    retry_policy = RetryPolicy.of(runtime.retry_settings, runtime.xone_settings)
    booked, refused, late = (accepted(runtime, offer) for offer in ("offer-1", "offer-2~http-422", "offer-3~slow~1"))
    make_due(runtime)
    (current,) = confirm.lease_due_batch(runtime, [late.id])
    assert current is not None
    leases = [booked, refused, late, current]
    error = Unknown("timeout", "no answer")
    answers = [confirm.ask(booked, retry_policy, runtime), confirm.ask(refused, retry_policy, runtime), error, error]
    attempts = [
        RecordedAttempt(lease, decide(answer, lease.history, retry_policy, 0.0), 0.1)
        for lease, answer in zip(leases, answers, strict=True)
    ]

    states = confirm.record_batch(runtime, attempts)

    assert states == [State.CONFIRMED, State.FAILED, None, State.RETRYING]
    assert {row.offer_id: row.state for row in rows(runtime, Confirmation)} == {
        "offer-1": State.CONFIRMED,
        "offer-2~http-422": State.FAILED,
        "offer-3~slow~1": State.RETRYING,
    }
    assert sorted(row.type for row in rows(runtime, OutboxEvent)) == ["booking.confirmed", "confirmation.failed"]


def new_job(runtime: Runtime, offer_id: str) -> NewJob:
    return NewJob.of(read_job(body_of(offer_id)), Delivery(), runtime.encryption)

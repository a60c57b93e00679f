"""Accept, claim, confirm and record against both databases and XONE's stand-in, without a broker."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import update

from models import booking as xone_booking
from models.job import JobRejected, read_job
from models.states import Outcome, State
from models.tables import Attempt, Booking, Confirmation, OutboxEvent, Policy, Policyholder
from tasks import call_guard, confirm
from tasks.accept import Delivery, NewJob, accept_new_batch
from tasks.decide import RetryPolicy, decide
from tasks.lease import Lease, LeaseLost, acquire, renew
from tasks.record import RecordedAttempt, record
from tests.support.confirming import accepted, body_of, only, rows, run
from tests.support.system import job, until
from worker.errors import Unknown
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.storage.database import now_plus
from worker.xone.answers import BookingReceived


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
    policy = only(runtime, Policy)
    assert (policy.price, policy.tax) == (upstream["policies"][0]["price"], upstream["policies"][0]["tax"])
    assert policy.policy_content["title"] == upstream["policies"][0]["policy_content"]["title"]
    assert policy.extra_fields["retail_price"] == str(upstream["policies"][0]["extra_fields"]["retail_price"])
    event = json.loads(only(runtime, OutboxEvent).payload)
    assert event["type"] == "booking.confirmed"
    assert event["data"]["booking"]["price"] == str(upstream["price"])
    assert (event["data"]["order_reference"], event["data"]["metadata"]) == ("SO-offer-1", {"channel": "web"})


def test_the_request_is_sent_as_stored_with_the_stored_key(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~drop-before~1")
    resume(runtime)

    first, second = sandbox.calls
    confirmation = only(runtime, Confirmation)
    stored = runtime.encryption.decrypt(confirmation.id, "body", confirmation.sealed_body)
    assert first.body == second.body == stored
    assert first.idempotency_key == second.idempotency_key == str(confirmation.idempotency_key)


def test_the_attempt_stands_before_the_call(runtime: Runtime) -> None:
    lease = accepted(runtime)

    attempt = only(runtime, Attempt)
    assert (attempt.number, attempt.outcome, attempt.lease_token) == (1, None, lease.token)


def test_nothing_of_the_person_stands_in_clear(runtime: Runtime) -> None:
    run(runtime)
    run(runtime, "offer-2~html~1")

    stored = " ".join(str(row) for table in (Confirmation, Attempt, Booking, Policy, Policyholder, OutboxEvent)
                      for row in rows(runtime, table))  # fmt: skip
    for mark in ("Lovelace", "ada@example.com", '"Ada"'):  # sealed values are base64: a bare Ada may come up in it
        assert mark not in stored


def test_the_same_job_again_is_harmless(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime)
    reordered = json.dumps(dict(reversed(job("offer-1").items()))).encode()

    assert confirm.accept_job(body_of("offer-1"), Delivery(), runtime) is None
    assert confirm.accept_job(reordered, Delivery(), runtime) is None

    assert len(sandbox.calls) == 1
    assert len(rows(runtime, OutboxEvent)) == 1


def test_the_same_job_at_once_is_claimed_once(runtime: Runtime) -> None:
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


def test_other_content_after_failure_is_tried_again(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1~http-422~1")
    before = only(runtime, Confirmation)
    assert (before.state, before.error_code) == (State.FAILED, "http-422")

    run(runtime, "offer-1~http-422~1", quotes=[{"id": "corrected"}])

    after = only(runtime, Confirmation)
    assert (after.state, after.sequence, after.error_code) == (State.CONFIRMED, 2, None)
    assert after.idempotency_key != before.idempotency_key
    assert json.loads(sandbox.calls[-1].body)["quotes"] == [{"id": "corrected"}]
    assert [json.loads(event.payload)["data"]["sequence"] for event in rows(runtime, OutboxEvent)] == [1, 2]


def test_the_same_job_after_failure_stays_failed(runtime: Runtime) -> None:
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
def test_what_each_answer_makes_of_a_confirmation(
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
def test_a_booking_whose_answer_was_lost_is_found_and_not_made_again(
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


def test_a_list_that_always_fails_keeps_no_confirmation_waiting_for_ever(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.bookings_mode = "failing"
    run(runtime, "offer-1~drop-before~1")
    resume(runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED


def test_a_dead_workers_attempt_leaves_an_unknown_answer(runtime: Runtime, sandbox: Sandbox) -> None:
    accepted(runtime)
    assert confirm.lease_due(only(runtime, Confirmation).id, runtime) is None, "the lease is not over yet"

    resume(runtime)

    first, second = rows(runtime, Attempt)
    assert (first.outcome, first.code) == (Outcome.UNKNOWN, "connection-lost")
    assert second.outcome == Outcome.BOOKED
    assert only(runtime, Confirmation).state == State.CONFIRMED


def test_what_a_dead_worker_has_booked_is_found_and_not_booked_again(runtime: Runtime, sandbox: Sandbox) -> None:
    dead = accepted(runtime)
    runtime.xone.confirm(dead.partner_id, dead.offer_id, dead.body, dead.idempotency_key)

    resume(runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert len(sandbox.calls) == 1


def test_after_five_workers_that_died_on_it_a_person_decides(runtime: Runtime, sandbox: Sandbox) -> None:
    first = accepted(runtime)
    for _ in range(4):
        make_due(runtime)
        assert confirm.lease_due(first.id, runtime) is not None

    resume(runtime)

    confirmation = only(runtime, Confirmation)
    assert (confirmation.state, confirmation.error_code) == (State.NEEDS_REVIEW, "poison")
    assert sandbox.calls == []


def test_a_claim_repeated_with_its_token_is_the_same_claim(runtime: Runtime) -> None:
    run(runtime, "offer-1~http-500~1")
    make_due(runtime)
    token, confirmation_id = uuid4(), only(runtime, Confirmation).id

    def take() -> Lease | None:
        with runtime.engine.begin() as connection:
            return acquire(connection, runtime.encryption, [confirmation_id], token, 10.0).get(confirmation_id)

    first, again = take(), take()

    assert first is not None
    assert again is not None
    assert first.number == again.number == 2
    assert len(rows(runtime, Attempt)) == 2


def test_a_late_booking_is_stored_and_the_other_worker_stands_back(runtime: Runtime, sandbox: Sandbox) -> None:
    slow = accepted(runtime)
    make_due(runtime)
    quick = confirm.lease_due(slow.id, runtime)
    assert quick is not None

    confirm.attempt(slow, runtime)
    late, outcomes = only(runtime, Confirmation), [attempt.outcome for attempt in rows(runtime, Attempt)]
    confirm.attempt(quick, runtime)

    assert late.state == State.CONFIRMED
    assert sorted(outcomes) == [Outcome.BOOKED, Outcome.UNKNOWN], "none is left open: the quick one may have died"
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


def test_before_a_call_a_lease_is_renewed_that_would_not_outlast_it(runtime: Runtime) -> None:
    lease = accepted(runtime)
    make_due(runtime)  # nobody has claimed it yet
    lease.leased_at -= runtime.xone_settings.lease_seconds

    call_guard.before_call(lease, runtime)

    left = only(runtime, Confirmation).due_at - datetime.now(UTC)
    assert left > timedelta(seconds=runtime.xone_settings.XONE_TIMEOUT)


def test_no_call_is_made_where_the_lease_has_gone_to_another(runtime: Runtime, sandbox: Sandbox) -> None:
    slow = accepted(runtime)
    make_due(runtime)
    assert confirm.lease_due(slow.id, runtime) is not None
    slow.leased_at -= runtime.xone_settings.lease_seconds

    confirm.attempt(slow, runtime)

    assert sandbox.calls == []


def test_a_second_booking_id_is_kept_but_not_told(runtime: Runtime) -> None:
    lease = accepted(runtime)
    confirm.attempt(lease, runtime)
    other = xone_booking.Booking(id="INS-OTHER", offer_id="offer-1", status="CONFIRMED")
    decision = decide(BookingReceived(other, 201), lease.history, RetryPolicy(), 0.0)

    with runtime.engine.begin() as connection:
        assert record(connection, runtime.encryption, [RecordedAttempt(lease, decision, 0.1)], False) == [None]

    assert only(runtime, Booking).id != "INS-OTHER"
    kept = only(runtime, Attempt).sealed_answer
    assert b"INS-OTHER" in runtime.encryption.decrypt(lease.id, "answer 1", kept)


def test_booking_and_event_stand_or_fall_together(runtime: Runtime) -> None:
    lease = accepted(runtime)
    booked = xone_booking.Booking(id="INS-1", offer_id="offer-1", status="CONFIRMED")
    decision = decide(BookingReceived(booked, 201), lease.history, RetryPolicy(), 0.0)

    with runtime.engine.begin() as connection:
        record(connection, runtime.encryption, [RecordedAttempt(lease, decision, 0.1)], False)
        connection.rollback()  # the worker dies before it commits

    assert only(runtime, Confirmation).state == State.CONFIRMING
    assert only(runtime, Attempt).outcome is None
    assert rows(runtime, Booking) == rows(runtime, OutboxEvent) == []


def test_no_connection_is_held_while_xone_is_called(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.latency = 1.0
    lease = accepted(runtime)
    with ThreadPoolExecutor(1) as pool:
        attempt = pool.submit(confirm.attempt, lease, runtime)
        until(lambda: ("P-100", "offer-1") in sandbox.bookings)
        checked_out = runtime.engine.pool.checkedout()  # type: ignore[attr-defined]
        assert not attempt.done()

    assert checked_out == 0


def test_events_carry_links_only_when_asked(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    run(runtime, "offer-1")
    monkeypatch.setenv("EVENT_LINKS", "on")
    del runtime.event_links
    run(runtime, "offer-2")

    without, with_links = (json.loads(event.payload)["data"]["booking"] for event in rows(runtime, OutboxEvent))
    assert not {"coi", "account_url", "fnol_link", "sign_up_url"} & without.keys()
    assert with_links["coi"]["url"].startswith("http")


def test_jobs_that_come_together_are_stored_together(runtime: Runtime) -> None:
    """One of them twice, and one of an offer that stands already: those are left to be looked at one by one."""
    accepted(runtime, "offer-1")
    jobs = [new_job(runtime, offer) for offer in ("offer-3", "offer-1", "offer-2", "offer-3")]

    leases = confirm.accept_job_batch(runtime, jobs)

    assert [lease.offer_id if lease else None for lease in leases] == ["offer-3", None, "offer-2", None]
    assert {row.offer_id for row in rows(runtime, Confirmation)} == {"offer-1", "offer-2", "offer-3"}
    assert len(rows(runtime, Attempt)) == 3


def test_jobs_stored_by_a_commit_whose_answer_was_lost_are_claimed_by_the_repeat(runtime: Runtime) -> None:
    jobs, token = [new_job(runtime, offer) for offer in ("offer-1", "offer-2")], uuid4()

    def store() -> dict[UUID, Lease]:
        with runtime.engine.begin() as connection:
            return accept_new_batch(connection, jobs, token, 10.0)

    first, again = store(), store()

    assert first.keys() == again.keys() == {new.id for new in jobs}
    assert [lease.number for lease in again.values()] == [1, 1]
    assert len(rows(runtime, Attempt)) == 2


def test_outcomes_that_come_together_are_recorded_together(runtime: Runtime) -> None:
    """Confirmed, refused, and one twice: by a worker that lost its lease, and by the one that holds it."""
    policy = RetryPolicy.of(runtime.retry_settings, runtime.xone_settings)
    booked, refused, late = (accepted(runtime, offer) for offer in ("offer-1", "offer-2~http-422", "offer-3~slow~1"))
    make_due(runtime)
    (current,) = confirm.lease_due_batch(runtime, [late.id])
    assert current is not None
    leases = [booked, refused, late, current]
    error = Unknown("timeout", "no answer")
    answers = [confirm.ask(booked, policy, runtime), confirm.ask(refused, policy, runtime), error, error]
    made = [
        RecordedAttempt(lease, decide(answer, lease.history, policy, 0.0), 0.1)
        for lease, answer in zip(leases, answers, strict=True)
    ]

    states = confirm.record_batch(runtime, made)

    assert states == [State.CONFIRMED, State.FAILED, None, State.RETRYING]
    assert {row.offer_id: row.state for row in rows(runtime, Confirmation)} == {
        "offer-1": State.CONFIRMED,
        "offer-2~http-422": State.FAILED,
        "offer-3~slow~1": State.RETRYING,
    }
    assert sorted(row.type for row in rows(runtime, OutboxEvent)) == ["booking.confirmed", "confirmation.failed"]


def new_job(runtime: Runtime, offer_id: str) -> NewJob:
    return NewJob.of(read_job(body_of(offer_id)), Delivery(), runtime.encryption)

"""A person's answer to needs_review, on both databases."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import update

from models.booking import Booking as XoneBooking
from models.states import BatchState, BookingStatuses, State
from models.tables import AuditEntry, BatchItem, Booking, Confirmation, OutboxEvent, Policy, Policyholder
from tasks import confirm
from tasks.operations import batches
from tasks.operations.failures import Selection
from tasks.operations.resolve import Resolved, check_why, read_booking, resolve_booked, resolve_failed
from tests.support.confirming import accepted, only, rows
from worker.errors import ResolveError
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.storage.database import now_plus

OFFER = "offer-1~drop-after~1"
STATUSES = BookingStatuses()
ANSWER: dict[str, Any] = {
    "id": "INS-1",
    "offer_id": OFFER,
    "status": "CONFIRMED",
    "currency": "EUR",
    "price": 19.90,
    "security_token": "hush",
    "coi": {"url": "https://coi.example/1", "pdf": None},
    "policies": [{"id": "POL-1", "status": "CONFIRMED", "price": "19.90"}, {"id": "POL-2"}],
    "policyholder": {"first_name": "Ada", "email": "ada@example.com"},
}


@pytest.fixture
def in_review(runtime: Runtime, sandbox: Sandbox) -> Runtime:
    """A runtime whose database has one confirmation, in needs_review after two attempts."""
    sandbox.bookings_mode = "forbidden"
    lease = accepted(runtime, OFFER)
    confirm.attempt(lease, runtime)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(-1.0)))
    again = confirm.lease_due(lease.id, runtime)
    assert again is not None
    confirm.attempt(again, runtime)
    assert only(runtime, Confirmation).state == State.NEEDS_REVIEW
    return runtime


def resolve_as_booked(runtime: Runtime, answer: dict[str, Any] = ANSWER, with_links: bool = False) -> Resolved:
    booking = XoneBooking.model_validate(answer)
    with runtime.engine.begin() as connection:
        return resolve_booked(
            connection, runtime.encryption, "P-100", booking, STATUSES, with_links, "ann@here", "seen in XONE"
        )


def resolve_as_failed(runtime: Runtime, why: str = "XONE has none", offer_id: str = OFFER) -> Resolved:
    with runtime.engine.begin() as connection:
        return resolve_failed(connection, "P-100", offer_id, why, "ann@here", None)


def last_event(runtime: Runtime) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(max(rows(runtime, OutboxEvent), key=lambda row: row.sequence).payload)
    return content


def test_a_booking_is_stored_as_if_xone_had_answered_with_it(in_review: Runtime) -> None:
    done = resolve_as_booked(in_review)

    confirmation, booking = only(in_review, Confirmation), only(in_review, Booking)
    assert (done.state, done.event_type, done.sequence) == (State.CONFIRMED, "booking.confirmed", 2)
    assert (confirmation.state, confirmation.sequence, confirmation.error_code) == (State.CONFIRMED, 2, None)
    assert (confirmation.lease_token, confirmation.due_at, confirmation.answer_unknown) == (None, None, False)
    assert (confirmation.attempts, confirmation.attempts_used) == (2, 2), "resolving is not an attempt"
    assert (booking.id, booking.currency) == ("INS-1", "EUR")
    encryption = in_review.encryption
    assert encryption.decrypt(confirmation.id, "security_token", booking.sealed_security_token) == b"hush"
    person = json.loads(encryption.decrypt(confirmation.id, "person", only(in_review, Policyholder).sealed_person))
    assert person["email"] == "ada@example.com"
    assert [policy.id for policy in rows(in_review, Policy)] == ["POL-1", "POL-2"]
    event = last_event(in_review)
    assert (event["type"], event["data"]["sequence"]) == ("booking.confirmed", 2)
    assert (event["data"]["order_reference"], event["data"]["metadata"]) == (f"SO-{OFFER[:7]}", {"channel": "web"})
    assert event["data"]["booking"]["id"] == "INS-1"
    assert "coi" not in event["data"]["booking"]


def test_the_status_decides_pending_and_the_setting_decides_links(in_review: Runtime) -> None:
    done = resolve_as_booked(in_review, {**ANSWER, "status": "in_progress"}, with_links=True)

    assert (done.state, done.event_type) == (State.PENDING, "booking.pending")
    assert last_event(in_review)["data"]["booking"]["coi"]["url"] == "https://coi.example/1"


def test_a_booking_without_cover_is_cancelled(in_review: Runtime) -> None:
    done = resolve_as_booked(in_review, {**ANSWER, "status": "Cancelled"})

    assert (done.state, done.event_type) == (State.CANCELLED, "booking.cancelled")


def test_a_failure_has_the_code_resolved_and_the_reason(in_review: Runtime) -> None:
    done = resolve_as_failed(in_review, "XONE has none, ticket 7")

    confirmation = only(in_review, Confirmation)
    assert (done.state, done.event_type, done.sequence) == (State.FAILED, "confirmation.failed", 2)
    assert (confirmation.state, confirmation.error_code) == (State.FAILED, "resolved")
    assert (confirmation.error_http_status, confirmation.error_detail) == (None, "XONE has none, ticket 7")
    assert confirmation.answer_unknown is False, "a person has established that XONE has no booking"
    assert last_event(in_review)["data"]["error"] == {
        "code": "resolved", "http_status": None, "detail": "XONE has none, ticket 7", "attempts": 2,
    }  # fmt: skip
    assert rows(in_review, Booking) == []


def test_the_audit_has_person_and_reason(in_review: Runtime) -> None:
    resolve_as_booked(in_review)

    entry = only(in_review, AuditEntry)
    assert (entry.command, entry.by, entry.reason, entry.count) == ("resolve", "ann@here", "seen in XONE", 1)
    assert entry.details == {"partner": "P-100", "offer": OFFER, "state": "confirmed", "booking": "INS-1"}


def test_the_audit_of_a_failure_has_the_text_for_consumers_as_its_reason(in_review: Runtime) -> None:
    resolve_as_failed(in_review)

    assert only(in_review, AuditEntry).reason == "XONE has none"


def test_only_needs_review_can_be_resolved(in_review: Runtime) -> None:
    resolve_as_booked(in_review)

    with pytest.raises(ResolveError, match="is confirmed, not needs_review"):
        resolve_as_failed(in_review)
    with pytest.raises(ResolveError, match="is confirmed, not needs_review"):
        resolve_as_booked(in_review, {**ANSWER, "id": "INS-2"})
    with pytest.raises(ResolveError, match="no confirmation of offer nowhere and partner P-100"):
        resolve_as_failed(in_review, offer_id="nowhere")

    assert only(in_review, Booking).id == "INS-1"
    assert len(rows(in_review, AuditEntry)) == 1
    assert len(rows(in_review, OutboxEvent)) == 2


def test_two_simultaneous_answers_resolve_once(in_review: Runtime) -> None:
    barrier = Barrier(4)

    def answer(resolve: Callable[[Runtime], Resolved]) -> str:
        barrier.wait(10)
        try:
            return resolve(in_review).state
        except ResolveError:
            return "refused"

    with ThreadPoolExecutor(4) as pool:
        done = [
            future.result()
            for future in [pool.submit(answer, resolve) for resolve in (resolve_as_booked, resolve_as_failed) * 2]
        ]

    assert done.count("refused") == 3
    assert only(in_review, Confirmation).state in done
    assert [event.sequence for event in sorted(rows(in_review, OutboxEvent), key=lambda row: row.sequence)] == [1, 2]


def test_a_batch_skips_a_resolved_confirmation(in_review: Runtime) -> None:
    """Also if it was resolved to a state that the batch selects."""
    confirmation_id = only(in_review, Confirmation).id
    with in_review.engine.begin() as connection:
        batch_ids = [
            batches.create(connection, [confirmation_id], Selection(include_needs_review=True), None, "bob@here", None)
            for _ in range(2)
        ]
        assert batches.move(connection, batch_ids[1], BatchState.PAUSED, "bob@here")

    resolve_as_failed(in_review)

    assert [(item.outcome, item.ended_at is not None) for item in rows(in_review, BatchItem)] == [("skipped", True)] * 2
    with in_review.engine.begin() as connection:
        assert batches.feed(connection, batch_ids[0], 10, (), 60.0) == []
    with in_review.engine.connect() as connection:
        first, second = (batches.progress(connection, batch_id) for batch_id in batch_ids)
    assert first is not None
    assert second is not None
    assert (first.state, first.waiting, first.skipped) == (BatchState.DONE, 0, 1)
    assert (second.waiting, second.running) == (0, 0)
    assert only(in_review, Confirmation).state == State.FAILED


def test_a_refused_answer_does_not_change_the_batch(in_review: Runtime) -> None:
    confirmation_id = only(in_review, Confirmation).id
    with in_review.engine.begin() as connection:
        batch_id = batches.create(connection, [confirmation_id], Selection(include_needs_review=True), None, "b", None)
        batches.move(connection, batch_id, BatchState.PAUSED, "b")
        connection.execute(update(Confirmation).values(state=State.CONFIRMED))

    with pytest.raises(ResolveError):
        resolve_as_failed(in_review)

    assert only(in_review, BatchItem).ended_at is None


def test_a_confirmation_resolved_as_failed_can_be_reprocessed(in_review: Runtime, sandbox: Sandbox) -> None:
    """A person can be wrong: the booking that XONE has is found and stored."""
    resolve_as_failed(in_review)
    sandbox.bookings_mode = "on"
    confirmation_id = only(in_review, Confirmation).id
    with in_review.engine.begin() as connection:
        batch_id = batches.create(connection, [confirmation_id], Selection(), None, "bob@here", None)
        batches.feed(connection, batch_id, 10, (), 60.0)
    lease = confirm.lease_due(confirmation_id, in_review)
    assert lease is not None

    confirm.attempt(lease, in_review)

    assert only(in_review, Confirmation).state == State.CONFIRMED
    assert [event.sequence for event in sorted(rows(in_review, OutboxEvent), key=lambda row: row.sequence)] == [1, 2, 3]


# --- Input of a person ---


def test_a_booking_is_read_with_exact_money_with_or_without_data() -> None:
    bare = '{"id": "INS-1", "offer_id": "o-1", "price": 19.90, "new": 1}'

    for content in (bare, f'{{"data": {bare}}}'):
        booking = read_booking(content.encode(), "o-1")
        assert (booking.id, str(booking.price), booking.leftovers()) == ("INS-1", "19.90", {"new": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON: line 1 column 1"),
        (b"<html>", "no JSON: line 1 column 1"),
        (b"[" * 100_000, "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[]", "is no JSON object"),
        (b"5", "is no JSON object"),
        (b'{"data": null}', "is no JSON object"),
        (b"{}", "lacks a usable id and offer_id"),
        (b'{"data": {"id": "INS-1"}}', "lacks a usable offer_id"),
        (b'{"id": "", "offer_id": "o-1"}', "lacks a usable id"),
        (b'{"id": "INS-1", "offer_id": "o-2"}', "is of another offer: o-2, not o-1"),
        (b'{"id": "INS-1", "offer_id": "o\\u001b[2J"}', "lacks a usable offer_id"),
    ],
)
def test_anything_but_a_booking_of_the_offer_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ResolveError) as refused:
        read_booking(content, "o-1")

    assert str(refused.value).startswith("the booking ")
    assert message in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_reason_is_one_line_of_text() -> None:
    assert check_why("  none – sägt XONE \n") == "none – sägt XONE"
    assert check_why("x" * 500) == "x" * 500
    for text in ("", " \n ", "x" * 501, "a\nb", "a\x1b[2Jb", "a\x00b", "a\u2028b", "a\udce4b", "a\x85b"):
        with pytest.raises(ResolveError):
            check_why(text)

"""Refusals that may mean "booked before", and those that surely mean something else."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.xone.booked_before import may_mean_booked, reference_in

BOOKED: list[Any] = [
    "Booking already exists for this offer. INS number: INS-ABC",
    "A booking for this offer already exists. INS number: ABC",
    "Offer has already been confirmed",
    "This offer was already confirmed.",
    "Offer already booked",
    "ALREADY CONFIRMED",
    "The offer has been confirmed previously.",
    "The quote has already been used.",
    "You cannot confirm an offer twice.",
    "Offer can't be confirmed again.",
    "There is an existing booking for this offer.",
    "Duplicate booking",
    "A policy has already been issued for this quote.",
    "Offer is confirmed",
    "Your policy: INS-7F3K29",
    "INS number: ABC",
    "Order already processed",
    {"errors": [{"code": "OFFER_ALREADY_CONFIRMED", "message": "Conflict."}]},
    {"errors": [{"code": "alreadyBooked"}]},
    {"code": "booking_exists"},
    {"error": "DUPLICATE_BOOKING"},
    {"error": "duplicate"},
    {"detail": "Invalid offer.", "ins_number": "ABC"},
    {"error": {"existingBookingId": 123}},
    {"already_confirmed": True},
    {"message": "Invalid state", "status": "CONFIRMED"},
    {"errors": {"offer": ["Offer\u2019s been already purchased."]}},
    ["Offer already sold"],
    "Offer is no longer available: it was booked.",
    "Offer has been converted to a booking",
    "A policy for this quote exists",
    "Quote already consumed",
    "Resource already exists",
    "Idempotency key already used",
    "Duplicate transaction",
    "Offer status must be NEW, was CONFIRMED",
    "This offer has a booking already",
    "Payment already captured for this offer",
    "An offer can only be confirmed once",
    "Quote no longer available (sold)",
    "Confirmation already in progress",
    "The offer must not already be confirmed.",
    "Insurance number INS12345",
    "The policyholder's offer was confirmed before. Use another email.",
    "Order SO-1 has already gone through",
    "Confirmation for this offer was already received",
    "Offer is currently being confirmed",
    "expected state OPEN but found CONFIRMED",
    "UNIQUE constraint failed: booking.offer_id",
    "partner_transaction_id must be unique",
    "Policyholder already holds a booking of this offer",
    "See booking INS-ABCDE",
    "Offer&nbsp;already&nbsp;confirmed",
    "A policy has been created for this offer before.",
    "This quotation was turned into a policy on 2026-01-01",
    "This request has already been submitted",
    "Duplicate partner_transaction_id",
    "Idempotent replay detected",
    "Coverage is already in force for this quote",
    "Offer locked: confirmation pending",
    "Concurrent confirmation of the same offer",
    "This offer is linked to booking 8c1b",
    "Conflict: resource exists",
    "Offer state must be OPEN but is CLOSED_BOOKED",
    "Offers are single-use",
    "Only one booking per offer is allowed",
    "Offer cannot be reconfirmed",
    "The offer is closed since a booking was made",
    "Policy No. P-1234 was issued for this quote",
    "INS: ABC123",
    "Insurance no. 12345",
    "Offer was bought by this partner",
    "There's a live booking on this offer",
    {"code": "offer.already.confirmed"},
    {"code": "E409_DUPLICATE"},
    {"code": "RESOURCE_EXISTS"},
    {"reason": "repeated_confirmation"},
    {"code": "CONFIRMED_OFFER"},
    {"errors": [{"code": "unique", "field": "offer"}]},
    {"policy_id": "POL-1"},
    {"bookings": [{"id": "B12"}]},
    {"confirmed_at": "2026-01-01T00:00:00Z"},
    {"error": "BookingAlreadyExistsException"},
    {"errors": {"offer_id": ["has already been taken"]}},
    {"is_booked": True},
    {"booking": {"id": "INS-1"}},
    {"policyNumber": "P1"},
    {"offer": {"status": "ACTIVE"}},
    b"<html><body>Offer has already been confirmed</body></html>",
    b"plain: the offer was already confirmed",
]
OTHER: list[Any] = [
    "This offer has expired.",
    "Offer already expired.",
    "The offer has already been cancelled.",
    "The offer was already declined",
    "Offer can't be confirmed.",
    "The trip has already started.",
    "An account with this email already exists.",
    "Email is already registered.",
    "Phone already in use",
    "The offer has not already been confirmed.",
    "policyholder.email: enter a valid email address",
    "This field is required.",
    "Payment could not be processed.",
    "Quote not found",
    "Booking window is closed",
    "Offer not found, it may have been withdrawn",
    "The insured must be at least 18 years old",
    "Number of ins and outs is wrong",
    "Policy holder already exists",
    "Customer already exists",
    "Duplicate email",
    "Duplicate quote ids in the request",
    "Offer must be confirmed before 2026-01-01",
    "No existing booking",
    "No booking found for this quote",
    "Booking does not exist",
    "The insured already has a claim",
    "The price has changed, please confirm again",
    "Voucher already used",
    "Promo code has already been redeemed",
    "Trip has already been completed",
    "The trip is already covered",
    "Offer expired before it was confirmed",
    "The event has already taken place",
    "Token already used",
    "Each insured must be unique",
    "Quotes: ids must be unique",
    "Confirmation e-mail is missing",
    "Policy number must have digits",
    "Booking is not possible for this country",
    "Only one insured per quote is allowed",
    "The offer was created in another currency",
    "Quote already recalculated",
    "Order value exceeds the limit",
    "Payment is pending",
    "Rebooking fee is missing",
    "Maintenance in progress",
    {"status": "active_error"},
    "unique constraint failed: user.email",
    "INS number is missing",
    "INS number not found",
    {"errors": [{"field": "policyholder.email", "message": "already exists"}]},
    {"errors": {"email": ["has already been taken"]}},
    {"policyholder": {"email": ["duplicate"]}},
    {"errors": [{"source": {"pointer": "/quotes/0/insured/1"}, "detail": "already used"}]},
    {"booking_id": "required"},
    {"ins_number": ["unknown"]},
    {"errors": [{"field": "quotes.0.id", "message": "This field is required."}]},
    {"status": 422, "title": "Unprocessable", "code": "OFFER_EXPIRED"},
    {"status": "error", "already_confirmed": False},
    b"<html><title>404 Not Found</title></html>",
    b"",
    b"\xff\xfe",
    None,
    42,
]


def body_of(answer: Any) -> bytes:
    if isinstance(answer, bytes):
        return answer
    return json.dumps({"errors": [{"message": answer}]} if isinstance(answer, str) else answer).encode()


@pytest.mark.parametrize("answer", BOOKED, ids=str)
def test_it_may_mean_booked_before(answer: Any) -> None:
    assert may_mean_booked(body_of(answer))


@pytest.mark.parametrize("answer", OTHER, ids=str)
def test_it_surely_means_something_else(answer: Any) -> None:
    assert not may_mean_booked(body_of(answer))


def test_what_was_sent_says_nothing_though_it_comes_back() -> None:
    request = json.dumps({"note": "Offer has already been confirmed", "ref": "INS-123"}).encode()
    echo = {"errors": [{"message": "Invalid.", "input": ["Offer has already been confirmed", "INS-123"]}]}

    assert may_mean_booked(body_of(echo))
    assert not may_mean_booked(body_of(echo), request)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Booking already exists. INS number: INS-ABCDEFGH", "INS-ABCDEFGH"),
        ("A booking already exists. INS number: ABC", "ABC"),
        ("See INS-7F3K29.", "INS-7F3K29"),
        ({"booking_id": "B-1"}, "B-1"),
        ({"booking": {"id": "INS-1"}}, "INS-1"),
        ("Your INS no. is XY12.", "XY12"),
        ("INS number is wrong", None),
        ({"booking_id": "invalid"}, None),
        ({"ins_number": "<script>"}, None),
        ("Offer has already been confirmed", None),
    ],
)
def test_the_reference_in_a_refusal(answer: Any, reference: str | None) -> None:
    assert reference_in(body_of(answer)) == reference


@pytest.mark.parametrize(
    ("body", "request_body"),
    [
        (b"<" * 64_000, b""),
        (json.dumps(["a"] * 12_000).encode(), json.dumps({"x": "y" * 250_000}).encode()),
    ],
)
def test_a_hostile_refusal_costs_little(body: bytes, request_body: bytes) -> None:
    began = time.thread_time()
    for _ in range(10):
        may_mean_booked(body, request_body)

    assert time.thread_time() - began < 5  # seconds of CPU for what takes 0.03, and took 17 to 22


@given(st.binary() | st.text().map(lambda text: json.dumps({"errors": [text]}).encode()), st.binary())
def test_any_body_is_judged(body: bytes, request: bytes) -> None:
    assert may_mean_booked(body, request) in (True, False)

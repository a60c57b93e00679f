"""The events that consumers get: CloudEvents 1.0, exact money, no personal data."""

import json
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.booking import MAX_BOOKING_BYTES, MAX_LINK, MAX_POLICIES, Booking, Coi, Person, Policyholder, excess
from models.event import BOOKING_EVENTS, EventType, booking_data, cloud_event, error_data, without_links
from models.exact_json import write_exact
from worker.messaging.topology import MAX_MESSAGE_SIZE

EVENT_ID = UUID("01890000-0000-7000-8000-000000000001")
MARK = "Geheimnis"  # represents data that no event may have
COMMON = {"partner_id": "P-1", "offer_id": "o-1", "order_reference": None, "metadata": {}, "sequence": 1}


def booking(**changes: Any) -> Booking:
    fields: dict[str, Any] = {
        "id": "INS-1",
        "offer_id": "o-1",
        "status": "CONFIRMED",
        "currency": "EUR",
        "price": Decimal("19.90"),
        "provider_reference": "PR-1",
        "is_instant_booking": True,
        "created_at": "2026-01-01T00:00:00.5Z",
        "security_token": MARK,
        "provider_customer_id": MARK,
        "payment_status": MARK,
        "quote": {"uuid": MARK},
        "policyholder": {**dict.fromkeys(Person.model_fields, MARK), "id": MARK, "title": MARK},
        "coi": {"url": f"https://x/coi?t={MARK}", "pdf": f"https://x/pdf?t={MARK}", "html": MARK},
        "account_url": f"https://x/account?t={MARK}",
        "fnol_link": f"https://x/fnol?t={MARK}",
        "sign_up_url": f"https://x/sign-up?t={MARK}",
        "a_new_field": MARK,
        "policies": [
            {
                "id": "p-1",
                "status": "CONFIRMED",
                "policy_type": "event",
                "policy_code": "ETP-01",
                "price": Decimal("19.90"),
                "tax": Decimal("3.10"),
                "policy_start_date": "2026-01-02T00:00:00Z",
                "policy_end_date": "2027-01-02T00:00:00+01:00",
                "commission": Decimal("1.00"),
                "policy_content": {"title": MARK},
                "extra_fields": {"seller_entity": MARK},
                "pds_url": MARK,
                "insured": [{"first_name": MARK}],
            }
        ],
    }
    return Booking.model_validate(fields | changes)


def published(event_type: EventType, data: dict[str, Any]) -> dict[str, Any]:
    at = datetime(2026, 1, 1, 2, 0, tzinfo=timezone(timedelta(hours=2)))
    event = json.loads(cloud_event(EVENT_ID, event_type, "P-1", "o-1", at, {**COMMON, **data}))
    assert isinstance(event, dict)
    return event


@pytest.mark.parametrize(
    ("event_type", "name"),
    [
        (EventType.BOOKING_CONFIRMED, "booking.confirmed"),
        (EventType.BOOKING_PENDING, "booking.pending"),
        (EventType.CONFIRMATION_FAILED, "confirmation.failed"),
        (EventType.CONFIRMATION_NEEDS_REVIEW, "confirmation.needs_review"),
    ],
)
def test_the_envelope_is_a_cloud_event(event_type: EventType, name: str) -> None:
    error = error_data("connect", None, None, 1)
    content = booking_data(booking(), with_links=False) if event_type in BOOKING_EVENTS else error

    assert published(event_type, {**content, "more": 1}) == {
        "specversion": "1.0",
        "id": str(EVENT_ID),
        "source": "/confirm-offer",
        "type": name,
        "subject": "P-1/o-1",
        "time": "2026-01-01T00:00:00.000000Z",
        "datacontenttype": "application/json",
        "dataschema": f"urn:confirm-offer:{name}:1",
        "data": {**COMMON, **content},
    }


def test_a_booking_event_has_booking_and_policies() -> None:
    event = published(EventType.BOOKING_CONFIRMED, booking_data(booking(), with_links=False))

    assert event["data"] == COMMON | {
        "booking": {
            "id": "INS-1",
            "status": "CONFIRMED",
            "currency": "EUR",
            "price": "19.90",
            "provider_reference": "PR-1",
            "is_instant_booking": True,
            "created_at": "2026-01-01T00:00:00.500000Z",
        },
        "policies": [
            {
                "id": "p-1",
                "status": "CONFIRMED",
                "policy_type": "event",
                "policy_code": "ETP-01",
                "price": "19.90",
                "tax": "3.10",
                "policy_start_date": "2026-01-02T00:00:00.000000Z",
                "policy_end_date": "2027-01-01T23:00:00.000000Z",
            }
        ],
    }
    assert MARK not in json.dumps(event)


def test_events_have_links_only_if_the_setting_asks_for_them() -> None:
    without, with_links = (booking_data(booking(), links)["booking"] for links in (False, True))

    assert {name: with_links[name] for name in with_links.keys() - without.keys()} == {
        "coi": {"url": f"https://x/coi?t={MARK}", "pdf": f"https://x/pdf?t={MARK}"},
        "account_url": f"https://x/account?t={MARK}",
        "fnol_link": f"https://x/fnol?t={MARK}",
        "sign_up_url": f"https://x/sign-up?t={MARK}",
    }


def test_only_links_are_removed_from_an_event() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    kind = EventType.BOOKING_CONFIRMED
    without, with_links = (
        cloud_event(
            EVENT_ID, kind, "P", "o", at, COMMON | {"metadata": {"coi": "é\x7f"}} | booking_data(booking(), links)
        )
        for links in (False, True)
    )

    assert MARK in with_links
    assert without_links(with_links) == without_links(without) == without


def test_an_event_with_links_has_no_personal_data_and_no_token() -> None:
    without_link_values = {"coi": None, "account_url": None, "fnol_link": None, "sign_up_url": None}

    event = published(EventType.BOOKING_CONFIRMED, booking_data(booking(**without_link_values), with_links=True))

    assert MARK not in json.dumps(event)
    assert {name: event["data"]["booking"][name] for name in without_link_values} == without_link_values


def test_the_booking_of_these_tests_has_the_marks() -> None:
    """Without the marks in the booking, the tests above would prove nothing."""
    full = booking()

    assert full.security_token == MARK
    assert isinstance(full.policyholder, Policyholder)
    assert isinstance(full.coi, Coi)
    assert full.policyholder.email == MARK


@pytest.mark.parametrize(
    ("price", "text"),
    [("19.90", "19.90"), ("1", "1"), ("1E+2", "100"), ("0.0000001", "0.0000001"), ("0E-7", "0.0000000")],
)
def test_money_is_a_decimal_string(price: str, text: str) -> None:
    event = published(EventType.BOOKING_PENDING, booking_data(booking(price=Decimal(price)), with_links=False))

    assert event["data"]["booking"]["price"] == text


def test_a_minimal_booking_has_all_keys() -> None:
    minimal = Booking.model_validate({"id": "INS-1", "offer_id": "o-1"})

    data = booking_data(minimal, with_links=False)

    assert data["policies"] == []
    assert data["booking"] == dict.fromkeys(booking_data(booking(), with_links=False)["booking"]) | {"id": "INS-1"}


def test_a_failure_event_has_the_error() -> None:
    event = published(EventType.CONFIRMATION_FAILED, error_data("http-422", 422, "XONE answered 422", 3))

    assert event["data"] == COMMON | {
        "error": {"code": "http-422", "http_status": 422, "detail": "XONE answered 422", "attempts": 3}
    }


def test_an_error_without_an_answer_has_no_status() -> None:
    error = error_data("connect", None, None, 12)["error"]

    assert error == {"code": "connect", "http_status": None, "detail": None, "attempts": 12}


def test_times_are_utc() -> None:
    at = datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    event = published(EventType.BOOKING_PENDING, booking_data(booking(created_at=at), with_links=False))

    assert event["time"] == "2026-01-01T00:00:00.000000Z"
    assert event["data"]["booking"]["created_at"] == "2025-12-31T22:00:00.000000Z"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_published_as_python_s_json_encodes_it(text: str) -> None:
    data = COMMON | {"metadata": {"x": text}} | error_data("connect", None, text, 1)
    payload = cloud_event(EVENT_ID, EventType.CONFIRMATION_FAILED, "P", "o", datetime.now(UTC), data)

    assert payload == write_exact(json.loads(payload))
    assert json.loads(payload)["data"] == data


LARGEST: dict[str, dict[str, Any]] = {
    "links": {
        **dict.fromkeys(("account_url", "fnol_link", "sign_up_url"), "🎟" * MAX_LINK),
        "coi": dict.fromkeys(("url", "pdf"), "🎟" * MAX_LINK),
        "policies": [{}] * MAX_POLICIES,
    },
    "policies": {
        "policies": [
            {"price": "9" * 32, "policy_end_date": 1, **dict.fromkeys(("id", "status", "policy_code"), "x" * 136)}
        ]
        * MAX_POLICIES
    },
}


@pytest.mark.parametrize("fields", LARGEST.values(), ids=LARGEST)
def test_the_largest_event_has_less_than_a_mebibyte(fields: dict[str, Any]) -> None:
    largest = {"id": "i" * 255, "offer_id": "o-1", "status": "s" * 255, **fields}
    booking = Booking.model_validate(largest)
    metadata = {f"{number}".rjust(128, "🎟"): "🎟" * 1024 for number in range(20)}
    data = {**COMMON, "order_reference": "🎟" * 128, "metadata": metadata, **booking_data(booking, True)}

    event = cloud_event(EVENT_ID, EventType.BOOKING_CONFIRMED, "p" * 128, "o" * 128, datetime.now(UTC), data)

    assert 0.9 * MAX_BOOKING_BYTES < len(write_exact(largest)) <= MAX_BOOKING_BYTES
    assert excess(largest) is None
    assert booking.leftovers() == {}
    assert len(event) < 1024 * 1024 < MAX_MESSAGE_SIZE

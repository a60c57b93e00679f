"""XONE's booking: each field of the Confirm Offer page is read with its type, and nothing that XONE sends is lost."""

import json
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from models.booking import Booking
from models.exact_json import moment, read_exact, write_exact

# The response on the page, field for field, with values as XONE sends them.
SAMPLE = """{
  "data": {
    "id": "INS-7K2QX9AB",
    "offer_id": "5c7e91b2-0d0f-4a67-9b1e-0e3d2f6f7a10",
    "provider_reference": "PR-0012",
    "language": "en",
    "provider_customer_id": null,
    "status": "CONFIRMED",
    "currency": "EUR",
    "price": 19.90,
    "security_token": "s3cr3t",
    "created_at": "2025-11-20T11:50:01.452Z",
    "updated_at": "2025-11-20T11:50:02.452Z",
    "is_instant_booking": true,
    "payment_status": null,
    "policies": [
      {
        "status": "CONFIRMED",
        "policy_start_date": "2025-11-21T00:00:00.000Z",
        "policy_end_date": "2026-11-21T00:00:00.000Z",
        "price": 19.90,
        "tax": 3.10,
        "commission": 1.00,
        "cover_amount": null,
        "policy_type": "event_ticket_protection",
        "policy_code": "ETP-01",
        "policy_version": "2025-01",
        "policy_content": {
          "title": "Ticket protection",
          "header": "Your money back",
          "description": "Pays the price of the ticket.",
          "optout_msg": "No, thank you",
          "inclusions": ["Illness"],
          "exclusions": ["Change of mind"],
          "disclaimer": "The wording applies.",
          "disclaimer_html": "<p>The wording applies.</p>",
          "payment_disclaimer": "You pay once.",
          "in_path_disclaimer": "You accept the wording.",
          "extra_content": []
        },
        "claim_selector_id": "claim-1",
        "pds_url": "https://bookings.example/pds.pdf",
        "extra_fields": {
          "seller_entity": "Seller Ltd",
          "event_datetime": "2026-02-01T19:30:00.000Z",
          "event_cost": null,
          "retail_price": 19.90,
          "uw_fee": 10.00,
          "reinsurer_fee": 1,
          "partner_commission": 2.5,
          "coverage_group": "tickets",
          "cg_booking_fee": 0.40
        },
        "confirmed_at": "2025-11-20T11:50:01.452Z",
        "cancelled_at": null,
        "created_at": "2025-11-20T11:50:01.452Z",
        "updated_at": "2025-11-20T11:50:01.452Z",
        "policy_start_date_tz_offset": "+01:00",
        "policy_end_date_tz_offset": "+01:00",
        "parent_id": null,
        "id": "policy-1"
      }
    ],
    "policyholder": {
      "first_name": "Ada",
      "last_name": "Example",
      "email": "ada@example.com",
      "phone": "+44 1632 960001",
      "country": "GB",
      "birth_date": null,
      "address1": "1 High Street",
      "address2": null,
      "city": "Bath",
      "region": "Somerset",
      "postcode": "BA1 1AA",
      "created_at": "2025-11-20T11:50:01.452Z",
      "updated_at": "2025-11-20T11:50:01.452Z",
      "id": "holder-1"
    },
    "quote": {"uuid": "quote-1"},
    "coi": {"url": "https://bookings.example/coi", "pdf": "https://bookings.example/coi.pdf"},
    "account_url": "https://bookings.example/account",
    "fnol_link": "https://bookings.example/claim",
    "sign_up_url": "https://bookings.example/sign-up"
  }
}"""


def sample() -> dict[str, Any]:
    data = read_exact(SAMPLE)["data"]
    assert isinstance(data, dict)
    return data


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """The path and value of each leaf."""
    if isinstance(node, dict):
        return [leaf for name, child in node.items() for leaf in leaves(child, (*path, name))]
    if isinstance(node, list) and node:
        return [leaf for index, child in enumerate(node) for leaf in leaves(child, (*path, index))]
    return [(path, node)]


def value_at(booking: Booking, path: tuple[Any, ...]) -> Any:
    node: Any = booking
    for step in path:
        if isinstance(node, BaseModel):
            assert step in type(node).model_fields, f"{step} is no field of {type(node).__name__}"
            node = getattr(node, step)
        else:
            node = node[step]
    return node


def as_time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


MONEY = {"price", "tax", "commission", "cover_amount", "event_cost", "retail_price", "uw_fee", "reinsurer_fee"}
MONEY |= {"partner_commission", "cg_booking_fee"}
TIMES = {"created_at", "updated_at", "confirmed_at", "cancelled_at", "event_datetime"}
TIMES |= {"policy_start_date", "policy_end_date"}


@pytest.mark.parametrize(("path", "sent"), leaves(sample()), ids=lambda value: str(value)[:60])
def test_every_field_of_the_page_is_read_with_its_type(path: tuple[Any, ...], sent: Any) -> None:
    value = value_at(Booking.model_validate(sample()), path)

    if sent is None:
        assert value is None
    elif path[-1] in TIMES:
        assert value == as_time(sent)
        assert value.tzinfo is not None
    elif path[-1] in MONEY:
        assert isinstance(value, Decimal)
        assert str(value) == str(sent)
    else:
        assert (type(value), value) == (type(sent), sent)


def test_no_field_of_the_page_is_unknown() -> None:
    assert Booking.model_validate(sample()).leftovers() == {}


# --- Money ---


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("19.90", "19.90"),
        ('"19.90"', "19.90"),
        ("1", "1"),
        ("0.00", "0.00"),
        ("-5.10", "-5.10"),
        ("1234567890123456789012345678.1234", "1234567890123456789012345678.1234"),
        ("0.1", "0.1"),
        ("1e2", "100"),
        ("1.5E-3", "0.0015"),
    ],
)
def test_money_is_exact(sent: str, kept: str) -> None:
    booking = Booking.model_validate(read_exact(f'{{"id": "b", "offer_id": "o", "price": {sent}}}'))

    assert booking.price is not None
    assert json.loads(write_exact({"price": booking.price})) == {"price": kept}
    assert booking.leftovers() == {}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**20), max_value=10**20))
def test_any_amount_survives_reading_and_writing(amount: Decimal) -> None:
    booking = Booking.model_validate(read_exact(f'{{"id": "b", "offer_id": "o", "price": {amount:f}}}'))

    assert json.loads(write_exact({"price": booking.price})) == {"price": f"{amount:f}"}


# --- Times ---


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("2025-11-20T11:50:01.452Z", datetime(2025, 11, 20, 11, 50, 1, 452000, UTC)),
        ("2025-11-20T11:50:01", datetime(2025, 11, 20, 11, 50, 1, tzinfo=UTC)),
        ("2025-11-20 11:50:01.5", datetime(2025, 11, 20, 11, 50, 1, 500000, UTC)),
        ("2025-11-20", datetime(2025, 11, 20, tzinfo=UTC)),
        ("2025-11-20T11:50:01+05:30", datetime(2025, 11, 20, 11, 50, 1, tzinfo=timezone(timedelta(hours=5.5)))),
        ("9999-12-31T23:59:59Z", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_a_time_without_a_zone_is_utc(sent: str, kept: datetime) -> None:
    booking = Booking.model_validate({"id": "b", "offer_id": "o", "created_at": sent})

    assert booking.created_at == kept
    assert booking.created_at is not None
    assert booking.created_at.utcoffset() == kept.utcoffset()


def test_a_time_is_written_in_utc_with_microseconds() -> None:
    east = timezone(timedelta(hours=2))

    assert moment(datetime(2026, 1, 1, 1, 30, tzinfo=east)) == "2025-12-31T23:30:00.000000Z"


# --- What does not fit, and what is not known ---

LONG = "9" * 33
MISFITS: dict[str, tuple[str, Any]] = {
    "price in words": ("price", "about twenty"),
    "price NaN": ("price", "NaN"),
    "price too long": ("price", LONG),
    "price a list": ("price", [1]),
    "time in words": ("created_at", "yesterday"),
    "time beyond the years": ("updated_at", "9999-12-31T23:59:59-05:00"),
    "time before the years": ("updated_at", "0001-01-01T00:00:00+01:00"),
    "status a number": ("status", 7),
    "status an object": ("status", {"is": "CONFIRMED"}),
    "status NUL": ("status", "a\x00"),
    "status half a surrogate pair": ("status", "\ud800"),
    "flag in words": ("is_instant_booking", "perhaps"),
    "policies no list": ("policies", "none"),
    "a policy no object": ("policies", [1]),
    "policyholder a text": ("policyholder", "Ada"),
    "coi a text": ("coi", "https://bookings.example/coi"),
    "quote a list": ("quote", []),
    "unknown text": ("a_new_field", "x"),
    "unknown object": ("a_new_field", {"with": ["more", {"in": "it"}]}),
    "unknown null": ("a_new_field", None),
    "unknown, named as a method": ("leftovers", 1),
    "unknown, named as pydantic's": ("model_fields", 1),
}
DEEP: dict[str, tuple[str, str, Any]] = {
    "policy tax": ("policies.0.tax", "policies[0].tax", [1, "two"]),
    "policy id": ("policies.0.id", "policies[0].id", {}),
    "policy time": ("policies.0.policy_end_date", "policies[0].policy_end_date", "never"),
    "policy content": ("policies.0.policy_content", "policies[0].policy_content", "see above"),
    "policy, unknown": ("policies.0.risk", "policies[0].risk", {"class": 3}),
    "extra fields no object": ("policies.0.extra_fields", "policies[0].extra_fields", "none"),
    "holder name": ("policyholder.first_name", "policyholder.first_name", 5),
    "holder, unknown": ("policyholder.title", "policyholder.title", "Dr"),
    "coi url": ("coi.url", "coi.url", 1),
    "coi, unknown": ("coi.html", "coi.html", "x"),
    "quote, unknown": ("quote.id", "quote.id", "x"),
}


def changed(place: str, value: Any) -> dict[str, Any]:
    data = node = sample()
    *parents, last = place.split(".")
    for step in parents:
        node = node[int(step)] if isinstance(node, list) else node[step]
    node[last] = value
    return data


@pytest.mark.parametrize(
    ("place", "path", "value"),
    [*((place, place, value) for place, value in MISFITS.values()), *DEEP.values()],
    ids=[*MISFITS, *DEEP],
)
def test_a_misfit_is_kept_by_its_path_and_affects_no_other_field(place: str, path: str, value: Any) -> None:
    before = Booking.model_validate(sample()).model_dump()

    booking = Booking.model_validate(changed(place, value))

    assert booking.leftovers() == {path: value}
    top = place.split(".")[0]
    after = booking.model_dump()
    assert {name: after[name] for name in before if name != top} == {
        name: before[name] for name in before if name != top
    }


def test_several_misfits_are_kept() -> None:
    data = changed("policies.0.tax", "much") | {"price": "about twenty", "a_new_field": 1}

    booking = Booking.model_validate(data)

    assert booking.leftovers() == {"policies[0].tax": "much", "price": "about twenty", "a_new_field": 1}
    assert booking.policies[0].policy_code == "ETP-01"


CLEAR = [
    ("provider_reference", "provider_reference", "Ada Lovelace"),
    ("provider_reference", "provider_reference", "ada@example.com"),
    ("provider_reference", "provider_reference", "+44 7700 900123"),
    ("provider_customer_id", "provider_customer_id", "Lovelace"),
    ("language", "language", "español"),
    ("status", "status", "of Ada Lövelace"),
    ("payment_status", "payment_status", "paid by ada@example.com"),
    ("quote.uuid", "quote.uuid", "the one of Ada"),
    ("policies.0.id", "policies[0].id", "ada@example.com"),
    ("policies.0.parent_id", "policies[0].parent_id", "Ada Lovelace"),
    ("policies.0.policy_content.title", "policies[0].policy_content.title", "For ada@example.com"),
    ("policies.0.policy_content.exclusions", "policies[0].policy_content.exclusions", ["None", "ada@example.com"]),
    ("policies.0.extra_fields.seller_entity", "policies[0].extra_fields.seller_entity", "ada@example.com"),
    ("policies.0.pds_url", "policies[0].pds_url", "https://x.example/pds/ada%40example.com"),
    ("policyholder.id", "policyholder.id", "ada@example.com"),
    ("policyholder.email", "policyholder.email", "a" * 400 + "@example.com"),
    ("coi.pdf", "coi.pdf", "https://x.example/" + "x" * 9000),
    ("policies.0.claim_selector_id", "policies[0].claim_selector_id", "Lovelace"),
    ("policies.0.pds_url", "policies[0].pds_url", "https://x.example/pds?security_token=1"),
    ("policies.0.policy_content.dear", "policies[0].policy_content.dear", "Ada"),
    ("policies.0.policy_content.inclusions", "policies[0].policy_content.inclusions", [{"name": "Ada"}]),
    ("policies.0.extra_fields.a_new_fee", "policies[0].extra_fields.a_new_fee", Decimal("0.10")),
    ("policies.0.extra_fields.uw_fee", "policies[0].extra_fields.uw_fee", "half"),
]


@pytest.mark.parametrize(("place", "path", "value"), CLEAR)
def test_what_may_be_a_persons_data_is_in_no_clear_column(place: str, path: str, value: Any) -> None:
    assert Booking.model_validate(changed(place, value)).leftovers() == {path: value}


# --- What is required ---


def test_only_id_and_offer_id_are_required() -> None:
    booking = Booking.model_validate({"id": "b", "offer_id": "o"})

    assert (booking.id, booking.offer_id, booking.policies, booking.status) == ("b", "o", [], None)


def test_ids_that_are_numbers_become_text() -> None:
    booking = Booking.model_validate({"id": 17, "offer_id": 18, "policies": [{"id": 19}]})

    assert (booking.id, booking.offer_id, booking.policies[0].id) == ("17", "18", "19")


@pytest.mark.parametrize(
    "data",
    [
        {"offer_id": "o"},
        {"id": "b"},
        {"id": "", "offer_id": "o"},
        {"id": None, "offer_id": "o"},
        {"id": "b" * 256, "offer_id": "o"},
        {"id": ["b"], "offer_id": "o"},
        {"id": "b\x00", "offer_id": "o"},
        {"id": "of ada@example.com", "offer_id": "o"},
        {"id": "b", "offer_id": ""},
        [],
        "b",
        None,
    ],
)
def test_an_answer_without_id_or_offer_id_is_no_booking(data: Any) -> None:
    with pytest.raises(ValidationError):
        Booking.model_validate(data)


# --- Exact JSON ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("19.90", Decimal("19.90")),
        ("1", 1),
        ("1E3", Decimal("1E3")),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e9999999", "1e9999999"),
        ("1e-9999999", "1e-9999999"),
        ("1e99999999999999999999", "1e99999999999999999999"),
        ("9" * 100, int("9" * 100)),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_numbers_are_read_as_they_were_written(text: str, value: Any) -> None:
    [read] = read_exact(f"[{text}]")

    assert (type(read), str(read)) == (type(value), str(value))
    assert len(write_exact([read])) < 100 + len(text)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"<html>", b"[01]"])
def test_invalid_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_exact(text)


def test_a_value_without_a_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="set has no JSON form"):
        write_exact({1, 2})


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.decimals(allow_nan=False, allow_infinity=False),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(set(Booking.model_fields) - {"id", "offer_id"})), ANY_JSON)
def test_a_booking_is_never_refused_for_a_detail(name: str, value: Any) -> None:
    booking = Booking.model_validate({"id": "b", "offer_id": "o", name: value})

    assert booking.id == "b"
    json.loads(write_exact(booking.leftovers()))
    json.loads(write_exact(booking.model_dump()))

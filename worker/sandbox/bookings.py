"""Bookings: the `data` of XONE's confirm answer, and the shapes that faults give it."""

import base64
import hashlib
import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from models.same import canonical_id
from worker.sandbox.answers import Json

BOOKING = json.loads("""{
  "language": "en", "provider_customer_id": null, "status": "CONFIRMED", "currency": "EUR",
  "is_instant_booking": true, "payment_status": null, "sandbox": true
}""")  # XONE has no field "sandbox": clients must accept new fields

POLICY = json.loads("""{
  "status": "CONFIRMED", "cover_amount": null, "cancelled_at": null, "parent_id": null,
  "policy_type": "event_ticket_protection", "policy_code": "ETP-01", "policy_version": "2025-01",
  "policy_start_date_tz_offset": "+00:00", "policy_end_date_tz_offset": "+00:00",
  "pds_url": "https://bookings.example/wording/ETP-01.pdf",
  "policy_content": {
    "title": "Ticket protection", "header": "Your money back when you can't go",
    "description": "Pays the price of the ticket if illness or travel trouble keeps you away.",
    "optout_msg": "I take the risk myself",
    "inclusions": ["Illness", "Delayed public transport"], "exclusions": ["Change of mind"],
    "disclaimer": "The policy wording applies.", "disclaimer_html": "<p>The policy wording applies.</p>",
    "payment_disclaimer": "You pay once, together with the ticket.",
    "in_path_disclaimer": "By paying you accept the policy wording.", "extra_content": []
  }
}""")


def new_booking(partner_id: str, offer_id: str, job: Json) -> Json:
    """The `data` of XONE's confirm answer, with every field. Ids and amounts are derived from the arguments."""
    offer_id = canonical_id(offer_id)
    digest = hashlib.sha256(f"{partner_id}/{offer_id}".encode()).digest()
    booking_id, security_token = "INS-" + base64.b32encode(digest).decode()[:8], digest.hex()[:32]
    now = datetime.now(UTC)
    times = {"created_at": iso(now), "updated_at": iso(now)}
    policies = [new_policy(same_id(offer_id, str(item["id"])), now) for item in job["quotes"]]
    person = ("first_name", "last_name", "email", "phone", "country", "birth_date")
    address = ("address1", "address2", "city", "region", "postcode")
    policyholder = {name: job["policyholder"].get(name) for name in person + address}

    def link(path: str) -> str:
        return f"https://bookings.example/{path}/{booking_id}?security_token={security_token}"

    return {
        **BOOKING,
        **times,
        "id": booking_id,
        "offer_id": offer_id,
        "provider_reference": f"PR-{digest.hex()[-10:].upper()}",
        "price": sum((policy["price"] for policy in policies), Decimal(0)),
        "security_token": security_token,
        "policies": policies,
        "policyholder": {**policyholder, **times, "id": same_id(offer_id, "policyholder")},
        "quote": {"uuid": job["quotes"][0]["id"]},
        "coi": {"url": link("coi"), "pdf": link("coi.pdf")},
        "account_url": link("account"),
        "fnol_link": link("claims/new"),
        "sign_up_url": link("sign-up"),
    }


def new_policy(policy_id: str, now: datetime) -> Json:
    price = Decimal(1000 + int(policy_id[:8], 16) % 9000) / 100

    def share(percent: int) -> Decimal:
        return (price * percent / 100).quantize(Decimal("0.01"))

    fees = {"uw_fee": share(50), "reinsurer_fee": share(5), "partner_commission": share(10)}
    event = {"event_datetime": iso(now + timedelta(days=90)), "event_cost": None, "coverage_group": "tickets"}
    sale = {"seller_entity": "Sandbox Ltd", "retail_price": share(100), "cg_booking_fee": share(2)}
    return {
        **POLICY,
        **{name: iso(now) for name in ("policy_start_date", "confirmed_at", "created_at", "updated_at")},
        "id": policy_id,
        "policy_end_date": iso(now + timedelta(days=365)),
        "price": share(100),
        "tax": share(19),
        "commission": share(10),
        "claim_selector_id": same_id(policy_id, "claim"),
        "extra_fields": fees | event | sale,
    }


def iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def same_id(*names: str) -> str:
    """A UUID that is the same for the same names."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(names)))


def with_policies(booking: Json, **changes: Any) -> Json:
    return booking | {"policies": [policy | changes for policy in booking["policies"]]}


def pending(booking: Json) -> Json:
    return with_policies(booking, status="PENDING", confirmed_at=None) | {"status": "PENDING"}


def confirmed(booking: Json) -> Json:
    now = iso(datetime.now(UTC))
    return with_policies(booking, status="CONFIRMED", confirmed_at=now) | {"status": "CONFIRMED", "updated_at": now}


def with_status(status: str) -> Callable[[Json], Json]:
    """Gives a booking and its policies a status without cover."""

    def changed(booking: Json) -> Json:
        now = iso(datetime.now(UTC))
        return with_policies(booking, status=status, cancelled_at=now) | {"status": status, "updated_at": now}

    return changed


def odd_types(booking: Json) -> Json:
    first, *others = booking["policies"]
    policies = [first | {"tax": [1, "two"]}, *others]
    return booking | {"price": "about twenty", "created_at": "yesterday", "policies": policies}


def in_capitals(booking: Json) -> Json:
    return booking | {"offer_id": booking["offer_id"].upper()}


def minimal(booking: Json) -> Json:
    return {name: booking[name] for name in ("id", "offer_id", "status")}


def many_policies(booking: Json) -> Json:
    return booking | {"policies": [{}] * 2000}


def many_scripts(booking: Json) -> Json:
    words = "Größe und Überschuß · Ελληνικά · Русский · 日本語の保険 · العربية · 🎟️🛡️ · "
    content = {"title": words, "description": words * 200, "inclusions": [words]}
    return with_policies(booking, policy_content=content)

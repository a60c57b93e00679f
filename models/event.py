"""Events for consumers: CloudEvents 1.0 in structured mode, one JSON text each."""

import json
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from models.booking import Booking
from models.exact_json import moment, write_exact

CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"


class EventType(StrEnum):
    BOOKING_CONFIRMED = "booking.confirmed"
    BOOKING_PENDING = "booking.pending"
    CONFIRMATION_FAILED = "confirmation.failed"
    CONFIRMATION_NEEDS_REVIEW = "confirmation.needs_review"


BOOKING_EVENTS = (EventType.BOOKING_CONFIRMED, EventType.BOOKING_PENDING)


def cloud_event(
    event_id: UUID,
    event_type: EventType,
    partner_id: str,
    offer_id: str,
    time: datetime,
    data: dict[str, Any],
) -> str:
    """The event as it is published. ``data`` comes from booking_data or error_data, with the common keys added."""
    return write_exact(
        {
            "specversion": "1.0",
            "id": str(event_id),
            "source": "/confirm-offer",
            "type": event_type.value,
            "subject": f"{partner_id}/{offer_id}",
            "time": moment(time),
            "datacontenttype": "application/json",
            "dataschema": f"urn:confirm-offer:{event_type.value}:1",
            "data": data,
        }
    )


def booking_data(booking: Booking, with_links: bool) -> dict[str, Any]:
    """``booking`` and ``policies`` of a booking event. Holds no personal data and no security token.

    with_links: the customers' own links too (EVENT_LINKS=on); they may carry the customer's token.
    """
    links: dict[str, Any] = {
        "coi": {"url": booking.coi.url, "pdf": booking.coi.pdf} if booking.coi else None,
        "account_url": booking.account_url,
        "fnol_link": booking.fnol_link,
        "sign_up_url": booking.sign_up_url,
    }
    return {
        "booking": {
            **_fields(booking, "id", "status", "currency", "price", "provider_reference"),
            **_fields(booking, "is_instant_booking", "created_at"),
            **(links if with_links else {}),
        },
        "policies": [_fields(policy, *_POLICY_FIELDS) for policy in booking.policies],
    }


def without_links(payload: str) -> str:
    """A booking event as it would have been without customers' links."""
    event = json.loads(payload)
    booking = event["data"]["booking"]
    for link in ("coi", "account_url", "fnol_link", "sign_up_url"):
        booking.pop(link, None)
    return write_exact(event)


_POLICY_FIELDS: Sequence[str] = (
    "id",
    "status",
    "policy_type",
    "policy_code",
    "price",
    "tax",
    "policy_start_date",
    "policy_end_date",
)


def error_data(code: str, http_status: int | None, detail: str | None, attempts: int) -> dict[str, Any]:
    """``error`` of a ``confirmation.*`` event."""
    return {"error": {"code": code, "http_status": http_status, "detail": detail, "attempts": attempts}}


def _fields(source: object, *names: str) -> dict[str, str | Decimal | datetime | bool | None]:
    return {name: getattr(source, name) for name in names}

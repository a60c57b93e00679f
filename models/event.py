"""Events for consumers: CloudEvents 1.0 in structured mode, one JSON text each.

The models say what is published, and worker/published/json_schema.py makes the published schemas from them. What a
schema has promised stays: keys may be added, and none goes or changes its type.

The models check types only. Patterns and limits are promises to consumers that hold already, by the checks of the job
and of XONE's answer: an event must not fail at the moment its booking is recorded.
"""

import json
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field

from models.booking import Booking, Policy
from models.exact_json import decimal_text, moment, write_exact
from models.states import ERROR_CODES

CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"


class EventType(StrEnum):
    BOOKING_CONFIRMED = "booking.confirmed"
    BOOKING_PENDING = "booking.pending"
    BOOKING_UPDATED = "booking.updated"
    BOOKING_CANCELLED = "booking.cancelled"
    CONFIRMATION_FAILED = "confirmation.failed"
    CONFIRMATION_NEEDS_REVIEW = "confirmation.needs_review"


BOOKING_EVENTS = (
    EventType.BOOKING_CONFIRMED,
    EventType.BOOKING_PENDING,
    EventType.BOOKING_UPDATED,
    EventType.BOOKING_CANCELLED,
)


# --- What the fields of events are ---

END = r"$(?!\n)"  # in Python $ alone would let a newline pass
_PATH_ID = "[A-Za-z0-9._~-]{1,128}"
_LINK = "The customer's own, and may carry the customer's token: only with EVENT_LINKS=on."


def _field(description: str, **limits: Any) -> Any:
    """limits: keywords of JSON Schema, which the model does not check."""
    return Field(description=description, json_schema_extra=limits or None)


def _money(description: str) -> Any:
    return _field(f"{description} A decimal, with the digits that XONE sent.", pattern=rf"^-?[0-9]+(\.[0-9]+)?{END}")


def _time(description: str) -> Any:
    return _field(description, format="date-time")


class Part(BaseModel):
    """Part of an event. A field without a default is always there, if only as null."""


class CoiPart(Part):
    """Certificate of insurance. The customer's own, and may carry the customer's token: only with EVENT_LINKS=on."""

    url: Annotated[str | None, _field("A page.")]
    pdf: Annotated[str | None, _field("A PDF.")]


class BookingPart(Part):
    """The booking, as XONE answered it."""

    id: Annotated[str, _field("XONE's number of the booking.", minLength=1, maxLength=255)]
    status: Annotated[str | None, _field("As XONE says it.")]
    currency: Annotated[str | None, _field("Of all amounts; as XONE says it, usually ISO 4217.")]
    price: Annotated[str | None, _money("Price of the booking.")]
    provider_reference: Annotated[str | None, _field("The provider's own number.")]
    is_instant_booking: Annotated[bool | None, _field("As XONE says it.")]
    created_at: Annotated[str | None, _time("When XONE made it.")]
    coi: CoiPart | None = None
    account_url: Annotated[str | None, _field(f"The customer's account. {_LINK}")] = None
    fnol_link: Annotated[str | None, _field(f"For a first notice of loss. {_LINK}")] = None
    sign_up_url: Annotated[str | None, _field(f"For signing up. {_LINK}")] = None


LINKS = ("coi", "account_url", "fnol_link", "sign_up_url")


class PolicyPart(Part):
    """A policy of the booking."""

    id: Annotated[str | None, _field("XONE's id of the policy.")]
    status: Annotated[str | None, _field("As XONE says it.")]
    policy_type: Annotated[str | None, _field("As XONE says it.")]
    policy_code: Annotated[str | None, _field("As XONE says it.")]
    price: Annotated[str | None, _money("Price of the policy.")]
    tax: Annotated[str | None, _money("Tax in the price.")]
    policy_start_date: Annotated[str | None, _time("When cover begins.")]
    policy_end_date: Annotated[str | None, _time("When cover ends.")]


class ErrorPart(Part):
    """Why there is no booking."""

    code: Annotated[
        str,
        _field(
            f"http-<status> where an HTTP status decided; else {', '.join(ERROR_CODES[:-1])} or {ERROR_CODES[-1]}."
            " More may come.",
            pattern=f"^[a-z0-9-]+{END}",
        ),
    ]
    http_status: Annotated[int | None, _field("Of XONE's last answer.", minimum=100, maximum=999)]
    detail: Annotated[str | None, _field("For people. Holds no personal data.")]
    attempts: Annotated[int, _field("Attempts of this confirmation.", minimum=0)]


class EventData(Part):
    """What happened, and to which confirmation."""

    partner_id: Annotated[str, _field("As in the job.", pattern=f"^{_PATH_ID}{END}")]
    offer_id: Annotated[str, _field("As in the job.", pattern=f"^{_PATH_ID}{END}")]
    order_reference: Annotated[str | None, _field("As in the job; null where it had none.")]
    metadata: Annotated[dict[str, str], _field("As in the job.", maxProperties=20)]
    sequence: Annotated[
        int,
        _field("Counts the events of one confirmation. What is not newer than what you have is old.", minimum=1),
    ]


class BookingData(EventData):
    """What happened, and to which confirmation."""

    booking: BookingPart
    policies: list[PolicyPart]


class ErrorData(EventData):
    """What happened, and to which confirmation."""

    error: ErrorPart


class CloudEvent(Part):
    """An event. Each type is a class of its own."""

    specversion: Literal["1.0"]
    id: Annotated[str, _field("The same on every repeat. With source it identifies the event.", format="uuid")]
    source: Literal["/confirm-offer"]
    type: str
    subject: Annotated[str, _field("<partner_id>/<offer_id>", pattern=f"^{_PATH_ID}/{_PATH_ID}{END}")]
    time: Annotated[str, _time("When it was decided. RFC 3339, UTC.")]
    datacontenttype: Literal["application/json"]
    dataschema: str
    data: EventData


class BookingConfirmed(CloudEvent):
    """The booking is stored and its status is a confirmed one."""

    type: Literal["booking.confirmed"]
    dataschema: Literal["urn:confirm-offer:booking.confirmed:1"]
    data: BookingData


class BookingPending(CloudEvent):
    """The booking is stored, but its status is not a confirmed one yet."""

    type: Literal["booking.pending"]
    dataschema: Literal["urn:confirm-offer:booking.pending:1"]
    data: BookingData


class BookingUpdated(CloudEvent):
    """A booking that was followed up has another status, or one of its policies has; no other type says it."""

    type: Literal["booking.updated"]
    dataschema: Literal["urn:confirm-offer:booking.updated:1"]
    data: BookingData


class BookingCancelled(CloudEvent):
    """The booking has a status that ends it: it gives no cover."""

    type: Literal["booking.cancelled"]
    dataschema: Literal["urn:confirm-offer:booking.cancelled:1"]
    data: BookingData


class ConfirmationFailed(CloudEvent):
    """XONE refused the offer for good, or the retries are used up."""

    type: Literal["confirmation.failed"]
    dataschema: Literal["urn:confirm-offer:confirmation.failed:1"]
    data: ErrorData


class ConfirmationNeedsReview(CloudEvent):
    """Whether a booking exists, or what becomes of one that stays pending, can't be established without a person."""

    type: Literal["confirmation.needs_review"]
    dataschema: Literal["urn:confirm-offer:confirmation.needs_review:1"]
    data: ErrorData


EVENT_MODELS: dict[EventType, type[CloudEvent]] = {
    EventType.BOOKING_CONFIRMED: BookingConfirmed,
    EventType.BOOKING_PENDING: BookingPending,
    EventType.BOOKING_UPDATED: BookingUpdated,
    EventType.BOOKING_CANCELLED: BookingCancelled,
    EventType.CONFIRMATION_FAILED: ConfirmationFailed,
    EventType.CONFIRMATION_NEEDS_REVIEW: ConfirmationNeedsReview,
}


# --- Making them ---


def cloud_event(
    event_id: UUID, event_type: EventType, partner_id: str, offer_id: str, time: datetime, data: dict[str, Any]
) -> str:
    """The event as it is published: the fields of its model and no others, as compact JSON in ASCII.

    data: with the keys of EventData, and those of booking_data or error_data. Raises ValidationError if one is missing
    or of another type.
    """
    model = EVENT_MODELS[event_type]
    event = model.__pydantic_validator__.validate_python(
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
    text: bytes = model.__pydantic_serializer__.to_json(event, exclude_unset=True, ensure_ascii=True)
    return text.decode().replace("\x7f", "\\u007f")  # as write_exact has it


def booking_data(booking: Booking, with_links: bool) -> dict[str, Any]:
    """``booking`` and ``policies`` of BookingData. Holds no personal data and no security token.

    with_links: the customers' own links too (EVENT_LINKS=on); they may carry the customer's token.
    """
    return {
        "booking": {
            "id": booking.id,
            "status": booking.status,
            "currency": booking.currency,
            "price": _decimal(booking.price),
            "provider_reference": booking.provider_reference,
            "is_instant_booking": booking.is_instant_booking,
            "created_at": _moment(booking.created_at),
            **(_links(booking) if with_links else {}),
        },
        "policies": [
            {
                "id": policy.id,
                "status": policy.status,
                "policy_type": policy.policy_type,
                "policy_code": policy.policy_code,
                "price": _decimal(policy.price),
                "tax": _decimal(policy.tax),
                "policy_start_date": _moment(policy.policy_start_date),
                "policy_end_date": _moment(policy.policy_end_date),
            }
            for policy in booking.policies
        ],
    }


def _links(booking: Booking) -> dict[str, Any]:
    return {
        "coi": {"url": booking.coi.url, "pdf": booking.coi.pdf} if booking.coi else None,
        "account_url": booking.account_url,
        "fnol_link": booking.fnol_link,
        "sign_up_url": booking.sign_up_url,
    }


def error_data(code: str, http_status: int | None, detail: str | None, attempts: int) -> dict[str, Any]:
    """``error`` of ErrorData."""
    return {"error": {"code": code, "http_status": http_status, "detail": detail, "attempts": attempts}}


def without_links(payload: str) -> str:
    """A booking event as it would have been without customers' links."""
    event = json.loads(payload)
    booking = event["data"]["booking"]
    for link in LINKS:
        booking.pop(link, None)
    return write_exact(event)


def without_misfits(payload: str) -> str:
    """A booking event of an earlier version without the values that do not fit their field, which may be personal."""
    event = json.loads(payload)
    booking, policies = event["data"]["booking"], event["data"].get("policies", [])
    read = [Booking.model_validate({**booking, "id": "-", "offer_id": "-"}), *map(Policy.model_validate, policies)]
    misfits = [(part, name) for part, fits in zip([booking, *policies], read, strict=True) for name in fits.misfits()]
    for part, name in misfits:
        part[name] = None
    return write_exact(event) if misfits else payload


def _decimal(amount: Decimal | None) -> str | None:
    return None if amount is None else decimal_text(amount)


def _moment(time: datetime | None) -> str | None:
    return None if time is None else moment(time)

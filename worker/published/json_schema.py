"""The published schemas (JSON Schema 2020-12): of the job, from the model that reads it, and of each event.

They are promises. A job that a schema has accepted stays acceptable; what an event's schema requires stays there, of
the same type. So job objects are closed or open as read_job treats them, and event objects are open: keys may be added.
"""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from models.event import BOOKING_EVENTS, EventType
from models.job import MAX_BYTES, MAX_DEPTH, Job

DIALECT = "https://json-schema.org/draft/2020-12/schema"
VERSION = "1"

JOB_EXAMPLE: dict[str, Any] = {
    "partner_id": "P-100",
    "offer_id": "offer-1",
    "order_reference": "SO-1001",
    "quotes": [{"id": "quote-1", "insured": [{"first_name": "Ada", "last_name": "Lovelace"}]}],
    "policyholder": {"first_name": "Ada", "last_name": "Lovelace", "country": "GB", "email": "ada@example.com"},
    "metadata": {"channel": "web"},
}

# --- The job ---


class _AsReadJob(GenerateJsonSchema):
    """As read_job checks it, and no more than that: without titles made from names, and defaults that are not sent."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        inner = self.generate_inner(schema["schema"])
        if isinstance(inner.get("type"), str):
            return {**inner, "type": [inner["type"], "null"]}
        return super().nullable_schema(schema)

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        """pydantic makes a key's pattern one of patternProperties, which lets all other keys pass."""
        made = super().dict_schema(schema)
        for pattern, value in made.pop("patternProperties", {}).items():
            made["propertyNames"]["pattern"] = pattern
            made["additionalProperties"] = value
        return made


def job_schema(refs: str = "#/$defs/{model}") -> dict[str, Any]:
    """What read_job accepts. refs: where the parts are, for a document that holds them elsewhere."""
    schema = Job.model_json_schema(schema_generator=_AsReadJob, ref_template=refs)
    limits = (
        f"What no schema can say: UTF-8 without byte order mark, at most {MAX_BYTES} bytes, nested at most {MAX_DEPTH}"
        " deep, no key twice in one object, no integer of more than 64 digits, no number beyond those of a double, no"
        " half of a surrogate pair."
    )
    return {
        "$schema": DIALECT,
        "$id": f"urn:confirm-offer:job:{VERSION}",
        "title": schema.pop("title"),
        "description": f"{schema.pop('description')} {limits}",
        **{keyword: value for keyword, value in schema.items() if keyword != "$defs"},
        "examples": [JOB_EXAMPLE],
        "$defs": schema["$defs"],
    }


# --- Events ---


_END = r"$(?!\n)"  # in Python $ alone would let a newline pass


def _text(description: str, **limits: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **limits}


def _perhaps(schema: dict[str, Any]) -> dict[str, Any]:
    """The key is there; its value may be null."""
    return {**schema, "type": [schema["type"], "null"]}


def _object(description: str, optional: dict[str, Any] | None = None, **required: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "properties": required | (optional or {}),
        "required": list(required),
    }


def _moment(description: str) -> dict[str, Any]:
    return _text(description, format="date-time")


def _money(description: str) -> dict[str, Any]:
    return _text(f"{description} A decimal, with the digits that XONE sent.", pattern=rf"^-?[0-9]+(\.[0-9]+)?{_END}")


_PATH_ID = "[A-Za-z0-9._~-]{1,128}"
_LINK = "The customer's own, and may carry the customer's token: only with EVENT_LINKS=on."

_POLICY = _object(
    "A policy of the booking.",
    id=_perhaps(_text("XONE's id of the policy.")),
    status=_perhaps(_text("As XONE says it.")),
    policy_type=_perhaps(_text("As XONE says it.")),
    policy_code=_perhaps(_text("As XONE says it.")),
    price=_perhaps(_money("Price of the policy.")),
    tax=_perhaps(_money("Tax in the price.")),
    policy_start_date=_perhaps(_moment("When cover begins.")),
    policy_end_date=_perhaps(_moment("When cover ends.")),
)

_BOOKING = _object(
    "The booking, as XONE answered it.",
    id=_text("XONE's number of the booking.", minLength=1, maxLength=255),
    status=_perhaps(_text("As XONE says it.")),
    currency=_perhaps(_text("Of all amounts; as XONE says it, usually ISO 4217.")),
    price=_perhaps(_money("Price of the booking.")),
    provider_reference=_perhaps(_text("The provider's own number.")),
    is_instant_booking=_perhaps({"type": "boolean", "description": "As XONE says it."}),
    created_at=_perhaps(_moment("When XONE made it.")),
    optional={
        "coi": _perhaps(
            _object(
                f"Certificate of insurance. {_LINK}",
                url=_perhaps(_text("A page.")),
                pdf=_perhaps(_text("A PDF.")),
            )
        ),
        "account_url": _perhaps(_text(f"The customer's account. {_LINK}")),
        "fnol_link": _perhaps(_text(f"For a first notice of loss. {_LINK}")),
        "sign_up_url": _perhaps(_text(f"For signing up. {_LINK}")),
    },
)

_ERROR = _object(
    "Why there is no booking.",
    code=_text(
        "http-<status> where an HTTP status decided; else connect, timeout, connection-lost, bad-answer, wrong-offer,"
        " too-large, redirect, already-booked, credentials, poison or resolved. More may come.",
        pattern=f"^[a-z0-9-]+{_END}",
    ),
    http_status=_perhaps({"type": "integer", "description": "Of XONE's last answer.", "minimum": 100, "maximum": 999}),
    detail=_perhaps(_text("For people. Holds no personal data.")),
    attempts={"type": "integer", "description": "Attempts of this confirmation.", "minimum": 0},
)

_WHEN = {
    EventType.BOOKING_CONFIRMED: "The booking is stored and its status is a confirmed one.",
    EventType.BOOKING_PENDING: "The booking is stored, but its status is not a confirmed one.",
    EventType.CONFIRMATION_FAILED: "XONE refused the offer for good, or the retries are used up.",
    EventType.CONFIRMATION_NEEDS_REVIEW: "Whether a booking exists can't be established without a person.",
}


def data_schema(event_type: EventType) -> dict[str, Any]:
    """Of an event's ``data``: what its ``dataschema`` names."""
    content: dict[str, Any] = (
        {"booking": _BOOKING, "policies": {"type": "array", "items": _POLICY}}
        if event_type in BOOKING_EVENTS
        else {"error": _ERROR}
    )
    return {
        "$id": f"urn:confirm-offer:{event_type}:{VERSION}",
        **_object(
            "What happened, and to which confirmation.",
            partner_id=_text("As in the job.", pattern=f"^{_PATH_ID}{_END}"),
            offer_id=_text("As in the job.", pattern=f"^{_PATH_ID}{_END}"),
            order_reference=_perhaps(_text("As in the job; null where it had none.")),
            metadata={
                "type": "object",
                "description": "As in the job.",
                "additionalProperties": {"type": "string"},
                "maxProperties": 20,
            },
            sequence={
                "type": "integer",
                "description": "Counts the events of one confirmation. What is not newer than what you have is old.",
                "minimum": 1,
            },
            **content,
        ),
    }


def envelope_schema(event_type: EventType) -> dict[str, Any]:
    """Of a whole event of a type: CloudEvents 1.0 in structured mode."""
    return {
        "title": event_type.value,
        **_object(
            _WHEN[event_type],
            specversion={"const": "1.0"},
            id=_text("The same on every repeat. With source it identifies the event.", format="uuid"),
            source={"const": "/confirm-offer"},
            type={"const": event_type.value},
            subject=_text("<partner_id>/<offer_id>", pattern=f"^{_PATH_ID}/{_PATH_ID}{_END}"),
            time=_moment("When it was decided. RFC 3339, UTC."),
            datacontenttype={"const": "application/json"},
            dataschema={"const": f"urn:confirm-offer:{event_type}:{VERSION}"},
            data=data_schema(event_type),
        ),
        "examples": [event_example(event_type)],
    }


def event_schema() -> dict[str, Any]:
    """Of any event; each type's is in ``$defs``, by its name."""
    return {
        "$schema": DIALECT,
        "$id": f"urn:confirm-offer:event:{VERSION}",
        "title": "Event",
        "description": "A message of the exchange booking-events. Keys and types of events may be added.",
        "oneOf": [{"$ref": f"#/$defs/{event_type}"} for event_type in EventType],
        "$defs": {event_type.value: envelope_schema(event_type) for event_type in EventType},
    }


def event_example(event_type: EventType) -> dict[str, Any]:
    status = "CONFIRMED" if event_type is EventType.BOOKING_CONFIRMED else "PENDING"
    booking = {
        "id": "INS-QAN5YMZ3",
        "status": status,
        "currency": "EUR",
        "price": "80.62",
        "provider_reference": "PR-4465DFCCA4",
        "is_instant_booking": True,
        "created_at": "2026-01-01T12:00:00.940000Z",
    }
    policy = {
        "id": "7788bd4e-98dc-5884-91f4-5056a08f7792",
        "status": status,
        "policy_type": "event_ticket_protection",
        "policy_code": "ETP-01",
        "price": "80.62",
        "tax": "15.32",
        "policy_start_date": "2026-01-01T12:00:00.940000Z",
        "policy_end_date": "2027-01-01T12:00:00.940000Z",
    }
    error = (
        {"code": "http-422", "http_status": 422, "detail": "XONE answered 422 Unprocessable Entity", "attempts": 1}
        if event_type is EventType.CONFIRMATION_FAILED
        else {"code": "timeout", "http_status": None, "detail": "no whole answer within 30 s", "attempts": 12}
    )
    return {
        "specversion": "1.0",
        "id": "01a206e5-4edb-748d-b71c-d6fee6687a37",
        "source": "/confirm-offer",
        "type": event_type.value,
        "subject": "P-100/offer-1",
        "time": "2026-01-01T12:00:00.944613Z",
        "datacontenttype": "application/json",
        "dataschema": f"urn:confirm-offer:{event_type}:{VERSION}",
        "data": {
            "partner_id": "P-100",
            "offer_id": "offer-1",
            "order_reference": "SO-1001",
            "metadata": {"channel": "web"},
            "sequence": 1,
            **({"booking": booking, "policies": [policy]} if event_type in BOOKING_EVENTS else {"error": error}),
        },
    }

"""The published schemas (JSON Schema 2020-12): of the job and of each event, from their models.

They are promises. A job that a schema has accepted stays acceptable. What an event's schema requires stays there, of
the same type. So job objects are closed or open as read_job treats them, and event objects are open: keys may be added.
"""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from models.booking import Booking
from models.event import EVENT_MODELS, EventType, booking_data, cloud_event, error_data
from models.job import MAX_BYTES, MAX_DEPTH, MAX_INSURED_OF_JOB, Job

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


class _Published(GenerateJsonSchema):
    """JSON Schema of a model as it checks or publishes: without titles made from names, and without defaults."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def literal_schema(self, schema: core_schema.LiteralSchema) -> JsonSchemaValue:
        (value,) = schema["expected"]
        return {"const": value}

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


# --- The job ---


def job_schema(refs: str = "#/$defs/{model}") -> dict[str, Any]:
    """What read_job accepts. refs: where the parts are, for a document that holds them elsewhere."""
    schema = Job.model_json_schema(schema_generator=_Published, ref_template=refs)
    limits = (
        f"What no schema can say: UTF-8 without byte order mark, at most {MAX_BYTES} bytes, nested at most {MAX_DEPTH}"
        f" deep, at most {MAX_INSURED_OF_JOB} insured in all quotes together, no key twice in one object, no integer of"
        " more than 64 digits, no number beyond those of a double, no half of a surrogate pair."
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


def data_schema(event_type: EventType) -> dict[str, Any]:
    """Of an event's ``data``: what its ``dataschema`` names."""
    schema: dict[str, Any] = envelope_schema(event_type)["properties"]["data"]
    return schema


def envelope_schema(event_type: EventType) -> dict[str, Any]:
    """Of a whole event of a type: CloudEvents 1.0 in structured mode."""
    schema = EVENT_MODELS[event_type].model_json_schema(schema_generator=_Published)
    inlined = _inlined(schema, schema.pop("$defs"))
    inlined["properties"]["data"] = {
        "$id": f"urn:confirm-offer:{event_type}:{VERSION}",
        **inlined["properties"]["data"],
    }
    return {"title": event_type.value, **inlined, "examples": [event_example(event_type)]}


def _inlined(schema: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """A schema with its parts in the places of the references to them, and its keywords in one order."""
    if "anyOf" in schema:  # a part or null
        part = _inlined(schema["anyOf"][0], parts)
        return {**part, "type": [part["type"], "null"]}
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    inlined: dict[str, Any] = {}
    for keyword in (*_KEYWORDS, *sorted(schema.keys() - {*_KEYWORDS, "title"})):
        if keyword == "properties" and keyword in schema:
            inlined[keyword] = {name: _inlined(field, parts) for name, field in schema[keyword].items()}
        elif keyword in schema:
            value = schema[keyword]
            inlined[keyword] = _inlined(value, parts) if isinstance(value, dict) else value
    return inlined


_KEYWORDS = ("const", "type", "description", "properties", "required", "minLength", "minimum")  # first, in this order


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
    """What is published of an answer of XONE, or of an error."""
    time = "2026-01-01T12:00:00.940000Z"
    status = "CONFIRMED" if event_type is EventType.BOOKING_CONFIRMED else "PENDING"
    policy = {
        "id": "7788bd4e-98dc-5884-91f4-5056a08f7792",
        "status": status,
        "policy_type": "event_ticket_protection",
        "policy_code": "ETP-01",
        "price": "80.62",
        "tax": "15.32",
        "policy_start_date": time,
        "policy_end_date": "2027-01-01T12:00:00.940000Z",
    }
    booking = {
        "id": "INS-QAN5YMZ3",
        "offer_id": "offer-1",
        "status": status,
        "currency": "EUR",
        "price": "80.62",
        "provider_reference": "PR-4465DFCCA4",
        "is_instant_booking": True,
        "created_at": time,
        "policies": [policy],
    }
    content = {
        EventType.CONFIRMATION_FAILED: error_data("http-422", 422, "XONE answered 422 Unprocessable Entity", 1),
        EventType.CONFIRMATION_NEEDS_REVIEW: error_data("timeout", None, "no whole answer within 30 s", 12),
    }.get(event_type) or booking_data(Booking.model_validate(booking), with_links=False)
    data = {
        "partner_id": "P-100",
        "offer_id": "offer-1",
        "order_reference": "SO-1001",
        "metadata": {"channel": "web"},
        "sequence": 1,
        **content,
    }
    event_id = UUID("01a206e5-4edb-748d-b71c-d6fee6687a37")
    decided_at = datetime(2026, 1, 1, 12, 0, 0, 944613, UTC)
    example: dict[str, Any] = json.loads(cloud_event(event_id, event_type, "P-100", "offer-1", decided_at, data))
    return example

"""Checks real messages against the published and the official schemas."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator, Draft202012Validator, FormatChecker
from jsonschema.protocols import Validator

from models.event import EventType
from worker.published.asyncapi import dead_letter_headers
from worker.published.json_schema import envelope_schema

_CLOUD_EVENT = Draft7Validator(json.loads((Path(__file__).parents[1] / "schemas" / "cloudevents.json").read_text()))
_DEAD_LETTER = Draft202012Validator(
    {**dead_letter_headers(), "additionalProperties": False}, format_checker=FormatChecker()
)


def problems_of_event(body: str | bytes) -> list[str]:
    """Where a published event violates its schema. A key that no schema describes is a problem too."""
    event = json.loads(body)
    if event.get("type") not in list(EventType):
        return [f"an event of type {event.get('type')!r}"]
    errors = [*_CLOUD_EVENT.iter_errors(event), *_event(event["type"]).iter_errors(event)]
    return [f"{error.json_path}: {error.message}" for error in errors]


def problems_of_dead_letter(headers: dict[str, Any]) -> list[str]:
    """Where the headers of a dead letter violate their schema."""
    headers = {name: value for name, value in headers.items() if name != "x-delivery-count"}  # of quorum queues
    lacking = {name for name in _DEAD_LETTER.schema["properties"] if name.startswith("x-")} - headers.keys()
    errors = [f"{error.json_path}: {error.message}" for error in _DEAD_LETTER.iter_errors(headers)]
    return errors + [f"no {name}" for name in sorted(lacking)]


@cache
def _event(event_type: str) -> Validator:
    return Draft202012Validator(_closed(envelope_schema(EventType(event_type))), format_checker=FormatChecker())


def _closed(schema: Any) -> Any:
    """The schema with unknown keys forbidden."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema and "type" in schema else {}
    return closed | {keyword: _closed(value) for keyword, value in schema.items()}

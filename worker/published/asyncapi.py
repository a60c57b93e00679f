"""The AsyncAPI document: all channels between this program and others, in one text for tools."""

from typing import TYPE_CHECKING, Any

from models.event import CONTENT_TYPE, EventType
from models.job import DEAD_LETTER_CODES
from worker.messaging.topology import JOBS, booking_events, confirm_offer, dead_letters_queue, unrouted_queue
from worker.published.json_schema import JOB_EXAMPLE, VERSION, envelope_schema, event_example, job_schema

if TYPE_CHECKING:
    from kombu import Exchange, Queue

BINDING = {"bindingVersion": "0.3.0"}
MESSAGE = {"amqp": {"contentEncoding": "utf-8", **BINDING}}
TRACEPARENT = {"type": "string", "description": "W3C Trace Context; the job's goes on into its events."}


def document() -> dict[str, Any]:
    """The document: AsyncAPI 3.0, which all its tools read, with the AMQP binding 0.3.0."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "confirm-offer",
            "version": f"{VERSION}.0.0",
            "description": "Confirms insurance offers with XONE: a job on a queue becomes a booking and an event.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "rabbitmq": {
                "host": "{host}:5672",
                "protocol": "amqp",
                "protocolVersion": "0-9-1",
                "description": "RabbitMQ 3.10 or later, as in BROKER_URL; with TLS, amqps and port 5671.",
                "variables": {"host": {"default": "localhost"}},
                "security": [{"type": "userPassword"}],
            }
        },
        "channels": {
            "jobs": {
                "address": JOBS,
                "title": "Jobs",
                "description": "Checkouts publish here. The queue of the same name is a quorum queue.",
                "messages": {"job": {"$ref": "#/components/messages/job"}},
                "bindings": {"amqp": _exchange(confirm_offer)},
            },
            "deadLetters": {
                "address": dead_letters_queue.name,
                "title": "Dead letters",
                "description": "Jobs that could not be accepted.",
                "messages": {"deadLetter": {"$ref": "#/components/messages/deadLetter"}},
                "bindings": {"amqp": _queue(dead_letters_queue)},
            },
            "bookingEvents": {
                "address": "{type}",
                "title": "Events",
                "description": "The routing key is the event's type. Each consumer binds a queue of its own.",
                "parameters": {"type": {"enum": [event_type.value for event_type in EventType]}},
                "messages": _refs("#/components/messages"),
                "bindings": {"amqp": _exchange(booking_events)},
            },
            "unroutedEvents": {
                "address": unrouted_queue.name,
                "title": "Events that nobody has bound a queue for",
                "description": "They are kept, in the order in which they came, until somebody takes them.",
                "messages": _refs("#/components/messages"),
                "bindings": {"amqp": _queue(unrouted_queue)},
            },
        },
        "operations": {
            "receiveJob": {
                "action": "receive",
                "channel": {"$ref": "#/channels/jobs"},
                "summary": "Takes a job. Publish it persistent and mandatory, and wait for the broker's confirm.",
                "description": "The same job again is harmless. Acknowledged once what became of it is stored.",
                "bindings": {"amqp": {"deliveryMode": 2, "mandatory": True, "ack": True, **BINDING}},
            },
            "sendDeadLetter": {
                "action": "send",
                "channel": {"$ref": "#/channels/deadLetters"},
                "summary": "Puts a job aside that can't be accepted, its body unchanged.",
                "bindings": {"amqp": _SENT},
            },
            "sendEvent": {
                "action": "send",
                "channel": {"$ref": "#/channels/bookingEvents"},
                "summary": "Tells what became of a confirmation, at least once, with the same id on every repeat.",
                "bindings": {"amqp": _SENT},
            },
            "keepUnroutedEvent": {
                "action": "send",
                "channel": {"$ref": "#/channels/unroutedEvents"},
                "summary": "RabbitMQ puts an event here that no queue is bound for.",
                "bindings": {"amqp": {"deliveryMode": 2, **BINDING}},
            },
        },
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


_SENT = {"deliveryMode": 2, "mandatory": True, **BINDING}


def _exchange(exchange: "Exchange") -> dict[str, Any]:
    kind = {"name": exchange.name, "type": exchange.type, "durable": exchange.durable, "autoDelete": False}
    return {"is": "routingKey", "exchange": kind, **BINDING}


def _queue(queue: "Queue") -> dict[str, Any]:
    kind = {"name": queue.name, "durable": queue.durable, "exclusive": False, "autoDelete": False}
    return {"is": "queue", "queue": kind, **BINDING}


def _name(event_type: EventType) -> str:
    """``bookingConfirmed``: code generators make names of these keys."""
    first, *others = event_type.replace("_", ".").split(".")
    return first + "".join(word.capitalize() for word in others)


def _refs(place: str) -> dict[str, Any]:
    return {_name(event_type): {"$ref": f"{place}/{_name(event_type)}"} for event_type in EventType}


def _messages() -> dict[str, Any]:
    return {
        "job": {
            "name": "job",
            "title": "Job",
            "summary": "One offer to be confirmed. Properties message_id and correlation_id are optional.",
            "headers": {"type": "object", "properties": {"traceparent": TRACEPARENT}},
            "payload": {"$ref": "#/components/schemas/Job"},
            "bindings": MESSAGE,
            "examples": [{"payload": JOB_EXAMPLE}],
        },
        "deadLetter": {
            "name": "deadLetter",
            "title": "Dead letter",
            "summary": "A job that could not be accepted: any bytes. Holds personal data.",
            "headers": {"$ref": "#/components/schemas/DeadLetterHeaders"},
            "bindings": MESSAGE,
        },
        **{
            _name(event_type): {
                "name": event_type.value,
                "title": event_type.value,
                "summary": envelope_schema(event_type)["description"],
                "description": "Property message_id is the event's id, correlation_id the job's.",
                "contentType": CONTENT_TYPE,
                "headers": {"type": "object", "properties": {"traceparent": TRACEPARENT}},
                "payload": {"$ref": f"#/components/schemas/{_name(event_type)}"},
                "bindings": {"amqp": {**MESSAGE["amqp"], "messageType": event_type.value}},
                "examples": [{"payload": event_example(event_type)}],
            }
            for event_type in EventType
        },
    }


def dead_letter_headers() -> dict[str, Any]:
    """The headers that this program writes. Dead letters of RabbitMQ itself have its ``x-death`` instead."""
    return {
        "type": "object",
        "description": "Letters that RabbitMQ itself gave up bear its x-death in place of these.",
        "properties": {
            "x-dead-letter-code": {"type": "string", "description": "Why.", "enum": list(DEAD_LETTER_CODES)},
            "x-dead-letter-detail": {
                "type": "string",
                "description": "What is wrong and where. Holds no value of the job.",
            },
            "x-dead-letter-at": {"type": "string", "description": "When.", "format": "date-time"},
            "traceparent": TRACEPARENT,
        },
    }


def _schemas() -> dict[str, Any]:
    """In AsyncAPI's dialect, a superset of draft 07: these schemas mean the same in it without their ids."""
    job = job_schema(refs="#/components/schemas/{model}")
    parts = job.pop("$defs")
    return {
        "Job": _without_ids(job),
        **parts,
        "DeadLetterHeaders": dead_letter_headers(),
        **{_name(event_type): _without_ids(envelope_schema(event_type)) for event_type in EventType},
    }


def _without_ids(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        keyword: _without_ids(value) if isinstance(value, dict) else value
        for keyword, value in schema.items()
        if keyword not in ("$id", "$schema")
    }

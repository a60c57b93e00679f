"""Published messages, exchanges and queues are as the AsyncAPI document says. System checks each event."""

from typing import Any

import pytest
from amqp.exceptions import PreconditionFailed
from kombu import Exchange, Queue

from models.event import EventType
from tests.support.messages import problems_of_dead_letter, problems_of_event
from tests.support.system import System, job, until
from worker.messaging import topology
from worker.published.asyncapi import document

LINKS = {"coi", "account_url", "fnol_link", "sign_up_url"}
TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


def test_each_message_of_a_real_run_fits_the_document(system: System) -> None:
    settings = {"EVENT_LINKS": "on", "XONE_AFTER_UNKNOWN": "review", "XONE_BOOKINGS_PATH": ""}
    offers = ["offer-1", "offer-2~pending", "offer-3~http-422", "offer-4~drop-after", "offer-5~failed-payment"]
    system.publish([*map(job, offers), b"{"], correlation_id="C-1", headers={"traceparent": TRACE})
    system.start_worker(**settings)

    events = system.until_events(5)

    at_once = set(EventType) - {EventType.BOOKING_UPDATED}  # which comes by a follow-up only
    assert {event["type"] for event in events} == at_once
    assert {event["type"] for event in events if event["data"].get("booking", {}).keys() >= LINKS} == {
        "booking.confirmed",
        "booking.pending",
        "booking.cancelled",
    }
    described = {message["name"]: message for message in document()["components"]["messages"].values()}
    for message in system.event_messages:
        description = described[message.properties["type"]]
        assert message.delivery_info["routing_key"] == description["bindings"]["amqp"]["messageType"]
        assert message.content_type == description["contentType"]
        assert message.content_encoding == description["bindings"]["amqp"]["contentEncoding"]
        assert message.headers.keys() == description["headers"]["properties"].keys()
        assert message.properties["correlation_id"] == "C-1"
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)
    (dead_letter,) = system.drain(topology.DEAD_LETTERS)
    assert problems_of_dead_letter(dead_letter.headers) == []
    assert dead_letter.headers["traceparent"] == TRACE


def test_an_event_without_a_bound_queue_is_kept_where_the_document_says(system: System) -> None:
    system.events_queue(system.connection.channel()).delete()
    system.publish([job("offer-1")])
    system.start_worker()
    address = document()["channels"]["unroutedEvents"]["address"]

    until(lambda: system.queue_length(address) == 1)

    (message,) = system.drain(address)
    assert problems_of_event(message.body) == []
    assert message.delivery_info["routing_key"] == "booking.confirmed"


@pytest.mark.parametrize("channel", document()["channels"].values(), ids=document()["channels"].keys())
def test_exchanges_and_queues_are_as_the_document_says(channel: dict[str, Any], system: System) -> None:
    """RabbitMQ refuses to declare an existing one with other properties."""
    description = channel["bindings"]["amqp"]
    arguments = {entity.name: getattr(entity, "arguments", None) for entity in topology.EXCHANGES}
    arguments |= {queue.name: queue.queue_arguments for queue in topology.QUEUES}

    declare(description, arguments, system)

    for part in ("exchange", "queue"):
        if part in description:
            other = {**description, part: {**description[part], "durable": False}}
            with pytest.raises(PreconditionFailed):
                declare(other, arguments, system)


def declare(description: dict[str, Any], arguments: dict[str, Any], system: System) -> None:
    channel = system.connection.channel()
    if description["is"] == "queue":
        properties = description["queue"]
        Queue(
            properties["name"],
            durable=properties["durable"],
            exclusive=properties["exclusive"],
            auto_delete=properties["autoDelete"],
            queue_arguments=arguments[properties["name"]],
        )(channel).queue_declare()
    else:
        properties = description["exchange"]
        Exchange(
            properties["name"],
            type=properties["type"],
            durable=properties["durable"],
            auto_delete=properties["autoDelete"],
            arguments=arguments[properties["name"]],
        )(channel).declare()

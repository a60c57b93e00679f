"""What a worker publishes, and the broker's parts, are as the AsyncAPI document says. System checks each event."""

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


def test_each_kind_of_message_of_a_real_run(system: System) -> None:
    settings = {"EVENT_LINKS": "on", "XONE_AFTER_UNKNOWN": "review", "XONE_BOOKINGS_PATH": ""}
    offers = ["offer-1", "offer-2~pending", "offer-3~http-422", "offer-4~drop-after"]
    system.publish([*map(job, offers), b"{"], correlation_id="C-1", headers={"traceparent": TRACE})
    system.start_worker(**settings)

    events = system.until_events(4)

    assert {event["type"] for event in events} == {event_type.value for event_type in EventType}
    assert {event["type"] for event in events if event["data"].get("booking", {}).keys() >= LINKS} == {
        "booking.confirmed",
        "booking.pending",
    }
    described = {message["name"]: message for message in document()["components"]["messages"].values()}
    for message in system.event_messages:
        says = described[message.properties["type"]]
        assert message.delivery_info["routing_key"] == says["bindings"]["amqp"]["messageType"]
        assert message.content_type == says["contentType"]
        assert message.content_encoding == says["bindings"]["amqp"]["contentEncoding"]
        assert message.headers.keys() == says["headers"]["properties"].keys()
        assert message.properties["correlation_id"] == "C-1"
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)
    (letter,) = system.drain(topology.DEAD_LETTERS)
    assert problems_of_dead_letter(letter.headers) == []
    assert letter.headers["traceparent"] == TRACE


def test_an_event_that_nobody_is_bound_for_is_kept_where_the_document_says(system: System) -> None:
    system.events_queue(system.connection.channel()).delete()
    system.publish([job("offer-1")])
    system.start_worker()
    kept = document()["channels"]["unroutedEvents"]["address"]

    until(lambda: system.queue_length(kept) == 1)

    (message,) = system.drain(kept)
    assert problems_of_event(message.body) == []
    assert message.delivery_info["routing_key"] == "booking.confirmed"


@pytest.mark.parametrize("channel", document()["channels"].values(), ids=document()["channels"].keys())
def test_exchanges_and_queues_are_what_the_document_says(channel: dict[str, Any], system: System) -> None:
    """RabbitMQ refuses to declare one that stands with other properties."""
    says = channel["bindings"]["amqp"]
    arguments = {entity.name: getattr(entity, "arguments", None) for entity in topology.EXCHANGES}
    arguments |= {queue.name: queue.queue_arguments for queue in topology.QUEUES}

    declared(says, arguments, system)

    for part in ("exchange", "queue"):
        if part in says:
            other = {**says, part: {**says[part], "durable": False}}
            with pytest.raises(PreconditionFailed):
                declared(other, arguments, system)


def declared(says: dict[str, Any], arguments: dict[str, Any], system: System) -> None:
    channel = system.connection.channel()
    if says["is"] == "queue":
        kind = says["queue"]
        Queue(
            kind["name"],
            durable=kind["durable"],
            exclusive=kind["exclusive"],
            auto_delete=kind["autoDelete"],
            queue_arguments=arguments[kind["name"]],
        )(channel).queue_declare()
    else:
        kind = says["exchange"]
        Exchange(
            kind["name"],
            type=kind["type"],
            durable=kind["durable"],
            auto_delete=kind["autoDelete"],
            arguments=arguments[kind["name"]],
        )(channel).declare()

"""Stored events are replayed: the same messages, in order, and nothing else changes."""

import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select
from uuid_utils.compat import uuid7

from models.event import EventType, cloud_event
from models.states import State
from models.tables import AuditEntry, Confirmation, OutboxEvent
from tests.support.commands import run
from tests.support.system import System
from worker.messaging.publisher import Publisher
from worker.published.json_schema import event_example
from worker.services.outbox_relay import message_of

pytestmark = pytest.mark.slow

BEGAN = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def store_events(system: System, confirmations: int, events_each: int) -> None:
    """Stores confirmations whose events are published, except the last one. They are a second apart.

    The clock was set back before the last but one event: its time is before the times of the others.
    """
    confirmation_rows, event_rows = [], []
    for number in range(confirmations):
        confirmation_id, offer_id = uuid7(), f"offer-{number}"
        confirmation_rows.append(
            {
                "id": confirmation_id, "partner_id": "P-100", "offer_id": offer_id, "echo": {},
                "idempotency_key": uuid7(), "state": State.CONFIRMED, "queued_at": BEGAN, "created_at": BEGAN,
                "updated_at": BEGAN,
            }
        )  # fmt: skip
        for sequence in range(1, events_each + 1):
            kind = EventType.BOOKING_PENDING if sequence % 2 else EventType.BOOKING_CONFIRMED
            at = BEGAN + timedelta(seconds=-5 if sequence == events_each - 1 else sequence)
            event_id = uuid7(nanoseconds=int(at.timestamp() * 1e9))  # as a worker of that time would have made it
            event_rows.append(
                {
                    "id": event_id, "aggregatetype": "confirmation", "aggregateid": f"P-100/{offer_id}", "type": kind,
                    "payload": cloud_event(
                        event_id, kind, "P-100", offer_id, at, event_example(kind)["data"] | {"sequence": sequence}
                    ),
                    "confirmation_id": confirmation_id, "sequence": sequence, "correlation_id": f"C-{number}",
                    "created_at": at, "published_at": at if sequence < events_each else None,
                }
            )  # fmt: skip
    with system.engine.begin() as connection:
        connection.execute(insert(Confirmation), confirmation_rows)
        connection.execute(insert(OutboxEvent), event_rows)


def settings(system: System) -> dict[str, str]:
    return {"BROKER_URL": system.broker_url, "DATABASE_URL": system.database_url}


def snapshot(system: System) -> list[Any]:
    with system.engine.connect() as connection:
        return list(connection.execute(select(OutboxEvent.__table__).order_by(OutboxEvent.id)).all())


def message_id(message: Any) -> str:
    return str(message.properties["message_id"])


def test_the_same_messages_are_replayed_in_order_and_nothing_else_changes(system: System) -> None:
    store_events(system, confirmations=300, events_each=4)
    before = snapshot(system)
    published = [event for event in before if event.published_at is not None]
    with Publisher(system.broker_url) as publisher:
        publisher.publish(map(message_of, published))
    first = system.drain()

    done = run("events", "replay", "--since", "2026-01-31T00:00Z", "--yes", **settings(system))

    assert (done.returncode, done.stdout, done.stderr) == (0, "900 events replayed\n", "")
    again = system.drain()
    for message, repeat in zip(sorted(first, key=message_id), sorted(again, key=message_id), strict=True):
        assert (message.body, message.properties) == (repeat.body, repeat.properties)
        assert message.delivery_info["routing_key"] == repeat.delivery_info["routing_key"]
    sequences: defaultdict[str, list[int]] = defaultdict(list)
    for message in again:
        event = json.loads(message.body)
        sequences[event["subject"]].append(event["data"]["sequence"])
    assert set(map(tuple, sequences.values())) == {(1, 2, 3)}
    assert snapshot(system) == before
    with system.engine.connect() as connection:
        (row,) = connection.execute(select(AuditEntry.__table__)).all()
    assert (row.command, row.count, row.details["since"]) == ("events replay", 900, "2026-01-31T00:00:00.000000Z")


def test_only_selected_events_are_replayed_at_the_given_rate(system: System) -> None:
    store_events(system, confirmations=20, events_each=4)
    options = ["--until", "2026-01-31T12:00:03Z", "--type", "booking.pending", "--rate", "20"]

    started = datetime.now(UTC)
    done = run("events", "replay", "--since", "2026-01-31T12:00Z", *options, "--yes", "--json", **settings(system))
    duration = datetime.now(UTC) - started
    of_offer = run(
        "events", "replay", "--since", "2026-01-31T11:00Z", "--offer", "offer-7", "--yes", **settings(system)
    )

    assert json.loads(done.stdout) == {"replayed": 20, "left": 0}
    assert duration > timedelta(seconds=18 / 20)
    assert of_offer.stdout == "3 events replayed\n"
    events = [json.loads(message.body) for message in system.drain()]
    assert {(event["type"], event["data"]["sequence"]) for event in events[:20]} == {("booking.pending", 1)}
    assert [(event["subject"], event["data"]["sequence"]) for event in events[20:]] == [
        ("P-100/offer-7", sequence) for sequence in (1, 2, 3)
    ]


def test_without_database_exchange_or_confirmation_nothing_is_replayed(system: System) -> None:
    store_events(system, confirmations=1, events_each=2)
    since = ("events", "replay", "--since", "2026-01-31T00:00Z")

    unconfirmed = run(*since, **settings(system))
    without_database = run(
        *since, "--yes", BROKER_URL=system.broker_url, DATABASE_URL="postgresql+psycopg://127.0.0.1:1/x"
    )
    without_events = run("events", "replay", "--since", "2030-01-01", "--json", **settings(system))
    channel = system.connection.channel()
    channel.exchange_delete("booking-events")
    undeclared = run(*since, "--yes", **settings(system))

    assert (unconfirmed.returncode, "add --yes" in unconfirmed.stderr) == (2, True)
    assert (without_database.returncode, "database x: can't be reached" in without_database.stderr) == (1, True)
    assert (without_events.returncode, json.loads(without_events.stdout)) == (0, {"replayed": 0, "left": 0})
    assert (undeclared.returncode, "run 'confirm-offer broker declare'" in undeclared.stderr) == (1, True)
    assert system.drain() == []

"""``confirm-offer events replay``: publishes stored events again."""

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import click
from sqlalchemy import Row

from models.event import EventType
from models.exact_json import moment
from tasks.operations import lookup
from tasks.operations.audit import Tally
from tasks.operations.deletion import memory_begins
from tasks.operations.event_replay import EventSelection, clock, count, pages
from worker.cli.ui.console import (
    Failed,
    ask,
    by_option,
    handle_errors,
    json_option,
    print_error,
    print_json,
    print_note,
    print_result,
    progress,
    reason_option,
)
from worker.cli.ui.number_param import Rate
from worker.cli.ui.time_param import MOMENT
from worker.formatting import local_time, pluralize
from worker.messaging.publisher import Publisher
from worker.settings import BrokerSettings, DatabaseSettings, read
from worker.storage import database

STEP = 0.1  # seconds between two publishes, with --rate


@click.group()
def events() -> None:
    """The events that consumers get."""


@events.command(short_help="Shows a stored event.")
@click.argument("event_id", metavar="ID", type=click.UUID)
@json_option
@handle_errors
def show(event_id: UUID, as_json: bool) -> None:
    """Shows a stored event by its id, and when it was published. Customers' links are left out: show --reveal has them.

    Example: confirm-offer events show 0190c8a1-7c1e-7d3a-9c57-2f1f6a1b2c3d
    """
    with database.connect(read(DatabaseSettings).url).connect() as connection:
        found = lookup.stored_event(connection, event_id)
    if found is None:
        raise Failed(f"no event has the id {event_id}")
    content = {"event": found.content, "published_at": moment(found.published_at) if found.published_at else None}
    if as_json:
        return print_json(content)
    print_json(found.content)
    published = f"published {local_time(found.published_at)}" if found.published_at else "not published yet"
    return print_note(published)


@events.command(short_help="Publishes stored events again, with the ids they had.")
@click.option("--since", type=MOMENT, required=True, help="Written at or after: 2026-01-31T14:00 (local), or 2h, 7d.")
@click.option("--until", type=MOMENT, help="Written before; now by default.")
@click.option(
    "--type",
    "event_type",
    type=click.Choice([kind.value for kind in EventType]),
    metavar="TYPE",
    help="Only this type, such as booking.confirmed.",
)
@click.option("--offer", help="Only those of this offer.")
@click.option("--rate", type=Rate(0.1), help="Events a second, at most.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reason_option
@by_option
@json_option
@handle_errors
def replay(
    since: datetime,
    until: datetime | None,
    event_type: str | None,
    offer: str | None,
    rate: float | None,
    yes: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    """Publishes stored events again, with the ids and bytes they had, those of a confirmation in their order.

    They go to all consumers; a consumer that has an event already recognizes its id. Events that were never published
    are left to the worker. If events were deleted, this says where the memory begins.

    Example: confirm-offer events replay --since 2h --type booking.confirmed --rate 100
    """
    from worker.services.outbox_relay import message_of  # its imports are heavy: --help should not need them

    url, engine = read(BrokerSettings).url, database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        at = clock(connection)
        selection = EventSelection(since, min(until or at, at), EventType(event_type) if event_type else None, offer)
        total = count(connection, selection)
        begins = memory_begins(connection)
    if begins is not None and since < begins:
        print_note(f"events from before {local_time(begins)} have been deleted: see DELETE_EVENTS_AFTER_DAYS")
    memory = {"memory_begins": moment(begins)} if begins is not None else {}
    if not total:
        return print_result(as_json, "no such events", replayed=0, left=0, **memory)
    span = f"{local_time(selection.since)} to {local_time(selection.until)}"
    ask(f"{pluralize(total, 'event')}, {span}.\nPublish again, to all consumers?", yes)
    facts: dict[str, Any] = {
        "since": moment(selection.since),
        "until": moment(selection.until),
        "type": event_type,
        "offer": offer,
        "rate": rate,
    }
    replayed = 0
    with Tally(engine, "events replay", reason, **facts) as tally, Publisher(url) as publisher, progress() as bar:
        task = bar.add_task("replaying", total=total)
        try:
            for batch in _paced(pages(engine, selection), rate):
                taken = len(publisher.publish(message_of(event) for event in batch))
                replayed += taken
                tally.add(taken)
                bar.advance(task, taken)
                if taken < len(batch):
                    break
        except KeyboardInterrupt:
            raise Failed(f"interrupted: {replayed:,} of {pluralize(total, 'event')} replayed") from None
    left = total - replayed
    print_result(
        as_json,
        f"{pluralize(replayed, 'event')} replayed" + (f", {left:,} not" if left else ""),
        replayed=replayed,
        left=left,
        **memory,
    )
    if left:
        print_error("the broker did not take all of them; replaying them again is harmless")
        sys.exit(1)
    return None


def _paced(event_pages: Iterator[Sequence[Row[Any]]], rate: float | None) -> Iterator[Sequence[Row[Any]]]:
    """The events in batches. rate: at most so many events a second, None for no limit."""
    if rate is None:
        yield from event_pages
        return
    size, started_at, yielded = max(1, int(rate * STEP)), time.monotonic(), 0
    for page in event_pages:
        for start in range(0, len(page), size):
            batch = page[start : start + size]
            time.sleep(max(0.0, started_at + yielded / rate - time.monotonic()))
            yielded += len(batch)
            yield batch

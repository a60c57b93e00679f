"""The outbox relay publishes events in order and at least once, whatever happens to the broker."""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from kombu import Connection, Queue
from sqlalchemy import insert, select, update

from models.states import State
from models.tables import Confirmation, OutboxEvent
from tests.support.servers import RabbitMQ
from tests.support.stored import insert_confirmation
from worker.errors import BadCredentials
from worker.messaging import broker, topology
from worker.runtime import Runtime
from worker.services.outbox_relay import BATCH, OutboxRelay, refused_backoff
from worker.services.scheduler import Scheduler
from worker.storage.database import now_plus, seconds_since


@pytest.fixture
def runtime(broker_url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """Uses RabbitMQ instead of the in-memory broker."""
    monkeypatch.setenv("BROKER_URL", broker_url)
    return runtime


@pytest.fixture
def connection(broker_url: str) -> Iterator[Connection]:
    with broker.connect(broker_url) as connection:
        Queue("test.events", topology.booking_events, "#", durable=True)(connection.channel()).declare()
        yield connection


def confirmation(runtime: Runtime, **values: object) -> UUID:
    return insert_confirmation(runtime.engine, **values)


def write(
    runtime: Runtime, confirmation_id: UUID, sequence: int, event_type: str = "booking.confirmed", size: int = 0
) -> None:
    event_id = uuid4()
    with runtime.engine.begin() as connection:
        connection.execute(
            insert(OutboxEvent).values(
                id=event_id,
                aggregatetype="confirmation",
                aggregateid=f"P-100/{confirmation_id}",
                type=event_type,
                payload=json.dumps(
                    {"id": str(event_id), "of": str(confirmation_id), "sequence": sequence, "x": "x" * size}
                ),
                confirmation_id=confirmation_id,
                sequence=sequence,
                created_at=datetime.now(UTC),
            )
        )


def published(runtime: Runtime) -> int:
    with runtime.engine.connect() as connection:
        return len(connection.execute(select(OutboxEvent.id).where(OutboxEvent.published_at.is_not(None))).all())


def run_once(scheduler: Scheduler) -> None:
    scheduler.run_once()
    scheduler.close()


def received(connection: Connection, queue: str = "test.events") -> list[dict[str, object]]:
    channel = connection.channel()
    messages = []
    while message := channel.basic_get(queue, no_ack=True):
        messages.append(json.loads(message.body))
    return messages


def test_events_of_one_confirmation_keep_their_order(runtime: Runtime, connection: Connection) -> None:
    for confirmation_id in [confirmation(runtime) for _ in range(5)]:
        for sequence in (3, 1, 2):
            write(runtime, confirmation_id, sequence)

    OutboxRelay(runtime).flush()

    events = received(connection)
    assert len(events) == 15
    for of in {event["of"] for event in events}:
        assert [event["sequence"] for event in events if event["of"] == of] == [1, 2, 3]


def test_two_relays_publish_each_event_once(runtime: Runtime, connection: Connection) -> None:
    for confirmation_id in [confirmation(runtime) for _ in range(300)]:
        write(runtime, confirmation_id, 1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda relay: relay.flush(), [OutboxRelay(runtime), OutboxRelay(runtime)]))

    events = received(connection)
    assert len(events) == len({event["id"] for event in events}) == 300
    assert published(runtime) == 300


def test_a_stopping_worker_publishes_for_a_limited_time(runtime: Runtime, connection: Connection) -> None:
    for confirmation_id in [confirmation(runtime) for _ in range(BATCH + 1)]:
        write(runtime, confirmation_id, 1)

    OutboxRelay(runtime).flush(seconds=0.0)

    assert published(runtime) == BATCH


def test_a_refused_event_does_not_block_others(runtime: Runtime, connection: Connection) -> None:
    full_queue(connection, "booking-events", "booking.pending")
    blocked, free = confirmation(runtime), confirmation(runtime)
    write(runtime, blocked, 1, "booking.pending")
    write(runtime, blocked, 2)
    write(runtime, free, 1)

    OutboxRelay(runtime).flush()

    assert [event["of"] for event in received(connection) if event["of"] == str(free)] == [str(free)]
    assert published(runtime) == 1


def test_an_event_that_closes_the_channel_does_not_block_the_others(
    runtime: Runtime, connection: Connection, rabbitmq: RabbitMQ
) -> None:
    """When the broker takes large messages, the one at fault goes out, too."""
    ids = [confirmation(runtime) for _ in range(40)]
    for id_ in ids:
        write(runtime, id_, 1, size=5000 if id_ == ids[17] else 0)
    with rabbitmq.max_message_size(1000):
        OutboxRelay(runtime).flush()

    assert published(runtime) == 39
    assert {event["of"] for event in received(connection)} == {str(id_) for id_ in ids} - {str(ids[17])}

    with runtime.engine.begin() as database:
        database.execute(update(OutboxEvent).values(claimed_until=None))
    OutboxRelay(runtime).flush()

    assert [event["of"] for event in received(connection)] == [str(ids[17])]


def full_queue(connection: Connection, exchange: str, routing_key: str) -> None:
    """A queue that refuses each message, as one without a leader does."""
    channel = connection.channel()
    limits = {"x-max-length": 0, "x-overflow": "reject-publish"}
    channel.queue_declare("full", durable=True, auto_delete=False, arguments=limits)
    channel.queue_bind("full", exchange, routing_key)


@pytest.mark.parametrize(
    ("number", "age", "wait"), [(1, 0, 1), (1, 86400, 1), (2, 60, 2), (6, 86400, 32), (9, 100, 100), (99, 86400, 960)]
)
def test_what_is_refused_again_and_again_waits_longer_but_not_longer_than_its_age(
    number: int, age: float, wait: float
) -> None:
    assert refused_backoff(number, age) == wait


def test_what_is_refused_is_soon_tried_on_another_channel_and_told_once(
    runtime: Runtime, connection: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    """A channel that met a queue without a leader may be refused for ever, and an election takes half a second."""
    full_queue(connection, "booking-events", "booking.pending")
    write(runtime, confirmation(runtime), 1, "booking.pending")
    relay, waits, channels = OutboxRelay(runtime), [], []
    open_channel = relay._publisher._open
    relay._publisher._open = lambda: channels.append(open_channel()) or channels[-1]  # type: ignore[method-assign]
    for _ in range(4):
        with runtime.engine.begin() as database:
            database.execute(update(OutboxEvent).values(created_at=now_plus(-86400), claimed_until=None))
        assert relay.run_once() is False, "then the next batch can wait"
        with runtime.engine.connect() as database:
            waits.append(-database.execute(select(seconds_since(OutboxEvent.claimed_until))).scalar_one())
    refusals = capsys.readouterr()
    assert (refusals.out + refusals.err).count("events_refused") == 1
    assert waits == [pytest.approx(wait, abs=0.9) for wait in (1, 2, 4, 8)]
    assert len({id(channel) for channel in channels}) == 4, "kept alive by the list: each id is another channel"

    connection.channel().queue_delete("full")
    with runtime.engine.begin() as database:
        database.execute(update(OutboxEvent).values(claimed_until=None))
    assert relay.run_once() is True
    assert published(runtime) == 1
    relay.close()


def test_a_scheduler_whose_messages_are_refused_pauses_and_is_not_well(
    runtime: Runtime, connection: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = connection.channel()
    channel.queue_unbind(topology.RESUME, topology.confirm_offer.name, topology.RESUME)
    full_queue(connection, topology.confirm_offer.name, topology.RESUME)
    due = confirmation(runtime, state=State.RETRYING, due_at=now_plus(-1.0))
    scheduler = Scheduler(runtime)

    pauses = [scheduler._run_guarded() for _ in range(3)]

    assert pauses == [1.0, 2.0, 4.0]
    assert scheduler.waits_for == "broker"
    assert scheduler.succeeded_at == 0.0
    told = capsys.readouterr()
    assert (told.out + told.err).count("refused by a queue, which is full or has no leader") == 1
    with runtime.engine.connect() as database:
        assert database.execute(select(Confirmation.dispatched_until)).scalar_one() is None, "it stays due"

    channel.queue_unbind("full", topology.confirm_offer.name, topology.RESUME)
    channel.queue_bind(topology.RESUME, topology.confirm_offer.name, topology.RESUME)
    assert scheduler._run_guarded() == scheduler.interval
    assert channel.basic_get(topology.RESUME, no_ack=True).body in (str(due), str(due).encode())
    scheduler.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # Kombu gives up after 4 s
def test_an_outage_of_the_broker_loses_no_event(runtime: Runtime, connection: Connection) -> None:
    write(runtime, confirmation(runtime), 1)
    relay = OutboxRelay(runtime)
    relay._publisher._url = "amqp://guest:guest@127.0.0.1:1//"
    with pytest.raises(OSError):  # noqa: PT011
        relay.run_once()

    OutboxRelay(runtime).flush()

    assert len(received(connection)) == 1


def test_another_relay_publishes_the_events_of_a_dead_one(runtime: Runtime, connection: Connection) -> None:
    write(runtime, confirmation(runtime), 1)
    assert len(OutboxRelay(runtime)._take()) == 1, "this relay dies now"
    OutboxRelay(runtime).flush()
    assert received(connection) == [], "the lease of the dead relay has not expired"

    with runtime.engine.begin() as database:
        database.execute(update(OutboxEvent).values(claimed_until=now_plus(-1.0)))
    OutboxRelay(runtime).flush()

    assert len(received(connection)) == 1


def test_two_schedulers_dispatch_each_due_confirmation_once(runtime: Runtime, connection: Connection) -> None:
    due = {str(confirmation(runtime, state=State.RETRYING, due_at=now_plus(-1.0))) for _ in range(50)}
    confirmation(runtime, state=State.RETRYING, due_at=now_plus(60.0))
    confirmation(runtime, state=State.FAILED)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_once, [Scheduler(runtime), Scheduler(runtime)]))

    channel = connection.channel()
    sent = []
    while message := channel.basic_get(topology.RESUME, no_ack=True):
        sent.append(message.body.decode() if isinstance(message.body, bytes) else message.body)
    assert sorted(sent) == sorted(due)


def test_the_scheduler_dispatches_a_bounded_number(runtime: Runtime, connection: Connection) -> None:
    for _ in range(200):
        confirmation(runtime, state=State.RETRYING, due_at=now_plus(-1.0))
    scheduler = Scheduler(runtime)
    for _ in range(3):
        run_once(scheduler)

    channel = connection.channel()
    assert (
        channel.queue_declare(topology.RESUME, passive=True).message_count
        == 2 * runtime.worker_settings.WORKER_CONCURRENCY
    )


def test_a_partner_with_few_confirmations_does_not_wait_for_one_with_many(
    runtime: Runtime, connection: Connection
) -> None:
    for _ in range(150):
        confirmation(runtime, partner_id="P-many", state=State.RETRYING, due_at=now_plus(-60.0))
    few_ids = {confirmation(runtime, partner_id="P-few", state=State.RETRYING, due_at=now_plus(-1.0)) for _ in range(3)}

    run_once(Scheduler(runtime))

    with runtime.engine.connect() as database:
        sent = database.execute(select(Confirmation.id).where(Confirmation.dispatched_until.is_not(None))).scalars()
        assert few_ids < set(sent)


@pytest.mark.parametrize("breaker_state", ["open", "half-open"])
def test_the_scheduler_dispatches_none_to_an_open_breaker_and_one_to_a_half_open_one(
    runtime: Runtime, connection: Connection, breaker_state: str
) -> None:
    for _ in range(5):
        confirmation(runtime, state=State.RETRYING, due_at=now_plus(-1.0))
    circuit_breaker = runtime.xone.calls.circuit_breaker
    with contextlib.suppress(BadCredentials), circuit_breaker.guard():
        raise BadCredentials("credentials", "test", 401)
    if breaker_state == "half-open":
        circuit_breaker._probe_at = 0.0

    run_once(Scheduler(runtime))

    channel = connection.channel()
    sent = channel.queue_declare(topology.RESUME, passive=True).message_count
    assert sent == (1 if breaker_state == "half-open" else 0)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # Kombu gives up after 4 s
def test_a_scheduler_without_a_broker_marks_nothing_as_dispatched(runtime: Runtime, connection: Connection) -> None:
    confirmation(runtime, state=State.RETRYING, due_at=now_plus(-1.0))
    scheduler = Scheduler(runtime)
    scheduler._publisher._url = "amqp://guest:guest@127.0.0.1:1//"

    with pytest.raises(OSError):  # noqa: PT011
        run_once(scheduler)

    with runtime.engine.connect() as database:
        assert database.execute(select(Confirmation.dispatched_until)).scalar_one() is None

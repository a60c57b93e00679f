"""Exchanges and queues: names, properties, declaration.

               confirm-offer (direct)                                booking-events (topic)
checkout ──▶ confirm-offer.jobs ──▶ queue confirm-offer.jobs           ├─▶ consumers' own queues
Scheduler ─▶ confirm-offer.resume ─▶ queue confirm-offer.resume        └─▶ booking-events.unrouted, where
worker ────▶ confirm-offer.dead-letters ─▶ queue of that name              no queue is bound
"""

from amqp.exceptions import AccessRefused, PreconditionFailed
from kombu import Connection, Exchange, Queue

from worker.errors import BrokerError
from worker.messaging import broker

JOBS = "confirm-offer.jobs"
RESUME = "confirm-offer.resume"
DEAD_LETTERS = "confirm-offer.dead-letters"

DECLARE_TIMEOUT = 15.0  # seconds

DELIVERY_LIMIT = 60  # above MAX_DELIVERIES of the task, which acts first; RabbitMQ 4 has 20 by default, 3.x none

# Bytes. RabbitMQ's max_message_size should be that: no job and no event is larger. By default it takes 16 to 128 MiB.
MAX_MESSAGE_SIZE = 4 * 1024 * 1024

confirm_offer = Exchange("confirm-offer", type="direct", durable=True)
unrouted = Exchange("booking-events.unrouted", type="fanout", durable=True)
booking_events = Exchange("booking-events", type="topic", durable=True, arguments={"alternate-exchange": unrouted.name})

_QUORUM = {"x-queue-type": "quorum"}
_DEAD_LETTERING = {
    **_QUORUM,
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": confirm_offer.name,
    "x-dead-letter-routing-key": DEAD_LETTERS,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
# Listing the letters delivers and requeues them, and each delivery counts. RabbitMQ 4 drops them after 20 by default.
_UNLIMITED_DELIVERIES = {**_QUORUM, "x-delivery-limit": 2**31 - 1}

dead_letters_queue = Queue(DEAD_LETTERS, confirm_offer, routing_key=DEAD_LETTERS, queue_arguments=_UNLIMITED_DELIVERIES)
jobs_queue = Queue(JOBS, confirm_offer, routing_key=JOBS, queue_arguments=_DEAD_LETTERING)
resume_queue = Queue(RESUME, confirm_offer, routing_key=RESUME, queue_arguments=_DEAD_LETTERING)
unrouted_queue = Queue("booking-events.unrouted", unrouted, routing_key="", queue_arguments=_QUORUM)

EXCHANGES = (confirm_offer, unrouted, booking_events)
QUEUES = (dead_letters_queue, jobs_queue, resume_queue, unrouted_queue)


def declare(connection: Connection) -> list[str]:
    """Declares all exchanges, queues and bindings. Existing ones are left as they are.

    Returns kind and name of each. Raises BrokerError where one exists with other properties, or the user lacks a right,
    and the connection's error where that takes more than DECLARE_TIMEOUT seconds.
    """
    with broker.answering_within(DECLARE_TIMEOUT, connection):
        _declare(connection)
    return [f"{_kind(entity)} {entity.name}" for entity in (*EXCHANGES, *QUEUES)]


def _declare(connection: Connection) -> None:
    channel = connection.channel()
    try:
        for entity in (*EXCHANGES, *QUEUES):
            try:
                entity(channel).declare()
            except PreconditionFailed as error:
                raise BrokerError(_mismatch(entity, error)) from None
            except AccessRefused as error:
                raise BrokerError(f"{error.reply_text}; see docs/rabbitmq-permissions.md") from None
    finally:
        if connection.connected:
            channel.close()


def events_queue(name: str, event_type: str = "#") -> Queue:
    """A consumer's queue for the events of a type, by default of all types. It is not declared yet."""
    return Queue(name, booking_events, routing_key=event_type)


def _kind(entity: Exchange | Queue) -> str:
    return "queue" if isinstance(entity, Queue) else "exchange"


def _mismatch(entity: Exchange | Queue, error: PreconditionFailed) -> str:
    return (
        f"{_kind(entity)} {entity.name} exists with other properties than this program needs ({error.reply_text}). "
        f"Let it run empty, delete it, and run 'confirm-offer broker declare' again"
    )

"""The broker: names of exchanges and queues, their declaration, and publishing with confirms.

               confirm-offer (direct)                                booking-events (topic)
checkout ──▶ confirm-offer.jobs ──▶ queue confirm-offer.jobs           ├─▶ consumers' own queues
Scheduler ─▶ confirm-offer.resume ─▶ queue confirm-offer.resume        └─▶ booking-events.unrouted, where
worker ────▶ confirm-offer.dead-letters ─▶ queue of that name              nobody has bound a queue
"""

from amqp.exceptions import AccessRefused, PreconditionFailed
from kombu import Connection, Exchange, Queue

from worker.errors import BrokerError

JOBS = "confirm-offer.jobs"
RESUME = "confirm-offer.resume"
DEAD_LETTERS = "confirm-offer.dead-letters"

DELIVERY_LIMIT = 60  # a backstop behind MAX_DELIVERIES of the task; RabbitMQ 4 has 20 by default, 3.x none

confirm_offer = Exchange("confirm-offer", type="direct", durable=True)
unrouted = Exchange("booking-events.unrouted", type="fanout", durable=True)
booking_events = Exchange("booking-events", type="topic", durable=True, arguments={"alternate-exchange": unrouted.name})

_QUORUM = {"x-queue-type": "quorum"}
_TO_DEAD_LETTERS = {
    **_QUORUM,
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": confirm_offer.name,
    "x-dead-letter-routing-key": DEAD_LETTERS,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
# Who looks at letters takes them and gives them back, and each time counts. RabbitMQ 4 would drop them after 20.
_KEPT = {**_QUORUM, "x-delivery-limit": 2**31 - 1}

dead_letters_queue = Queue(DEAD_LETTERS, confirm_offer, routing_key=DEAD_LETTERS, queue_arguments=_KEPT)
jobs_queue = Queue(JOBS, confirm_offer, routing_key=JOBS, queue_arguments=_TO_DEAD_LETTERS)
resume_queue = Queue(RESUME, confirm_offer, routing_key=RESUME, queue_arguments=_TO_DEAD_LETTERS)
unrouted_queue = Queue("booking-events.unrouted", unrouted, routing_key="", queue_arguments=_QUORUM)

EXCHANGES = (confirm_offer, unrouted, booking_events)
QUEUES = (dead_letters_queue, jobs_queue, resume_queue, unrouted_queue)


def declare(connection: Connection) -> list[str]:
    """Declares all exchanges, queues and bindings; what stands already is left as it is.

    Returns their names. Raises BrokerError where one of that name is of another kind, or the user may not do it.
    """
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
    return [f"{'queue' if isinstance(entity, Queue) else 'exchange'} {entity.name}" for entity in (*EXCHANGES, *QUEUES)]


def _mismatch(entity: Exchange | Queue, error: PreconditionFailed) -> str:
    kind = "queue" if isinstance(entity, Queue) else "exchange"
    return (
        f"{kind} {entity.name} exists with other properties than this program needs ({error.reply_text}). "
        f"Let it run empty, delete it, and run 'confirm-offer broker declare' again"
    )

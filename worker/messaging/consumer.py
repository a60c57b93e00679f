"""Celery's consumer for plain JSON: each queue belongs to one task, which gets the message's body as it came.

Only the queue decides which task runs. Whatever the headers or the content type say, a message of the jobs queue is a
job. Nothing is decoded here: parsing and validation happen in the task. Celery's other ways to handle messages (its
protocols, strategies, remote control and events) can't be reached from outside.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import structlog
from amqp.exceptions import AccessRefused, NotAllowed
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import WorkerShutdown
from celery.utils.imports import symbol_by_name
from celery.worker.consumer import Consumer
from celery.worker.consumer.connection import Connection
from celery.worker.consumer.consumer import Evloop
from celery.worker.consumer.tasks import Tasks
from celery.worker.request import create_request_cls
from celery.worker.state import maybe_shutdown, task_reserved
from kombu.transport import pyamqp
from uuid_utils.compat import uuid4
from vine import promise

from worker.backoff import exponential
from worker.errors import BrokerError
from worker.messaging import broker, topology
from worker.messaging.guarded_trace import trace
from worker.messaging.inspection import connection_problem
from worker.messaging.large_bodies import is_large, large_bodies
from worker.observability.sentry import report

log = structlog.get_logger(__name__)

WAKE_INTERVAL = 0.5  # seconds
INITIAL_REFUSAL_DELAY, MAX_REFUSAL_DELAY = 1.0, 60.0  # seconds until a login that was refused is tried again

TASK_OF_QUEUE = {topology.JOBS: "confirm_offer", topology.RESUME: "resume"}


class ConnectAndDeclare(Connection):  # type: ignore[misc]
    """Connects, and declares exchanges, queues and bindings where that is due.

    Not after each connect: while a node of a cluster is frozen, no other one may answer the declaration of a binding.
    """

    def start(self, c: Any) -> None:
        self._connect(c)
        try:
            broker.apply_socket_limits(c.connection)
            c.watch_broker()
            if c.declares:
                topology.declare(c.connection)
        except BrokerError as error:
            log.critical("broker_unusable", error=str(error))
            raise WorkerShutdown(2) from None

    def _connect(self, c: Any) -> None:
        """Connects. Where RabbitMQ refuses user, password or virtual host, tries again with growing pauses.

        Celery would log in again at once, without end. Its own pauses are only for a server that can't be reached.
        """
        for tries in count():
            try:
                super().start(c)
            except (AccessRefused, NotAllowed) as error:
                if tries == 0:
                    refusal = f"RabbitMQ refuses the worker: {connection_problem(error).value}; check BROKER_URL"
                    report(BrokerError(refusal), code="broker-refuses")
                c.wait_for_broker(exponential(INITIAL_REFUSAL_DELAY, tries, MAX_REFUSAL_DELAY))
            else:
                return


class ConsumeUndecoded(Tasks):  # type: ignore[misc]
    """Starts and stops consuming the queues. Messages keep their bodies undecoded."""

    requires = (ConnectAndDeclare,)

    def start(self, c: Any) -> None:
        large_bodies.connection_lost()  # the last one, if any
        channel = c.connection.default_channel
        if isinstance(channel, pyamqp.Channel):
            channel.auto_decode = False
            channel.Message = UndecodedMessage
        super().start(c)

    def stop(self, c: Any) -> None:
        """Drops a connection that does not answer: Celery would ask six times more, and wait each time."""
        try:
            if c.task_consumer:
                c.task_consumer.cancel()
        except c.connection_errors:
            c.connection.collect()


class UndecodedMessage(pyamqp.Message):
    """A message whose body is never decompressed: a few bytes could become gigabytes."""

    def __init__(self, msg: Any, channel: Any = None, **kwargs: Any) -> None:
        headers = msg.properties.get("application_headers")
        if isinstance(headers, dict):
            headers.pop("compression", None)
        super().__init__(msg, channel=channel, **kwargs)  # type: ignore[no-untyped-call]
        self.is_dropped: bool = msg.is_dropped is True


class PlainJsonConsumer(Consumer):  # type: ignore[misc]
    """Consumes the queues of TASK_OF_QUEUE and nothing else."""

    event_dispatcher = None  # Celery's own events are off
    declares = True  # whether the next connection declares: the first one, and one after something was missing

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        default_steps = (ConnectAndDeclare, ConsumeUndecoded, Evloop)

    @property
    def _health(self) -> Any:
        return self.controller.background_services.health

    def watch_broker(self) -> None:
        """Has a new connection watched, from before the first wait for an answer."""
        has_heartbeats = self.connection.transport.driver_type == "amqp"
        self._health.broker_watch.watch(broker.Peer(self.connection) if has_heartbeats else None)

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        # Besides noting health, this wakes an idle loop, which would sleep through SIGTERM.
        hub.call_repeatedly(WAKE_INTERVAL, self._health.consumer_succeeded)

    def perform_pending_operations(self) -> None:
        """Notes health under gevent, which has no event loop: Celery calls this in each round."""
        super().perform_pending_operations()
        self._health.consumer_succeeded()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """As Celery's. The next connection tries another host first."""
        self._health.broker_watch.watch_no_more()
        self.declares = broker.lacks_queues(exc)
        self.connection.try_last()
        super().on_connection_error_after_connected(exc)

    def wait_for_broker(self, seconds: float) -> None:
        """Waits. Raises WorkerShutdown or WorkerTerminate if the worker is to stop meanwhile."""
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0:
            maybe_shutdown()
            self._health.consumer_waiting()
            time.sleep(min(left, WAKE_INTERVAL))

    def ensure_connected(self, conn: Any) -> Any:
        """As Celery's. Notes each try to connect, so that a consumer that waits is not taken for one that hangs."""
        ensure = conn.ensure_connection

        def ensure_and_note(errback: Any, max_retries: Any, callback: Callable[[], None]) -> Any:
            def on_try() -> None:
                self._health.consumer_waiting()
                callback()

            return ensure(errback, max_retries, callback=on_try)

        conn.ensure_connection = ensure_and_note
        return super().ensure_connected(conn)

    def drain(self) -> None:
        """Lets the tasks of a pool of threads end. Celery's loop goes on meanwhile: it acknowledges, and sends
        heartbeats. Celery itself waits with its loop stopped, and RabbitMQ would cut the worker off during long calls.
        """
        if self.hub is None or not isinstance(self.pool, ThreadPool):
            return
        executor = self.pool.executor
        executor.shutdown(wait=False, cancel_futures=True)
        while any(thread.is_alive() for thread in tuple(executor._threads)):
            try:
                self.hub.run_once()
            except self.connection_errors as error:  # RabbitMQ gives the messages to others
                log.warning("connection_lost_while_stopping", error=type(error).__name__)
                self.hub.reset()
                if self.connection:
                    self.connection.collect()

    def create_task_handler(self, promise: Callable[..., Any] = promise) -> Callable[[Any], None]:
        """Returns the handler of messages: it makes a request of the queue's task and hands it to the pool."""
        tasks: dict[str, Any] = {queue: self.app.tasks[name] for queue, name in TASK_OF_QUEUE.items()}
        requests = {
            queue: create_request_cls(
                symbol_by_name(task.Request), task, self.pool, self.hostname, None, trace=trace, app=self.app
            )
            for queue, task in tasks.items()
        }

        def on_message(message: Any) -> None:
            if getattr(message, "is_dropped", False):  # the in-memory broker has messages of its own
                large_bodies.wait(partial(self.call_soon_ack, _reject, message, log, self.connection_errors, True))
                return
            queue, body = self._queue_of(message), _bytes(message.body)
            number = self._health.progress.message_came()
            if is_large(len(body)):
                large_bodies.came()
            end = partial(self._end, number, is_large(len(body)))
            request = requests[queue](
                message,
                on_ack=promise(end, (partial(_acknowledge, message),)),
                on_reject=promise(end, (partial(_reject, message),)),
                app=self.app,
                hostname=self.hostname,
                task=tasks[queue],
                connection_errors=self.connection_errors,
                headers=celery_headers(TASK_OF_QUEUE[queue], message),
                body=((body,), {}, {}),
                decoded=True,
            )
            task_reserved(request)
            self.on_task_request(request)

        return on_message

    def _end(self, number: int, was_large: bool, answer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Acknowledges or rejects a message. number: that Progress has given it. Called in the thread of its task."""
        self._health.progress.message_ended(number)
        ending = self.call_soon_ack(answer, *args, **kwargs)
        if was_large:
            large_bodies.ended()
        return ending

    def _queue_of(self, message: Any) -> str:
        """The queue of a message, by its consumer tag; the in-memory broker has only the routing key."""
        tag = message.delivery_info.get("consumer_tag")
        tags: dict[str, str] = self.task_consumer._active_tags
        for queue, queue_tag in tags.items():
            if tag == queue_tag:
                return queue
        return topology.RESUME if message.delivery_info.get("routing_key") == topology.RESUME else topology.JOBS


def _acknowledge(message: Any, _logger: Any, errors: tuple[type[Exception], ...]) -> None:
    """As kombu's ack_log_error, which calls a lost connection critical and leaves its line unfilled."""
    try:
        message.ack()
    except errors as error:
        _log_not_settled(error)


def _reject(message: Any, _logger: Any, errors: tuple[type[Exception], ...], requeue: bool = False) -> None:
    """As kombu's reject_log_error, with the same reservations."""
    try:
        message.reject(requeue=requeue)
    except errors as error:
        _log_not_settled(error)


def _log_not_settled(error: Exception) -> None:
    """RabbitMQ delivers the message again, and finds its outcome stored."""
    log.info("message_comes_again", error=type(error).__name__)


def celery_headers(task: str, message: Any) -> dict[str, Any]:
    """The headers that Celery needs; of the message's own only ``traceparent``, to be validated, and ``x-put-back``."""
    task_id = str(uuid4())
    own = message.headers if isinstance(message.headers, dict) else {}
    return {
        "lang": "py",
        "task": task,
        "id": task_id,
        "root_id": task_id,
        "argsrepr": "(…)",
        "kwargsrepr": "{}",
        "timelimit": (None, None),
        "ignore_result": True,
        "traceparent": own.get("traceparent"),
        "deliveries": _deliveries(message, own),
        "put_back": own.get("x-put-back") is True,
    }


def _deliveries(message: Any, headers: dict[str, Any]) -> int:
    """How often RabbitMQ has delivered this message before. On a first delivery, the header is the publisher's."""
    count = headers.get("x-delivery-count")
    return count if message.delivery_info.get("redelivered") and isinstance(count, int) else 0


def _bytes(body: Any) -> bytes | bytearray:
    return body if isinstance(body, bytes | bytearray) else str(body).encode("utf-8", "surrogatepass")
